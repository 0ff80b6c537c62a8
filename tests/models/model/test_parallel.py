"""Blocks that run beside attention: by hand, against blocks that follow it, and exported."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models import MoezooConfig
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.export.stock import export_stock
from moezoo_models.model.block import TokensSeen

BESIDE = ("one_norm", "two_norms")


@pytest.fixture
def build(make, rules):
    """Build a model with biases, none of whose weights is zero or one."""

    def built(parallel, dtype=torch.float64, **fields):
        ffn = [rules["rule"]("DenseFFN", d_ff=24, bias=True)]
        model = make(**{"ffn": ffn, "attention_bias": True, "parallel": parallel, **fields})
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() or "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            model.model.embed_tokens.weight.mul_(30)
        return model.to(dtype).eval()

    return built


def rms_norm(x, weight, eps):
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight * (x.float() * scale).to(x.dtype)  # statistics are fp32 whatever x is


def turn(x, angles):
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def attention(state, x, heads, groups):
    """Attend head by head, ``x (S, D)``."""
    length, width = x.shape
    size = width // heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = (torch.arange(length, dtype=torch.float32)[:, None] / 10000.0**exponents).double()
    q, k, v = (
        (x @ state[f"self_attn.{n}_proj.weight"].T + state[f"self_attn.{n}_proj.bias"])
        for n in "qkv"
    )
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    answers = []
    for head in range(heads):
        of_q = slice(head * size, (head + 1) * size)
        start = head * groups // heads * size
        of_k = slice(start, start + size)
        scores = turn(q[:, of_q], angles) @ turn(k[:, of_k], angles).T / size**0.5
        answers.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, of_k])
    return torch.cat(answers, -1) @ state["self_attn.o_proj.weight"].T


def dense(state, x):
    gate, up = (
        x @ state[f"mlp.{n}.weight"].T + state[f"mlp.{n}.bias"] for n in ("gate_proj", "up_proj")
    )
    return (gate * gate.sigmoid() * up) @ state["mlp.down_proj.weight"].T + state[
        "mlp.down_proj.bias"
    ]


@pytest.mark.parametrize("parallel", BESIDE)
def test_a_block_is_what_its_equation_says_with_every_gradient(build, parallel):
    model = build(parallel)
    block, eps = model.model.layers[1], model.config.rms_norm_eps
    x, direction = torch.randn(2, 1, 31, 32, dtype=torch.float64, generator=torch.Generator())
    found = {}
    for name in ("ours", "plain"):
        entering = x.clone().requires_grad_()
        block.zero_grad()
        if name == "ours":
            rotary = model.model.rotary_emb(entering, torch.arange(31)[None])
            tokens = TokensSeen(entering, *[None] * 4)
            options = {"attention_mask": None, "past_key_values": None, "tokens": tokens}
            output = block(entering, rotary=rotary, **options)[0]
        else:
            state, h = dict(block.named_parameters()), entering[0]
            first = rms_norm(h, state["input_layernorm.weight"], eps)
            second = first
            if parallel == "two_norms":
                second = rms_norm(h, state["post_attention_layernorm.weight"], eps)
            output = (h + attention(state, first, 4, 2) + dense(state, second))[None]
        (output * direction).sum().backward()
        grads = {key: p.grad.clone() for key, p in block.named_parameters()}
        found[name] = {"output": output.detach(), "d x": entering.grad, **grads}
    assert found["ours"].keys() == found["plain"].keys()
    assert ("post_attention_layernorm.weight" in found["ours"]) == (parallel == "two_norms")
    for name, expected in found["plain"].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found["ours"][name], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("parallel", BESIDE)
def test_without_attentions_answer_it_is_the_serial_model(build, ids, parallel):
    beside, serial = build(parallel), build("none")
    state = beside.state_dict()
    for name in serial.state_dict():
        state.setdefault(name, state.get(name.replace("post_attention", "input")))
    serial.load_state_dict(state)
    assert not torch.allclose(beside(ids).logits, serial(ids).logits, rtol=1e-3)
    with torch.no_grad():
        for model in (beside, serial):
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
    torch.testing.assert_close(beside(ids).logits, serial(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parallel", BESIDE)
def test_it_costs_as_much_and_a_cache_changes_nothing(build, ids, parallel):
    flops = []
    for each in (parallel, "none"):
        with FlopCounterMode(display=False) as counter:
            build(each, torch.float32)(ids)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    model = build(parallel)
    whole, cache, parts = model(ids).logits, None, []
    for piece in ids.split([5, 1, 1, 5], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parallel", [*BESIDE, "none"])
def test_stablelm_holds_those_with_one_norm(build, rules, ids, parallel, tmp_path):
    ffn = [rules["rule"]("DenseFFN", d_ff=24)]
    model = build(parallel, torch.float32, norm="layer", ffn=ffn, attention_bias=True)
    source = save_checkpoint(tmp_path / "ours", model, None)
    if parallel == "two_norms":
        with pytest.raises(InputError, match=r"parallel two_norms.*has one_norm, norm layer"):
            export_stock(source, tmp_path / "stock")
        assert not (tmp_path / "stock").exists()
        return
    export_stock(source, tmp_path / "stock")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert theirs.config.model_type == "stablelm"
    expected = model(ids).logits
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    again = load_checkpoint(tmp_path / "stock")[0]
    assert again.config.parallel == parallel
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-6, atol=1e-6)
    if parallel == "one_norm":
        with pytest.raises(InputError, match="use_parallel_residual: what is converted reads"):
            upcycle(tmp_path / "stock", tmp_path / "mixture", experts=2)


def test_no_stock_mixture_has_them(build, rules, tmp_path):
    model = build("one_norm", torch.float32, ffn=rules["moe"], attention_bias=False)
    save_checkpoint(tmp_path / "ours", model, None)
    with pytest.raises(InputError, match="its parallel is in no stock format"):
        export_stock(tmp_path / "ours", tmp_path / "stock")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": "both"}, "parallel: 'both' is not known"),
        ({"parallel": 1}, "parallel: 1 is not text"),
        ({"parallel": "one_norm", "norm_placement": "post"}, "parallel: one_norm has norms before"),
        (
            {
                "parallel": "two_norms",
                "ffn": [
                    {
                        "layers": "all",
                        "class_path": "moezoo.SparseMoE",
                        "router_input": "post_attention",
                    }
                ],
            },
            r"ffn\[0\]: router_input: post_attention comes after attention",
        ),
    ],
)
def test_what_contradicts_it_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        MoezooConfig(**fields)
