"""What a block gives its router: the block written out by hand, and everything that runs blocks."""

import json
from typing import get_args

import pytest
import torch

import moezoo
from moezoo import InputError
from moezoo.analysis.choices import slot_choices
from moezoo.analysis.watching import watch
from moezoo.router_input import RouterInput
from moezoo_models import MoezooConfig
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.checkpoints.export import export
from moezoo_models.inspect.specialization import count_choices
from moezoo_models.inspect.usage import count_usage
from moezoo_models.model.block import TokensSeen

READS = get_args(RouterInput)
READERS = [
    pytest.param(method, id=method.name)
    for method in moezoo.zoo()
    if method.layer.reads_router_input
]
SKEWED = {"score": "sigmoid", "selection_bias": True, "scale": 1.7}
BALANCE = {"load_balancing": 0.3, "z_loss": 0.02, "sequence": 0.1}


def moe(read, layers="all", **arguments):
    options = {"num_experts": 5, "top_k": 2, "d_expert": 16, "activation": "relu", "bias": True}
    options |= {"router": SKEWED, "balance": BALANCE, **arguments}
    rule = {"layers": layers, "class_path": "moezoo.SparseMoE", "init_args": options}
    return rule if read is None else {**rule, "router_input": read}


@pytest.fixture
def build(make):
    """Build a model with no weight at zero or one, and with routers that prefer some experts."""

    def built(read, dtype=torch.float64, **fields):
        fields = {"ffn": [moe(read)], "attention_bias": True, **fields}
        model = make(**fields).to(dtype)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point() and not tensor.any():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            model.model.embed_tokens.weight.mul_(30)
        return model

    return built


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# A block by hand, from weights alone.


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
    angles = torch.arange(length, dtype=torch.float32)[:, None] / 10000.0**exponents
    q, k, v = (x @ state[f"{n}_proj.weight"].T + state[f"{n}_proj.bias"] for n in "qkv")
    answers = []
    for head in range(heads):
        of_q = slice(head * size, (head + 1) * size)
        start = head * groups // heads * size
        of_k = slice(start, start + size)
        scores = turn(q[:, of_q], angles.double()) @ turn(k[:, of_k], angles.double()).T
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        answers.append((scores / size**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v[:, of_k])
    return torch.cat(answers, -1) @ state["o_proj.weight"].T


def mixture(state, x, read, top_k):
    """Route token by token by what is read; return the sum over experts, and the choices."""
    rows, choices = [], []
    for token, asking in zip(x, read, strict=True):
        scores = torch.sigmoid(state["gate.weight"] @ asking)
        ranked = scores.detach() + state["gate.selection_bias"].double()
        chosen = sorted(range(len(scores)), key=lambda e: -float(ranked[e]))[:top_k]
        total = sum(scores[e] for e in chosen)
        row = torch.zeros_like(token)
        for e in chosen:
            inner = state["experts.gate_up_proj"][e] @ token + state["experts.gate_up_bias"][e]
            gate, up = inner.chunk(2)
            answer = state["experts.down_proj"][e] @ (gate.relu() * up)
            row = row + SKEWED["scale"] * scores[e] / total * (
                answer + state["experts.down_bias"][e]
            )
        rows.append(row)
        choices.append(chosen)
    return torch.stack(rows), choices


def plain_block(block, x, read, eps):
    parameters = dict(block.named_parameters()) | dict(block.named_buffers())
    attn = {n.removeprefix("self_attn."): p for n, p in parameters.items()}
    mlp = {n.removeprefix("mlp."): p for n, p in parameters.items()}
    h = x + attention(attn, rms_norm(x, parameters["input_layernorm.weight"], eps), 4, 2)
    normed = rms_norm(h, parameters["post_attention_layernorm.weight"], eps)
    asking = {"ffn_input": normed, "pre_attention": x, "post_attention": h}[read]
    answer, choices = mixture(mlp, normed, asking, 2)
    return h + answer, choices


def run_block(model, x):
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    hidden, ((losses, stats),), _ = model.model.layers[1](
        x,
        attention_mask=None,
        tokens=TokensSeen(x, None, None, None, None),
        rotary=rotary,
        past_key_values=None,
    )
    return hidden, losses, stats


@pytest.mark.parametrize("read", READS)
def test_a_block_is_what_its_equations_say_with_every_gradient(build, read):
    model = build(read).eval()
    block, eps = model.model.layers[1], model.config.rms_norm_eps
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1, 63, 32, generator=generator, dtype=torch.float64) * 2
    direction = torch.randn(1, 63, 32, generator=generator, dtype=torch.float64)
    found = {}
    for name in ("ours", "plain"):
        entering = x.clone().requires_grad_()
        block.zero_grad()
        if name == "ours":
            output, _, stats = run_block(model, entering)
            counts = stats["expert_counts"]
        else:
            rows, choices = plain_block(block, entering[0], read, eps)
            output = rows[None]
            assert counts.tolist() == [sum(c.count(e) for c in choices) for e in range(5)]
            assert 0 in counts or counts.max() > 2 * counts.min()  # skewed
        (output * direction).sum().backward()
        found[name] = {"output": output.detach(), "d x": entering.grad, **gradients(block)}
    assert found["ours"].keys() == found["plain"].keys()
    for name, expected in found["plain"].items():
        assert expected.abs().max() > 0, name
        # Norms and angles are fp32 on both sides, summed in another order.
        torch.testing.assert_close(found["ours"][name], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("read", READS)
def test_the_residual_stream_gets_the_routers_gradient(build, read):
    """Losses of the router alone reach what it reads, and not what it does not read."""
    model = build(read).train()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    losses = run_block(model, x)[1]
    assert losses.keys() == {"load_balancing", "router_z", "sequence_balance"}
    sum(losses.values()).backward()
    block = model.model.layers[1]
    assert x.grad.abs().max() > 0
    assert (block.self_attn.o_proj.weight.grad is None) == (read == "pre_attention")
    assert (block.post_attention_layernorm.weight.grad is None) == (read != "ffn_input")
    assert block.mlp.gate.weight.grad.abs().max() > 0


def chosen(model, ids, layer, **inputs):
    seen = {}

    def see(name, layer, hidden, context):
        seen[name] = slot_choices(layer, hidden, context).indices.sort(-1).values

    with watch({"it": model.model.layers[layer].mlp}, see):
        model(ids, **inputs)
    return seen["it"]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("method", READERS)
def test_only_a_router_before_attention_does_not_hear_of_it(make, ids, method, read):
    # Neurons that are zero by their activation would not show that they were chosen.
    arguments = method.arguments | ({"activation": "gelu"} if method.name == "top_k_ffn" else {})
    rule = {"layers": "all", "class_path": method.layer.__name__, "init_args": arguments}
    model = make(ffn=[{**rule, "router_input": read}], allow_non_causal=True).eval()
    model.model.embed_tokens.weight.data.mul_(30)
    last = len(model.model.layers) - 1
    for parameter in model.model.layers[last].mlp.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    before = chosen(model, ids, last)
    with torch.no_grad():
        projection = model.model.layers[last].self_attn.o_proj.weight
        projection += torch.randn(projection.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(model, ids, last), before) == (read == "pre_attention")


def test_the_default_is_what_was_without_it(make, ids):
    models = [make(ffn=[moe(read)]) for read in (None, "ffn_input")]
    for model in models:
        model(ids, labels=ids).loss.backward()
    one, other = map(gradients, models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert models[0].config.to_dict() == models[1].config.to_dict()
    assert "router_input" not in json.dumps(models[1].config.to_dict())


@pytest.mark.parametrize("read", READS[1:])
def test_padding_changes_nothing(build, ids, read):
    model = build(read).eval()
    padded = torch.cat([torch.full((2, 5), 3), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 12)], dim=1).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(ids)
    beside = model(padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(beside.logits[:, 5:], alone.logits, rtol=1e-9, atol=1e-9)
    for stats, others in zip(alone.ffn_stats, beside.ffn_stats, strict=True):
        assert torch.equal(stats["expert_counts"], others["expert_counts"])


@pytest.mark.parametrize("read", READS[1:])
def test_a_cache_changes_nothing(build, ids, read):
    model = build(read).eval()
    whole, cache, parts = model(ids).logits, None, []
    for piece in ids.split([5, 1, 1, 5], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("read", READS[1:])
@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_recomputed_and_compiled_it_is_the_same(build, ids, read, how):
    model = build(read).train()
    expected = model(ids, labels=ids)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    changed = model
    if how == "recomputed":
        model.activation_checkpointing_enable()
    else:
        changed = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = changed(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    assert wanted.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("read", READS)
def test_a_directory_keeps_it(build, ids, read, tmp_path):
    mixed = [moe(read), {"layers": 0, "class_path": "moezoo.DenseFFN"}]
    model = build(read, torch.float32, ffn=mixed).eval()
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path / "model", model))
    assert [block.router_input for block in loaded.model.layers] == ["ffn_input", read, read]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_dict()["ffn"] == model.config.to_dict()["ffn"]
    described = json.loads((tmp_path / "model" / "config.json").read_text())["ffn"]
    assert [rule.get("router_input") for rule in described] == [
        None if read == "ffn_input" else read,
        None,
    ]


@pytest.mark.parametrize("read", READS)
def test_what_is_inspected_is_what_was_routed(build, read):
    model = build(read, torch.float32).eval()
    tokens = torch.randint(61, (70,), generator=torch.Generator().manual_seed(3))
    stats = [model(window[None]).ffn_stats for window in tokens.split(35)]
    usage = count_usage(model, tokens, sequence_length=35)
    table = count_choices(model, tokens, sequence_length=35)
    for layer in range(3):
        wanted = sum(each[layer]["expert_counts"] for each in stats)
        assert torch.equal(usage.loads[f"layer {layer}"].counts, wanted)
        assert torch.equal(table.counts[f"layer {layer}"].sum(0), wanted)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"class_path": "moezoo.DenseFFN", "router_input": "pre_attention"},
            "ffn[0]: router_input: DenseFFN chooses nothing by a vector, and so has no router to "
            "give 'pre_attention' to; leave it out",
        ),
        (
            {
                "class_path": "moezoo.HashLayer",
                "init_args": {"vocab_size": 61},
                "router_input": "post_attention",
            },
            "ffn[0]: router_input: HashLayer chooses nothing by a vector",
        ),
        (
            {"class_path": "moezoo.PersistentMemoryAttention", "router_input": "pre_attention"},
            "ffn[0]: router_input: PersistentMemoryAttention chooses nothing by a vector",
        ),
        (
            {"class_path": "moezoo.SparseMoE", "router_input": "pre_atention"},
            "ffn[0]: router_input: 'pre_atention' is not known; did you mean 'pre_attention'?",
        ),
        (
            {"class_path": "moezoo.SparseMoE", "router_input": None},
            "ffn[0]: router_input: None is not known",
        ),
        (
            {"class_path": "moezoo.SparseMoE", "router_inputs": "pre_attention"},
            "ffn[0]: unknown key 'router_inputs'; did you mean 'router_input'?",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(rule, said):
    with pytest.raises(InputError) as refused:
        MoezooConfig(ffn=[{"layers": "all", **rule}])
    assert str(refused.value).startswith(said)


def test_foreign_formats_do_not_hold_it(build, tmp_path):
    """Stock mixtures read what their experts read; dense models choose nothing."""
    directory = save_checkpoint(tmp_path / "ours", build("pre_attention", torch.float32))
    with pytest.raises(InputError, match="layer 0 is a SparseMoE; only dense models are stock"):
        export(directory, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    rule = moe("pre_attention")
    with pytest.raises(InputError, match="unknown key 'router_input'"):
        moezoo.FeedForward.from_config(rule, d_model=16)
