"""The decoder's steps against the model's own forward pass, and its texts against `generate`."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

import moezoo
from moezoo_kernels import native, token_step
from moezoo_kernels.sparse_linear import paying
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.generate import own_settings

METHODS = [pytest.param(method, id=method.name) for method in moezoo.zoo()]
READERS = [param for param in METHODS if param.values[0].layer.reads_router_input]
RESIDUALS = ("pre_attention", "post_attention")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [1.5] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    },
}
SHORT = StoppingCriteriaList([MaxLengthCriteria(11)])
CHANGING = ("dynamic", "longrope")  # one pass turns keys by other angles than steps do
FIELDS = {
    "plain": {},
    "one_group": {"num_key_value_heads": 1},
    "all_heads": {"num_key_value_heads": 4},
    "qk_norm": {"qk_norm": True},
    "qk_norm_over_all": {
        "qk_norm": True,
        "qk_norm_over": "projection",
        "num_key_value_heads": 2,
    },
    "parts_of_heads": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "biases": {"attention_bias": True, "attention_output_bias": True},
    "wide_heads": {"head_dim": 16},
    "window": {"sliding_window": 5},
    "some_windows": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "tied": {"tie_word_embeddings": True},
    "beside": {"parallel": "one_norm"},
    "beside_with_norms": {"parallel": "two_norms", "sliding_window": 5},
    **{
        name: {"rope_parameters": {"rope_type": name, "rope_theta": 100.0, **more}}
        for name, more in ROPES.items()
    },
}
FIELDS["dynamic"]["max_position_embeddings"] = 12  # fewer than are written


@pytest.fixture
def build(make):
    """Build a model whose weights are all away from zero, and whose next tokens differ enough."""

    def built(dtype=torch.float32, **fields):
        model = make(**fields).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            model.lm_head.weight.mul_(20)
        return model

    return built


@pytest.fixture
def torch_steps(monkeypatch):
    """Compute by torch's operators alone, as on devices without kernels of ours."""
    monkeypatch.setattr(token_step, "MOST_SEQUENCES", 0)


@pytest.fixture
def native_steps():
    """Skip the test where there are no kernels."""
    if reason := native.unusable(torch.device("cpu"), torch.float32):
        pytest.skip(f"C++ kernels: {reason}")


def method_rules(method, read="ffn_input"):
    rule = {"class_path": method.layer.__name__, "init_args": method.arguments}
    return [{"layers": "all", **rule, "router_input": read}]


def left_padded(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of lengths 8, 3, 6, 1, …, padded on the left."""
    lengths = [8, 3, 6, 1, 8, 2, 7, 5][:batch]
    ids = torch.randint(61, (batch, max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = torch.stack([F.pad(torch.ones(n).long(), (max(lengths) - n, 0)) for n in lengths])
    return ids, mask


@torch.no_grad()
def assert_steps_are_the_forward_pass(model, ids, mask, steps=14, rerouted=0):
    """Feed the same tokens to the decoder and to one forward pass over the whole.

    So many positions may be ``rerouted``: where experts score alike, rounding decides.
    """
    following = torch.randint(61, (len(ids), steps), generator=torch.Generator().manual_seed(3))
    decoder = Decoder(model, ids, mask, steps + 1)
    logits = [decoder.prefill(), *(decoder.step(tokens) for tokens in following.t())]
    everything = torch.cat([ids, following], dim=1)
    seen = torch.cat([mask, torch.ones_like(following)], dim=1)
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    whole = model(everything, attention_mask=seen, position_ids=places, use_cache=False).logits
    expected, actual = whole[:, ids.shape[1] - 1 :], torch.stack(logits, dim=1)
    tolerance = TOLERANCE[model.dtype] * expected.abs().max()
    assert actual.dtype == expected.dtype
    beyond = ~((actual - expected).abs().amax(dim=-1) <= tolerance)  # or not a number
    assert beyond.sum() <= rerouted


def mixes_tokens(model) -> bool:
    """Whether who is routed where depends on the other tokens of a call."""
    layers = [block.mlp for block in model.model.layers]
    return any(not layer.causal or getattr(layer, "capacity", None) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_every_method(build, method, dtype):
    model = build(dtype, ffn=method_rules(method), allow_non_causal=True)
    if mixes_tokens(model):
        pytest.skip("one pass over all tokens routes otherwise than steps do")
    # Its last norm enlarges the rounding of an answer that is nearly zero.
    enlarged = int(method.name == "per_layer_embedding" and dtype == torch.float32)
    for batch in (1, 3):
        assert_steps_are_the_forward_pass(model, *left_padded(batch), rerouted=enlarged)


def test_a_model_that_trains_with_rounded_experts_decodes_as_if_it_had_not(
    build, rules, native_steps
):
    def model_of(rounding):
        router = {"rounding": rounding}
        layer = rules["rule"]("SparseMoE", num_experts=4, top_k=2, d_expert=16, router=router)
        return build(ffn=[layer], allow_non_causal=True)

    model, other = model_of(4), model_of(0)
    other.load_state_dict(model.state_dict())
    assert not mixes_tokens(model)
    ids, mask = left_padded(3)
    assert all(block.feed for block in Decoder(model, ids, mask, 4)._blocks)
    assert_steps_are_the_forward_pass(model, ids, mask)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
        assert not torch.equal(model.train()(ids).logits, other.train()(ids).logits)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in CHANGING])
def test_steps_of_every_kind_of_attention(build, rules, name, dtype, kernels, request):
    if kernels == "torch" or dtype != torch.float64:  # which is computed by torch anyway
        request.getfixturevalue(f"{kernels}_steps")
    model = build(dtype, ffn=rules["moe"], **FIELDS[name])
    if dtype == torch.bfloat16:  # a router that is rounded once more chooses others
        model = build(dtype, **FIELDS[name])
    for batch in (1, 3):
        assert_steps_are_the_forward_pass(model, *left_padded(batch))


@pytest.mark.parametrize("read", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", READERS)
def test_steps_of_routers_that_read_the_residual_stream(build, method, dtype, read):
    model = build(dtype, ffn=method_rules(method, read), allow_non_causal=True)
    if mixes_tokens(model):
        pytest.skip("one pass over all tokens routes otherwise than steps do")
    for batch in (1, 3):
        assert_steps_are_the_forward_pass(model, *left_padded(batch))


def test_steps_with_persistent_slots(build, rules):
    for fields in ({}, {"sliding_window": 5}):
        model = build(torch.float64, ffn=rules["persistent"], **fields)
        assert_steps_are_the_forward_pass(model, *left_padded(3))


def settings(model, new_tokens=16, **options):
    """Return settings as the command makes them; three ids end texts."""
    options = {"do_sample": False, "eos_token_id": [7, 8, 60], "pad_token_id": 60} | options
    return GenerationConfig(max_new_tokens=new_tokens, **options)


def both_ways(model, ids, mask, config, criteria=None):
    """Continue by the decoder and by transformers, from the same random state."""
    assert ineligible(model) is None
    torch.manual_seed(5)
    none = LogitsProcessorList()
    ours = continue_ids(model, ids, mask, config, processors=none, criteria=criteria)
    torch.manual_seed(5)
    with own_settings(model):
        theirs = model.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria
        )
    return ours, theirs


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_the_texts_of_every_method(build, method, batch):
    model = build(ffn=method_rules(method), allow_non_causal=True)
    ours, theirs = both_ways(model, *left_padded(batch), settings(model))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("read", RESIDUALS)
@pytest.mark.parametrize("method", READERS)
def test_the_texts_of_routers_that_read_the_residual_stream(build, method, read, batch):
    model = build(ffn=method_rules(method, read), allow_non_causal=True)
    ours, theirs = both_ways(model, *left_padded(batch), settings(model))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", FIELDS)
def test_the_texts_of_every_kind_of_attention(build, name, kernels, request):
    request.getfixturevalue(f"{kernels}_steps")
    model = build(**FIELDS[name])
    for batch in (1, 8):
        ours, theirs = both_ways(model, *left_padded(batch), settings(model))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", FIELDS)
def test_texts_in_bf16_differ_where_two_tokens_tie_only(build, name, kernels, request):
    """Logits have three digits there, and the order of a sum decides between equals."""
    request.getfixturevalue(f"{kernels}_steps")
    model = build(torch.bfloat16, **FIELDS[name])
    for batch in (1, 8):
        ids, mask = left_padded(batch)
        rows = both_ways(model, ids, mask, settings(model))
        for row, (ours, theirs) in enumerate(zip(*rows, strict=False)):
            assert_equal_up_to_a_tie(model, ours, theirs, ids.shape[1], mask[row])


@torch.no_grad()
def assert_equal_up_to_a_tie(model, ours, theirs, length, mask):
    """Compare one text with another until their tokens part, where both must be as likely."""
    short = min(len(ours), len(theirs))
    parted = (ours[:short] != theirs[:short]).nonzero()
    if not len(parted):
        return
    at = int(parted[0])
    assert at >= length
    text = ours[None, length - int(mask.sum()) : at]
    logits = model(text).logits[0, -1].float()
    gap = abs(logits[ours[at]] - logits[theirs[at]])
    assert gap <= TOLERANCE[model.dtype] * logits.abs().max()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.3, "top_k": 50, "top_p": 1.0},
        {"temperature": 7.0, "top_k": 5, "top_p": 1.0},
        {"temperature": 20.0, "top_k": 0, "top_p": 0.6},
        {"temperature": 20.0, "top_k": 30, "top_p": 0.9},
    ],
)
def test_a_seed_draws_the_same_tokens(build, rules, batch, options):
    model = build(ffn=rules["moe"])
    config = settings(model, do_sample=True, **options)
    ours, theirs = both_ways(model, *left_padded(batch), config)
    assert torch.equal(ours, theirs)


def test_texts_end_by_their_tokens_and_by_criteria(build):
    model = build()
    prompts = left_padded(8)
    free, _ = both_ways(model, *prompts, settings(model, eos_token_id=[60]))
    ends = free[:4, 10].tolist()
    ours, theirs = both_ways(model, *prompts, settings(model, eos_token_id=ends))
    assert torch.equal(ours, theirs)
    assert (ours[:4, 11:] == 60).all()
    ours, theirs = both_ways(model, *prompts, settings(model), SHORT)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 11
    one_more, _ = both_ways(model, *prompts, settings(model, new_tokens=1))
    assert torch.equal(one_more, ours[:, :9])


def test_unfused_projections_give_the_same(build, torch_steps, monkeypatch):
    model = build(attention_bias=True, qk_norm=True)
    fused = both_ways(model, *left_padded(3), settings(model))[0]
    monkeypatch.setattr("moezoo_models.decoding.decoder._MOST_FUSED_BYTES", 0)
    assert torch.equal(both_ways(model, *left_padded(3), settings(model))[0], fused)


def test_the_kernels_step_what_they_know(build, rules, native_steps):
    """Otherwise the tests above would compare torch with torch."""
    rule = rules["rule"]
    known = [rule("DenseFFN"), rule("SparseMoE", 1), rule("SigmaMoE", 2)]
    blocks = Decoder(build(ffn=known), *left_padded(2), 4)._blocks
    assert all(block.attend and block.feed for block in blocks)
    for read in RESIDUALS:
        asking = [{**each, "router_input": read} for each in known[1:]]
        blocks = Decoder(build(ffn=[known[0], *asking]), *left_padded(2), 4)._blocks
        assert all(block.attend and block.feed for block in blocks)
    others = [rule("PEER"), rule("PersistentMemoryAttention", 1)]
    blocks = Decoder(build(ffn=others), *left_padded(2), 4)._blocks
    assert [block.attend is None for block in blocks] == [False, True, False]
    assert not any(block.feed for block in blocks)


@torch.no_grad()
@pytest.mark.parametrize(
    "matrices", [{"kind": "pruned", "block": 16}, {"kind": "n_m", "n": 2, "m": 4}], ids=str
)
def test_matrices_are_decoded_without_their_zeros(
    build, rules, native_steps, monkeypatch, matrices
):
    monkeypatch.setattr(paying, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(token_step, "dense_step", None)
    init = {"matrices": {**matrices, **({"sparsity": 0.5} if "block" in matrices else {})}}
    model = build(
        ffn=[{**rules["rule"]("DenseFFN"), "init_args": {"d_ff": 64, "bias": True, **init}}]
    )
    assert all(block.feed for block in Decoder(model, *left_padded(1), 4)._blocks)
    assert_steps_are_the_forward_pass(model, *left_padded(1))


SELECTION = {"input": 0.4, "gate": 0.02, "up_input": 0.3, "hidden": 0.01}


def selective(rules, **arguments):
    """Rules of selective blocks in all layers."""
    return [{**rules["rule"]("SelectiveFFN"), "init_args": {"bias": True, **arguments}}]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "relu"}], ids=str)
def test_selective_blocks_are_laid_by_columns_once(
    build, rules, native_steps, tmp_path, batch, options
):
    names = ("input", "hidden") if options else SELECTION
    selection = {"kind": "threshold", **{name: SELECTION[name] for name in names}}
    model = build(ffn=selective(rules, selection=selection, **options))
    ids, mask = left_padded(batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = Decoder(model, ids, mask, 4)._blocks
    assert all(block.attend and block.feed for block in blocks)
    mlp = model.model.layers[0].mlp
    by_columns = [mlp.up_proj if options else mlp.gate_proj, mlp.down_proj]
    assert all(part.weight.stride()[0] == 1 for part in by_columns)
    places = [part.weight.data_ptr() for part in by_columns]
    assert_steps_are_the_forward_pass(model, ids, mask)
    assert [part.weight.data_ptr() for part in by_columns] == places
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_selective_blocks_that_are_still_dense_are_left_to_torch(build, rules, native_steps):
    model = build(ffn=selective(rules, first_tokens=6))
    for length, known in ((5, False), (6, True)):
        ids = torch.randint(61, (1, length))
        blocks = Decoder(model, ids, torch.ones_like(ids), 4)._blocks
        assert all(bool(block.feed) == known for block in blocks)
    ids, mask = left_padded(2)  # of which one text is shorter
    assert not any(block.feed for block in Decoder(model, ids, mask, 4)._blocks)
    assert_steps_are_the_forward_pass(model, ids, mask)


@pytest.mark.parametrize(
    "router",
    [
        {"logits": {"bias": True}},
        {"logits": {"norm": True}},
        {"logits": {"mlp": 8}},
        {"logits": {"softcap": 0.5}},
        {"logits": {"scale": 3.0}},
        {"score": "sqrt_softplus", "selection_bias": True},
        {"score": "sigmoid", "choice": "threshold", "normalize": False},
        {"score": "relu", "normalize": False},
        {"score": "sigmoid", "select_on": "logit", "selection_bias": True},
        {"num_groups": 2, "closed_groups": "zero"},
        {"weights": {"minimum": 0.9}},
        {"weights": {"apply_to": "input"}},
        {"score": "sparse_mixer", "normalize": False, "mixer_eps": 0.3},
        {"weights": {"p": 2.0, "expert_scale": True}},
        {"weights": {"eps": 0.2, "learned_scale": True}},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_left_to_torch(build, rules, native_steps, router):
    layer = rules["rule"]("SparseMoE", num_experts=4, top_k=2, d_expert=16, router=router)
    model = build(ffn=[layer])
    for block in model.model.layers:
        for tensor in [*block.mlp.gate.parameters(), *block.mlp.gate.buffers()]:
            torch.nn.init.normal_(tensor)
    ids = torch.randint(61, (2, 9))
    assert not any(block.feed for block in Decoder(model, ids, torch.ones_like(ids), 4)._blocks)
    found, expected = stepped(model, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


VARIANTS = {
    "limits": {"activation": "quick_gelu", "glu": {"limit": 0.3, "up_shift": 1.0}},
    "limit after": {"glu": {"limit": 0.1, "limit_after": True}},
    "softcaps": {"glu": {"gate_softcap": 0.4, "up_softcap": 0.5}},
    "shared": {"num_shared_experts": 2, "shared_bias": False},
    "shared, bounded otherwise": {
        "glu": {"limit": 0.2},
        "num_shared_experts": 1,
        "shared_glu": {},
    },
    "shared, weighed": {"num_shared_experts": 1, "shared_gate": True},
    "latent": {"d_latent": 9},
    "norms": {"expert_norms": {"input": True, "output": True}},
    "rows in turn": {"interleaved": True},
    "identity": {
        "num_identity_experts": 3,
        "router": {"normalize": False, "scale": 6.0, "selection_bias": True},
    },
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
def test_experts_of_every_kind_step_as_they_are_called(build, name, dtype):
    options = {"num_experts": 4, "d_expert": 8, "bias": True, **VARIANTS[name]}
    rule = {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": options}
    model = build(dtype, ffn=[rule])
    rerouted = 3 if dtype == torch.bfloat16 else 0  # of 30 positions
    assert_steps_are_the_forward_pass(model, *left_padded(2), rerouted=rerouted)
    stepped = all(block.feed for block in Decoder(model, *left_padded(2), 4)._blocks)
    known = {"limits", "limit after", "softcaps", "rows in turn", "shared", "shared, weighed"}
    usable = native.unusable(torch.device("cpu"), dtype) is None
    assert stepped == (name in known and usable)


CARVED = {
    "linear": {"router": "linear"},
    "shared": {"router": "shared", "output_bias": True},
    "neuron": {"router": "neuron", "bias": True},
    "signed": {"router": "neuron", "signed": True, "gated": False, "activation": "relu"},
    "none shared": {"router": "linear", "num_shared_experts": 0, "output_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CARVED)
def test_carved_blocks_step_as_they_are_called(build, native_steps, name, dtype):
    options = {"num_experts": 7, "top_k": 3, "d_expert": 5, **CARVED[name]}
    rule = {"layers": "all", "class_path": "moezoo.CarvedMoE", "init_args": options}
    model = build(dtype, ffn=[rule])
    for batch in (1, 2):
        ids, mask = left_padded(batch)
        assert all(block.feed for block in Decoder(model, ids, mask, 4)._blocks)
        rerouted = 3 * batch if dtype == torch.bfloat16 else 0
        assert_steps_are_the_forward_pass(model, ids, mask, rerouted=rerouted)
    for read in RESIDUALS:
        asking = build(dtype, ffn=[{**rule, "router_input": read}])
        blocks = Decoder(asking, ids, mask, 4)._blocks
        assert all(bool(block.feed) == (name != "shared") for block in blocks)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dense_blocks_step_with_their_bounds(build, dtype):
    options = {"d_ff": 24, "glu": {"limit": 0.2, "up_shift": 0.5}}
    rule = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": options}
    assert_steps_are_the_forward_pass(build(dtype, ffn=[rule]), *left_padded(2))


def test_weights_are_read_anew_by_each_call(build):
    model = build()
    before = both_ways(model, *left_padded(1), settings(model))[0]
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight.mul_(-1)
    ours, theirs = both_ways(model, *left_padded(1), settings(model))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)


def stepped(model, ids):
    """Return the logits of the last token by a step, and by the forward pass."""
    with torch.no_grad():
        steps = Decoder(model, ids[:, :-1], torch.ones_like(ids[:, :-1]), 4)
        steps.prefill()
        return steps.step(ids[:, -1]), model(ids).logits[:, -1]


@pytest.mark.parametrize("mixture", [False, True])
def test_steps_write_fp32_whatever_torchs_default_dtype_is(build, rules, mixture):
    model = build(ffn=rules["moe"]) if mixture else build()
    ids = torch.randint(61, (2, 9))
    expected = stepped(model, ids)[1]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = stepped(model, ids)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eps", [0, 1])
def test_a_norms_eps_may_be_a_whole_number(build, rules, eps):
    model = build(ffn=rules["moe"], rms_norm_eps=eps)
    found, expected = stepped(model, torch.randint(61, (2, 9)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_last_norm_and_head_may_stay_fp32(build, rules):
    model = build(torch.bfloat16, ffn=rules["moe"])
    model.model.norm.float()
    model.lm_head.float()
    assert ineligible(model) is None
    found, expected = stepped(model, torch.randint(61, (2, 9)))
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.3, rtol=3e-2)


def test_adapted_experts_are_left_to_generate(build, rules):
    model = build(ffn=rules["moe"])
    model.model.layers[1].mlp.experts.base_layer = torch.nn.Identity()
    assert ineligible(model) == "model.layers.1.mlp.experts is adapted"


def test_what_is_left_to_generate(build, rules):
    model = build(ffn=rules["moe"])
    assert ineligible(model) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ineligible(model) == "autocast is on"
    assert ineligible(model.train()) == "the model is in training mode"
    model.eval()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert ineligible(model) == "model.layers.1.mlp has forward hooks"
    handle.remove()
    mlp = model.model.layers[2].mlp
    mlp.forward = mlp.forward
    assert ineligible(model) == "model.layers.2.mlp has another forward"
    del mlp.forward
    projection = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(projection)
    assert ineligible(model) == "model.layers.0.self_attn.q_proj is a Sequential"
    model.model.layers[0].self_attn.q_proj = projection
    model.set_attn_implementation("eager")
    assert ineligible(model) == "its attention backend is eager"
    ids, mask = left_padded(3)
    written = continue_ids(model, ids, mask, settings(model), processors=LogitsProcessorList())
    assert written.shape[0] == 3
    model.set_attn_implementation("sdpa")
    assert torch.equal(written, both_ways(model, ids, mask, settings(model))[0])
    assert ineligible(torch.nn.Linear(2, 2)) == "Linear is not this library's model"
