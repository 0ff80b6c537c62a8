"""Every dense family, loaded as ours, computes what transformers' own model computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from moezoo import InputError
from moezoo_models.checkpoints.dense import dense_config, dense_layout
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.families.table import FAMILIES
from moezoo_models.files.layout import arranged
from moezoo_models.files.model_files import read_headers
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig

from .conftest import CONFIGS, GATED, stock

OPTIONS = (
    "nope_layers",
    "norm",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
    "rms_norm_eps",
)


@pytest.fixture(params=CONFIGS)
def pair(request, written):
    model, directory = written(request.param)
    return model, load_checkpoint(directory)[0], directory


def tokens(length=40):
    return torch.randint(3, 101, (3, length), generator=torch.Generator().manual_seed(2))


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max())
    )


def test_every_family_is_tried():
    tried = {build(vocab_size=101).model_type for build in CONFIGS.values()}
    assert tried | {"llama", "mistral", "qwen2"} == set(FAMILIES)


def test_equal_logits_and_gradients(pair):
    theirs, ours, directory = pair
    ids = tokens()
    models = (theirs.double(), ours.double())
    outputs = [model(input_ids=ids, labels=ids, use_cache=False) for model in models]
    assert outputs[0].logits.std() > 0.1
    close(outputs[1].logits, outputs[0].logits)
    close(outputs[1].loss.double(), outputs[0].loss.double())
    # Without logits, the loss is computed by another op.
    alone = ours(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss
    close(alone.double(), outputs[1].loss.double())

    for output in outputs:
        output.loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    raw = json.loads((directory / "config.json").read_text())
    where = arranged(read_headers([directory / "model.safetensors"]), dense_layout(raw))
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, parameter in ours.named_parameters():
        part = where[name].part
        grad = wanted[name] if part is None else part.of(wanted[part.name])
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6 * largest)


def test_texts_with_cache_padding_and_windows(pair):
    theirs, ours, _ = pair
    ids = tokens(20)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :12] = 0, 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    found = ours.generate(ids, **options)
    assert torch.equal(found, theirs.generate(ids, **options))
    assert torch.equal(found, ours.generate(ids, use_cache=False, **options))


def test_steps_equal_one_pass(pair):
    _, ours, _ = pair
    ours.double()
    ids, cache = tokens(26), None
    if ours.config.rope_parameters.get("rope_type") == "longrope":
        ids = ids[:, :24]  # keys are turned anew beyond
    logits = []
    for first, last in (
        (0, 11),
        (11, 12),
        (12, 20),
        *((n, n + 1) for n in range(20, ids.shape[1])),
    ):
        output = ours(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), ours(input_ids=ids, use_cache=False).logits)


def test_every_option_matters(pair):
    """Else the tests above would not notice a lost one."""
    _, ours, _ = pair
    ids, state = tokens(), ours.state_dict()
    expected = ours(input_ids=ids).logits
    plain = MoezooConfig()
    for name in OPTIONS:
        value, usual = getattr(ours.config, name), getattr(plain, name)
        if value == usual or (name, value) in [("norm", "rms_wide"), ("rms_norm_eps", 1e-5)]:
            continue
        changed = MoezooConfig.from_dict(ours.config.to_dict() | {name: usual})
        other = MoezooForCausalLM(changed).eval()
        known = {key: state[key] for key in other.state_dict()}
        other.load_state_dict(known)
        assert (other(input_ids=ids).logits - expected).abs().max() > 1e-3, name


def test_only_llamas_are_stepped_natively(pair):
    _, ours, _ = pair
    config = ours.config
    usual = config.norm == "rms" and config.norm_placement == "pre" and not config.nope_layers
    usual &= config.attention_multiplier is None
    why = ineligible(ours)
    assert (why is None) == usual
    if why is not None:
        field = why.removeprefix("its ").removesuffix(" is not a Llama's")
        assert hasattr(config, field)


def test_eager_attention_and_bf16(written):
    for name in ("gemma2", "gemma3", "granite", "smollm3"):
        _, directory = written(name)
        expected = load_checkpoint(directory)[0](input_ids=tokens()).logits
        eager = load_checkpoint(directory, attention="eager")[0](input_ids=tokens()).logits
        close(eager, expected, 1e-5)
        ours = load_checkpoint(directory, dtype="bfloat16", attention="eager")[0]
        theirs = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="eager"
        )
        assert torch.equal(ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)


def test_a_tensor_of_another_size_and_one_twice(written):
    _, directory = written("phi3")
    file = directory / "model.safetensors"
    good = load_file(file)
    fused = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(good | {fused: good[fused][1:].clone()}, file)
    with pytest.raises(InputError, match=f"'{fused}' has shape .63, 32., by config.json 64 rows"):
        load_checkpoint(directory)
    save_file(good | {"model.layers.1.self_attn.q_proj.weight": good[fused][:32].clone()}, file)
    with pytest.raises(InputError, match="are the same tensor; remove one"):
        load_checkpoint(directory)
    save_file({name: t for name, t in good.items() if name != fused}, file)
    with pytest.raises(InputError, match=r"'model.layers.1.self_attn.q_proj.weight' is missing"):
        load_checkpoint(directory)


def test_published_gpt2_has_other_names_and_masks(written):
    model, directory = written("gpt2")
    file = directory / "model.safetensors"
    old = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 128, 128).tril() for n in range(3)}
    save_file(old | masks, file)
    expected = model(tokens()).logits
    for loaded in (load_checkpoint(directory)[0], load_as_it_is(directory)[0]):
        close(loaded(input_ids=tokens()).logits, expected, 1e-5)
    upcycle(directory, directory.parent / "mixture", experts=2)
    mixture = load_checkpoint(directory.parent / "mixture")[0]
    close(mixture(input_ids=tokens()).logits, expected, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_end(name, written):
    ours = load_checkpoint(written(name)[1])[0]
    with pytest.raises(InputError, match="position 128 is beyond the 128 that were learned"):
        ours(input_ids=torch.ones(1, 129, dtype=torch.int64))


REFUSED = [
    ("gemma3", {"model_type": "gemma3"}, "model_type: 'gemma3' sees images, too; give its text"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True lets"),
    ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping: 5.0 is not applied by"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True lets"),
    ("gemma2", {"hidden_activation": "mish"}, "hidden_activation: 'mish' is not known"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping: -1 is out of range"),
    ("granite", {"residual_multiplier": "x"}, "residual_multiplier: 'x' is not a number"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: 2 entries for num_hidden_layers 3"),
    (
        "smollm3_windows",
        {"use_sliding_window": False},
        "use_sliding_window: false, but layer_types has sliding_attention",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True is no option"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: False is no option"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16 is no option"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: False is no"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_no_option_here_is_refused(name, changes, message):
    raw = json.loads(CONFIGS[name](vocab_size=101).to_json_string(use_diff=False)) | changes
    with pytest.raises(InputError) as caught:
        dense_config(raw)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


OURS = [
    ({"norm": "batch"}, "norm: 'batch' is not known"),
    ({"norm_placement": "none"}, "norm_placement: 'none' is not known"),
    ({"positions": "sinusoidal"}, "positions: 'sinusoidal' is not known"),
    ({"qk_norm_over": "layer"}, "qk_norm_over: 'layer' is not known"),
    ({"nope_layers": [9]}, "nope_layers: 9 is out of range"),
    ({"nope_layers": "all"}, "nope_layers: 'all' is not a list"),
    ({"logits_scaling": 0}, "logits_scaling: 0 is out of range"),
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping: 0 is out of range"),
    ({"attention_multiplier": True}, "attention_multiplier: True is not a number"),
    (
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters: nothing for full_attention layers",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": -1.0}}},
        "rope_parameters: full_attention: rope_theta: -1 is out of range",
    ),
]


@pytest.mark.parametrize(("changes", "message"), OURS)
def test_our_own_options_are_checked(changes, message):
    with pytest.raises(InputError) as caught:
        MoezooConfig(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_a_llama():
    ours, plain = dense_config(LlamaConfig(**GATED).to_dict()), MoezooConfig()
    for name in ("norm", "norm_placement", "positions", "nope_layers", "logits_scaling"):
        assert getattr(ours, name) == getattr(plain, name)


def test_a_fresh_model_of_every_kind_begins_as_its_norms_ask():
    for name in ("gemma3", "gpt2", "olmo2"):
        config = dense_config(stock(name).config.to_dict())
        fresh = MoezooForCausalLM(config)
        expected = 0.0 if config.norm == "rms_offset" else 1.0
        assert (fresh.model.norm.weight == expected).all()
        if config.positions == "learned":
            assert 0.01 < fresh.model.embed_positions.weight.std() < 0.03
