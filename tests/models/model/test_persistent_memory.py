"""Blocks whose attention has persistent slots: one softmax, and no feed-forward half."""

import pytest
import torch

from moezoo import DenseFFN, InputError
from moezoo.experts.slots import PersistentSlots
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.model import joint_attention
from moezoo_models.model.attention import Attention
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.rotary import RotaryEmbedding, rotate

D, H, G, C, N, T = 24, 6, 2, 10, 7, 9


def attention(backend: str, **fields) -> tuple[Attention, PersistentSlots, tuple]:
    """One attention in fp64 with grouped keys, its slots, and positions that begin anywhere."""
    torch.manual_seed(0)
    config = MoezooConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=C,
        **fields,
    )
    config._attn_implementation = backend
    positions = torch.arange(50, 50 + T)[None]
    rotary = RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), positions)
    return Attention(config, 0).double(), PersistentSlots(H, N, C).double(), rotary


def by_heads(module: Attention, slots: PersistentSlots, hidden, rotary, seen) -> torch.Tensor:
    """Compute head by head, with N more key-value pairs that know of no position."""
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, C)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    turned, key = rotate(query, *rotary), rotate(key, *rotary)
    answers = []
    for head in range(H):
        group = head // (H // G)
        context = turned[:, head] @ key[:, group].mT / C**0.5
        more = query[:, head] @ (C**0.5 * slots.keys[head]).T / C**0.5
        scores = torch.cat([context.masked_fill(~seen, -torch.inf), more], dim=-1)
        values = [value[:, group], (N**0.5 * slots.values[head]).expand(len(hidden), -1, -1)]
        answers.append(scores.softmax(-1) @ torch.cat(values, dim=1))
    return module.o_proj(torch.cat(answers, dim=-1))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_dense_attention_with_more_pairs(backend, padding):
    module, slots, rotary = attention(backend, attention_bias=True)
    hidden = torch.randn(2, T, D, dtype=torch.float64)
    real = torch.ones(2, 1, T, dtype=torch.bool)
    real[1, :, :4] = not padding
    seen = real & torch.ones(T, T, dtype=torch.bool).tril()
    mask = seen[:, None] if padding else None
    if backend == "eager":
        mask = torch.zeros(2, 1, T, T, dtype=torch.float64)
        mask.masked_fill_(~seen[:, None], torch.finfo(torch.float64).min)
    parameters = [hidden.requires_grad_(), *module.parameters(), *slots.parameters()]
    joined, weights, context_share = module(hidden, rotary, mask, slots=slots)
    expected = by_heads(module, slots, hidden, rotary, seen)
    direction = torch.randn_like(expected)
    found, wanted = (
        [output, *torch.autograd.grad((output * direction).sum(), parameters)]
        for output in (joined, expected)
    )
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert context_share.shape == (2, H, T)
    assert ((context_share > 0) & (context_share < 1))[:, :, 4:].all()
    if backend == "eager":
        torch.testing.assert_close(weights.sum(-1), context_share, rtol=0, atol=1e-12)


def test_slots_know_no_position():
    """The same hidden states elsewhere: without context, or with it, nothing changes."""
    module, slots, (cos, sin) = attention("sdpa")
    hidden = torch.randn(1, T, D, dtype=torch.float64)
    here = module(hidden, (cos, sin), None, slots=slots)[0]
    turned = (cos * cos[:, 3:4] - sin * sin[:, 3:4], sin * cos[:, 3:4] + cos * sin[:, 3:4])
    torch.testing.assert_close(module(hidden, turned, None, slots=slots)[0], here)


def test_the_block_has_no_feed_forward_half(make, rules):
    model = make(ffn=rules["persistent"])
    for number, block in enumerate(model.model.layers):
        names = dict(block.named_parameters())
        assert ("mlp.slots.keys" in names) == (number != 1)
        assert ("post_attention_layernorm.weight" in names) == (number == 1)


def test_as_many_slots_as_neurons_are_as_many_parameters(make, rules):
    sizes = {"num_key_value_heads": 4, "num_hidden_layers": 2}
    slots = make(ffn=[rules["rule"]("PersistentMemoryAttention", num_slots=48)], **sizes)
    dense = make(ffn=[rules["rule"]("DenseFFN", d_ff=48, gated=False)], **sizes)
    norms = 2 * 32  # the second norm of each block is gone
    assert slots.num_parameters() == dense.num_parameters() - norms
    mine, other = (model.model.layers[0].mlp.cost() for model in (slots, dense))
    assert mine == other
    default = make(ffn=[rules["rule"]("PersistentMemoryAttention")], num_hidden_layers=1)
    width = DenseFFN(32, gated=False).d_ff
    assert default.model.layers[0].mlp.slots.num_slots == width == 128


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"sliding_window": 5}])
def test_decoding_with_a_cache_gives_the_same_logits(make, rules, ids, backend, fields):
    model = make(ffn=rules["persistent"], attn_implementation=backend, **fields).eval()
    output = model(ids[:, :4], use_cache=True)
    steps, cache = [output.logits], output.past_key_values
    for step in ids[:, 4:].split(1, dim=1):
        output = model(step, past_key_values=cache, use_cache=True)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, rtol=1e-5, atol=1e-5)
    held = min(12, (fields.get("sliding_window") or 13) - 1)
    for layer in cache.layers:
        assert layer.keys.shape == (2, 2, held, 8)  # the context's, of grouped heads: no slots


def test_generation_with_and_without_a_cache(make, rules, ids):
    model = make(ffn=rules["persistent"]).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)


def test_backends_agree_and_show_the_share_of_the_context(make, rules, ids):
    models = [make(ffn=rules["persistent"], attn_implementation=name) for name in ("sdpa", "eager")]
    sdpa, eager = (model.eval()(ids, output_attentions=True) for model in models)
    torch.testing.assert_close(sdpa.logits, eager.logits, rtol=1e-5, atol=1e-5)
    shares = [output.ffn_stats[0]["context_mass"] for output in (sdpa, eager)]
    torch.testing.assert_close(*shares)
    torch.testing.assert_close(eager.attentions[0].sum(-1).mean(), shares[1])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dropout_reaches_context_and_slots(make, rules, ids, backend):
    fields = {"ffn": rules["persistent"], "attn_implementation": backend}
    exact = make(**fields)(ids).logits
    tiny = make(attention_dropout=1e-12, **fields).train()(ids).logits  # another code path
    torch.testing.assert_close(tiny, exact, rtol=1e-5, atol=1e-5)
    model = make(attention_dropout=1.0, **fields).train()
    kept = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, x: kept.append(x[0]))
    model(ids)
    assert not kept[0].any()
    torch.testing.assert_close(model.eval()(ids).logits, exact)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operator_keeps_its_promises(masked):
    def draw(*shape):
        return torch.randn(shape, requires_grad=True)

    mask = torch.zeros(2, 1, 5, 5).index_fill(3, torch.tensor([0, 3]), -1e30) if masked else None
    query, key, value, answer = (draw(2, 3, 5, 8) for _ in range(4))
    inputs = (query, key, value, mask, answer, draw(2, 3, 5, 1), not masked, 0.3)
    torch.library.opcheck(joint_attention._fused, inputs)


def test_recomputation_changes_nothing(make, rules, ids):
    plain, recomputed = (make(ffn=rules["persistent"]).train() for _ in range(2))
    recomputed.activation_checkpointing_enable()
    for model in (plain, recomputed):
        model(ids, labels=ids).loss.backward()
    for mine, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert mine.grad.any()
        assert torch.equal(mine.grad, other.grad)


def test_checkpoints_hold_the_slots(make, rules, ids, tmp_path):
    model = make(ffn=rules["persistent"]).eval()
    save_checkpoint(tmp_path / "c", model)
    loaded, _ = load_checkpoint(tmp_path / "c")
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    weights = loaded.state_dict()
    assert weights["model.layers.2.mlp.slots.values"].shape == (4, 12, 8)


def test_autocast_and_bf16(make, rules, ids):
    model = make(ffn=rules["persistent"])
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, labels=ids).loss
    assert 0 < (rounded - exact).abs() < 0.02
    assert 0 < (model.bfloat16()(ids, labels=ids).loss - exact).abs() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 2}, r"ffn\[0\]: num_heads: 2 is not the model's 4; leave it out"),
        ({"include_self": False}, r"ffn\[0\]: include_self: in the decoder a token always sees"),
        ({"num_slots": 0}, r"ffn\[0\]: num_slots: 0 is out of range"),
        ({"slots": 3}, r"ffn\[0\]: PersistentMemoryAttention: unknown argument 'slots'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, rules, arguments, message):
    with pytest.raises(InputError, match=message):
        make(ffn=[rules["rule"]("PersistentMemoryAttention", **arguments)])


def test_backends_that_can_not_are_refused(make, rules, ids):
    message = "attention: '{}' cannot share its softmax .*; sdpa and eager can"
    with pytest.raises(InputError, match=message.format("flex_attention")):
        make(ffn=rules["persistent"], attn_implementation="flex_attention")
    model = make(ffn=rules["persistent"])
    model.config._attn_implementation = "xformers"
    with pytest.raises(InputError, match=message.format("xformers")):
        model(ids)
