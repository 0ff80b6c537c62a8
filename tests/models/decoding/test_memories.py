"""Steps of models with memories: what they keep of earlier tokens, against one pass over all."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList

from moezoo import InputError
from moezoo.routing.ngram import text_classes
from moezoo_kernels import token_step
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.generate import own_settings

END = 5
HASHED = {"num_heads": 2, "num_rows": 40}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
MEMORIES = {
    "n-grams": [("Engram", [0, 2], {**HASHED, "boundary_id": END})],
    "n-grams of one text": [("Engram", [1], {**HASHED, "max_ngram": 4})],
    "n-grams alone": [("Engram", "all", {**HASHED, "convolution": False, "gate": False})],
    "n-grams beside a dense block": [("Engram", [1], {**HASHED, "d_ff": 9})],
    "classes": [("Engram", [0], {**HASHED, "compression": True, "hash_function": "numpy"})],
    "rows": [("L3", [1], {})],
    "values": [("L3", [2], {"d_value": 5, "max_rows": 3, "num_rows": 100})],
    "embeddings": [("PerLayerEmbedding", "all", {"d_row": 5})],
    "several": [
        ("PerLayerEmbedding", [1, 2], {"d_row": 5}),
        ("L3", "all", {}),
        ("Engram", [1, 2], {**HASHED, "boundary_id": END}),
    ],
}
IN_BLOCKS = {
    "n-grams": {**HASHED, "d_ff": 24, "vocab_size": 61, "boundary_id": END},
    "n-grams and convolution": {**HASHED, "d_ff": 24, "vocab_size": 61, "convolution": True},
}


@pytest.fixture
def build(make, rules):
    """Build a model of whose weights none is zero, and whose next tokens differ enough."""

    def built(memory=(), dtype=torch.float32, ffn="DenseFFN", options=None, **fields):
        memory = [rules["rule"](name, layers, **init) for name, layers, init in memory]
        ffn = [rules["rule"](ffn, **(options or {"d_ff": 24}))]
        model = make(ffn=ffn, memory=memory, **fields).to(dtype).eval()
        with torch.no_grad():
            for _, layer in model.model.added_layers():
                if getattr(layer, "compression", False):
                    layer.classify(text_classes([f"{token % 40:x}" for token in range(61)]))
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


def prompts(lengths=(14, 3, 10, 1)):
    """Prompts padded on the left, longer and shorter than what is remembered; two have an end."""
    ids = torch.randint(6, 61, (len(lengths), max(lengths)), generator=seeded(2))
    ids[0, -4] = ids[-1, -1] = END
    mask = torch.stack([F.pad(torch.ones(n).long(), (max(lengths) - n, 0)) for n in lengths])
    return ids, mask


def seeded(number):
    return torch.Generator().manual_seed(number)


@torch.no_grad()
def whole_and_stepped(model, ids, mask, steps=14):
    """Return the logits after prompts and each further token, by one pass and by steps."""
    following = torch.randint(61, (len(ids), steps), generator=seeded(3))
    following[0, 5] = following[-1, 3] = END
    decoder = Decoder(model, ids, mask, steps + 1)
    logits = [decoder.prefill(), *(decoder.step(tokens) for tokens in following.t())]
    seen = torch.cat([mask, torch.ones_like(following)], dim=1)
    whole = model(
        torch.cat([ids, following], dim=1),
        attention_mask=seen,
        position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    return whole[:, ids.shape[1] - 1 :], torch.stack(logits, dim=1)


def assert_steps_are_the_forward_pass(model, ids, mask):
    expected, found = whole_and_stepped(model, ids, mask)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE[model.dtype] * expected.abs().max()


KINDS = [(name, torch.float64) for name in MEMORIES]
KINDS += [(name, torch.float32) for name in ("n-grams", "classes", "rows", "several")]
# The last norm of an embedding enlarges the rounding of an answer that is nearly zero.
KINDS += [(name, torch.bfloat16) for name in ("n-grams", "rows")]


@pytest.mark.parametrize(("name", "dtype"), KINDS, ids=str)
def test_steps_with_memories(build, name, dtype):
    model = build(MEMORIES[name], dtype)
    assert_steps_are_the_forward_pass(model, *prompts())
    assert_steps_are_the_forward_pass(model, *prompts([4]))


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_steps_of_blocks_that_read_earlier_tokens(build, name):
    model = build((), torch.float64, "Engram", IN_BLOCKS[name])
    assert_steps_are_the_forward_pass(model, *prompts())


@pytest.mark.parametrize("fields", [{"sliding_window": 4}, {"parallel": "one_norm"}], ids=str)
def test_memories_stand_before_what_blocks_read(build, torch_steps, fields):
    assert_steps_are_the_forward_pass(
        build(MEMORIES["several"], torch.float64, **fields), *prompts()
    )


def test_a_history_that_is_lost_shows(build, monkeypatch):
    """Or the tests above would pass without one."""
    model = build(MEMORIES["n-grams"], torch.float64)
    monkeypatch.setattr(
        "moezoo_models.decoding.decoder.earlier_values",
        lambda cache, name: torch.zeros(4, 0, 32, dtype=torch.float64),
    )
    expected, found = whole_and_stepped(model, *prompts())
    wrong = (found - expected).abs().amax(-1) > 1e-3 * expected.abs().max()
    assert torch.equal(wrong[:, 0], torch.zeros(4, dtype=torch.bool))
    assert wrong[1:3, 2:9].any(1).all()


def settings(new_tokens=16, **options):
    """Return settings as the command makes them; three ids end texts."""
    options = {"do_sample": False, "eos_token_id": [7, 8, 60], "pad_token_id": 60} | options
    return GenerationConfig(max_new_tokens=new_tokens, **options)


def ours_of(model, ids, mask, config, griffin=None):
    torch.manual_seed(5)
    none = LogitsProcessorList()
    return continue_ids(model, ids, mask, config, processors=none, griffin=griffin)


def theirs_of(model, ids, mask, config, **options):
    torch.manual_seed(5)
    with own_settings(model):
        return model.generate(ids, attention_mask=mask, generation_config=config, **options)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 9.0, "top_k": 9}])
@pytest.mark.parametrize("name", ["n-grams", "classes", "several"])
def test_texts_are_those_of_generate(build, name, sampled):
    model = build(MEMORIES[name])
    assert ineligible(model) is None
    config = settings(**sampled)
    for some in (prompts(), prompts([6])):
        found = ours_of(model, *some, config)
        assert torch.equal(found, theirs_of(model, *some, config))
        if not sampled:
            assert torch.equal(found, theirs_of(model, *some, config, use_cache=False))
    assert len({tuple(row[14:].tolist()) for row in ours_of(model, *prompts(), config)}) > 1


def test_a_prompts_neurons_are_chosen_beside_memories(build):
    """Memories are not among what a prompt chooses; with all neurons nothing changes."""
    model = build(MEMORIES["several"])
    some = prompts([6])
    whole = ours_of(model, *some, settings())
    assert torch.equal(ours_of(model, *some, settings(), griffin=1.0), whole)
    assert not torch.equal(ours_of(model, *some, settings(), griffin=0.1), whole)


class Elsewhere(torch.nn.Parameter):
    """A table that several processes share."""


@pytest.mark.parametrize("change", ["hook", "forward", "adapter", "shared", "attention", "norm"])
def test_what_is_left_to_generate(build, change):
    """With the same texts, and the reason."""
    fields = {"norm_placement": "post"} if change == "norm" else {}
    model = build(MEMORIES["several"], **fields)
    config = settings(new_tokens=6)
    expected = theirs_of(model, *prompts(), config)
    layer = model.model.layers[1].memories[0]
    here = "model.layers.1.memories.0"
    if change == "hook":
        layer.register_forward_hook(lambda *_: None)
        reason = f"{here} has forward hooks"
    elif change == "forward":
        layer.forward = layer.forward
        reason = f"{here} has another forward"
    elif change == "adapter":
        layer.mix_proj.base_layer = torch.nn.Identity()
        reason = f"{here}.mix_proj is adapted"
    elif change == "shared":
        layer.keys.weight = Elsewhere(layer.keys.weight.data)
        reason = f"{here}.keys.weight is not whole on cpu"
    elif change == "attention":
        model.set_attn_implementation("eager")
        reason = "its attention backend is eager"
    else:
        reason = "its norm_placement is not a Llama's"
    assert ineligible(model) == reason
    assert torch.equal(ours_of(model, *prompts(), config), expected)
    with pytest.raises(InputError, match="griffin: "):
        ours_of(model, *prompts([6]), config, griffin=0.5)
