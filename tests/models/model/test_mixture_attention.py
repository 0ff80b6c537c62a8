"""Attention by a mixture's experts (UMoE): by hand, with a cache, and as a mixture of itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moezoo import InputError
from moezoo_models import MoezooConfig
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.export.standalone.export import export_with_code
from moezoo_models.export.stock import export_stock
from moezoo_models.inspect.blocks import measure_blocks
from moezoo_models.model.attention import Attention

OPTIONS = {"top_k": 2, "rank": 3, "balance": 0.3}


def moe(layers="all", **arguments):
    options = {"num_experts": 5, "top_k": 2, "d_expert": 12, "bias": True, **arguments}
    return {"layers": layers, "class_path": "moezoo.SparseMoE", "init_args": options}


@pytest.fixture
def build(make):
    def built(dtype=torch.float64, **fields):
        fields = {"ffn": [moe()], "attention_experts": OPTIONS, "attention_bias": True, **fields}
        model = make(**fields)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() or "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
                if name.endswith("gate.weight"):
                    parameter.mul_(5)
            model.model.embed_tokens.weight.mul_(30)
        return model.to(dtype).eval()

    return built


def turn(x, angles):
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def by_hand(attention, experts, x):
    """Return the answers to ``x (S, D)``, token by token and expert by expert, and the choices."""
    state = dict(attention.named_parameters())
    width = attention.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    places = torch.arange(len(x), dtype=torch.float32)[:, None]
    angles = (places / 10000.0**exponents).to(x.dtype)
    keys = turn(x @ state["k_proj.weight"].T + state["k_proj.bias"], angles)
    rows, choices = [], []
    for t, token in enumerate(x):
        scores = (state["gate.weight"] @ token).softmax(-1)
        ranks = scores.tolist()
        chosen = sorted(range(len(scores)), key=lambda e: -ranks[e])[: OPTIONS["top_k"]]
        row = torch.zeros_like(token)
        for e in chosen:
            query = state["q_proj.weight"] @ token + state["q_proj.bias"]
            query = query + state["query_up"][e] @ (state["query_down"][e] @ token)
            weights = (keys[: t + 1] @ turn(query, angles[t]) / width**0.5).softmax(-1)
            z = (weights[:, None] * x[: t + 1]).sum(0)
            gate, up = (experts.gate_up_proj[e] @ z + experts.gate_up_bias[e]).chunk(2)
            answer = experts.down_proj[e] @ (gate * gate.sigmoid() * up) + experts.down_bias[e]
            row = row + scores[e] * answer
        rows.append(row)
        choices.append(chosen)
    return torch.stack(rows), choices


def test_it_is_what_its_equations_say_with_every_gradient(build):
    model = build()
    block = model.model.layers[1]
    attention, experts = block.self_attn, block.mlp.experts
    x, direction = torch.randn(2, 1, 19, 32, dtype=torch.float64, generator=torch.Generator())
    found, leaves = {}, {**dict(attention.named_parameters()), **dict(experts.named_parameters())}
    for name in ("ours", "plain"):
        entering = x.clone().requires_grad_()
        block.zero_grad()
        if name == "ours":
            rotary = model.model.rotary_emb(entering, torch.arange(19)[None])
            output = attention(entering, rotary, None, experts=experts)[0]
        else:
            rows, choices = by_hand(attention, experts, entering[0])
            output = rows[None]
        (output * direction).sum().backward()
        found[name] = {"output": output.detach(), "d x": entering.grad}
        found[name] |= {key: p.grad.clone() for key, p in leaves.items()}
    counts = [sum(c.count(e) for c in choices) for e in range(5)]
    assert max(counts) > 2 * min(counts)  # skewed
    for name, expected in found["plain"].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found["ours"][name], expected, rtol=1e-6, atol=2e-6)


def test_tokens_that_see_themselves_alone_make_it_a_mixture(build):
    block = build().model.layers[0]
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    alone = torch.eye(9, dtype=torch.bool)[None, None].expand(2, 1, 9, 9)
    experts = block.mlp.experts
    found = block.self_attn(x, None, alone, experts=experts)[0]
    routing = block.self_attn.gate(x.flatten(0, 1))
    expected = experts.reference(x.flatten(0, 1), routing.indices, routing.weights)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}, {"parallel": "one_norm"}], ids=str)
def test_a_cache_and_padding_change_nothing(build, ids, fields, attention):
    model = build(**fields)
    model.set_attn_implementation(attention)
    whole, cache, parts = model(ids).logits, None, []
    for piece in ids.split([5, 1, 1, 5], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    # The eager backend takes its softmax in fp32.
    tolerance = 1e-9 if attention == "sdpa" else 1e-6
    close = {"rtol": tolerance, "atol": tolerance * float(whole.detach().abs().max())}
    torch.testing.assert_close(torch.cat(parts, 1), whole, **close)
    assert cache.layers[0].values.shape[1::2] == (1, 32)  # one hidden state of each token
    padded = torch.cat([torch.full((2, 5), 3), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 12)], dim=1).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    beside = model(padded, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(beside[:, 5:], whole, **close)


def test_texts_losses_files_and_what_has_no_place_for_it(build, ids, tmp_path):
    model = build(torch.float32, ffn=[moe(), {"layers": 1, "class_path": "moezoo.DenseFFN"}])
    assert type(model.model.layers[1].self_attn) is Attention
    assert ineligible(model) == "its attention_experts is not a Llama's"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **options)
    assert torch.equal(written, model.generate(ids, use_cache=False, **options))
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    assert output.aux_losses["attention_sequence_balance"] > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    found = measure_blocks(model.eval(), ids[0])
    assert all(block.attention > 0 for block in found.blocks)
    source = save_checkpoint(tmp_path / "model", model, None)
    again = load_checkpoint(source)[0]
    assert again.config.attention_experts == {"normalize": False, **OPTIONS}
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="attention_experts"):
        export_stock(source, tmp_path / "stock")
    with pytest.raises(InputError, match=r"with_code: attention by experts"):
        export_with_code(source, tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_its_products_are_counted(build):
    throughput = pytest.importorskip("moezoo_train.measure.throughput")
    model = build(torch.float32)
    ids = torch.randint(61, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    counted = throughput.forward_flops_per_token(model, 16) * 32
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-6)
    total, active = throughput.count_parameters(model)
    per_expert = 3 * 12 * 32 + 2 * 12 + 32
    own = 3 * (32 + 8)
    assert total - active == 3 * ((5 - 2 - 2) * per_expert + (5 - 2) * own)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_experts": {"top_k": 6}}, "attention_experts.top_k: 6 is out of range"),
        ({"attention_experts": {"ranks": 6}}, "attention_experts: .*ranks"),
        ({"attention_experts": {"rank": 0}}, "attention_experts.rank: 0 is out of range"),
        ({"attention_experts": 3}, "attention_experts: 3 is not a mapping"),
        ({"ffn": None}, "attention_experts: no layer has experts to share"),
        ({"ffn": [moe(d_latent=8)]}, "attention_experts: attention shares experts of full width"),
        ({"qk_norm": True}, "attention_experts: its queries have no norms"),
    ],
)
def test_what_does_not_fit_is_refused(make, fields, message):
    with pytest.raises(InputError, match=message):
        make(**{"ffn": [moe()], "attention_experts": OPTIONS, **fields})
    assert MoezooConfig().attention_experts is None
