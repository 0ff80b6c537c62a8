"""PEER against its paper: retrieval, the MLP it stands for, usage, memory, and mistakes."""

import pytest
import torch

import moezoo
from moezoo import PEER, InputError
from moezoo.feed_forward import FeedForward

D = 16


def peer(seed=0, **arguments) -> PEER:
    torch.manual_seed(seed)
    layer = PEER(D, **{"num_experts": 64, "num_heads": 3, "top_k": 4, **arguments}).double()
    if layer.query.shift is not None:
        torch.nn.init.normal_(layer.query.shift, std=0.1)
    return layer


def tokens(count=50, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def scores_of_every_key(layer: PEER, head: int, query: torch.Tensor) -> torch.Tensor:
    """Write out the n² keys of one head and compare a query with each: (N,)."""
    first, second = layer.keys.keys[0 if layer.share_keys else head]
    whole = [torch.cat([row, column]) for row in first for column in second]
    return torch.stack(whole) @ query


@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("share_keys", [True, False])
def test_retrieval_is_exact_in_every_head(top_k, share_keys):
    layer = peer(top_k=top_k, share_keys=share_keys)
    hidden = tokens(340)  # times three heads: about a thousand queries
    queries = layer.query(hidden)
    experts, weights = layer.route(hidden)
    for head in range(3):
        keys = torch.stack(
            [scores_of_every_key(layer, head, unit) for unit in torch.eye(layer.d_key).double()]
        )
        scores = queries[:, head] @ keys
        best = scores.topk(top_k)
        assert torch.equal(experts[:, head], best.indices)
        torch.testing.assert_close(
            weights[:, head], best.values.softmax(-1), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize(
    ("score_fn", "expected"),
    [
        ("softmax", lambda s: s.exp() / s.exp().sum(-1, keepdim=True)),
        ("sigmoid", lambda s: 1 / (1 + (-s).exp())),
        ("relu", lambda s: s.clamp(min=0)),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_output_equals_algorithm_1_expert_by_expert(score_fn, expected, gated):
    layer = peer(score_fn=score_fn, gated=gated, activation="relu").eval()
    hidden = tokens(5)
    queries = layer.query(hidden)
    output = torch.zeros_like(hidden)
    e = layer.experts
    for t, x in enumerate(hidden):
        for head in range(3):
            best = scores_of_every_key(layer, head, queries[t, head]).topk(4)
            for g, i in zip(expected(best.values), best.indices, strict=True):
                inner = (e.u[i] @ x).clamp(min=0)
                if gated:
                    inner = (e.gate[i] @ x).clamp(min=0) * (e.u[i] @ x)
                output[t] += g * inner * e.v[i]
    torch.testing.assert_close(layer(hidden).hidden, output, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_per_head_is_an_mlp_with_a_neuron_per_head(gated):
    """Equation 8: with k = 1 the softmax is 1, and the heads' experts are an MLP's neurons."""
    layer = peer(top_k=1, num_heads=5, gated=gated, activation="silu").eval()
    for x in tokens(7):
        chosen = layer.route(x)[0].flatten()
        mlp = moezoo.DenseFFN(D, d_ff=5, activation="silu", gated=gated).double()
        with torch.no_grad():
            mlp.up_proj.weight.copy_(layer.experts.u[chosen])
            mlp.down_proj.weight.copy_(layer.experts.v[chosen].T)
            if gated:
                mlp.gate_proj.weight.copy_(layer.experts.gate[chosen])
        torch.testing.assert_close(layer(x).hidden, mlp(x).hidden, rtol=1e-12, atol=1e-14)


def test_every_token_is_answered_by_all_its_experts():
    """h k of them: one public default silently keeps the best of each head."""
    layer = PEER(D)
    assert (layer.num_heads, layer.top_k) == (8, 16)
    experts, weights = layer.route(torch.randn(9, D))
    assert experts.shape == weights.shape == (9, 8, 16)
    assert (weights > 0).all()
    for heads in experts:
        for head in heads:
            assert head.unique().numel() == 16
    stats = layer(torch.randn(9, D)).stats
    assert stats["expert_counts"].sum() == 9 * 8 * 16


def test_renaming_experts_along_rows_and_columns_of_the_grid_changes_nothing():
    layer = peer(gated=True).eval()
    before = layer(tokens()).hidden
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.randperm(8, generator=generator) for _ in range(2))
    new = (rows.unsqueeze(1) * 8 + columns).flatten()
    with torch.no_grad():
        keys = layer.keys.keys
        keys.copy_(torch.stack([keys[:, 0, rows], keys[:, 1, columns]], dim=1))
        for table in layer.experts.parameters():
            table.copy_(table[new].clone())
    torch.testing.assert_close(layer(tokens()).hidden, before, rtol=0, atol=1e-13)
    with torch.no_grad():  # half of the renaming is another function
        keys.copy_(torch.stack([keys[:, 0, rows.argsort()], keys[:, 1]], dim=1))
    assert (layer(tokens()).hidden - before).abs().max() > 1e-3


def test_an_expert_that_several_heads_choose_answers_for_each():
    one = peer(num_heads=1)
    three = peer(num_heads=3)
    state = one.state_dict()
    for name in state:
        if name.startswith("query."):
            state[name] = torch.cat([state[name]] * 3)
    three.load_state_dict(state)
    hidden = tokens()
    single, triple = one(hidden), three(hidden)
    torch.testing.assert_close(triple.hidden, 3 * single.hidden, rtol=1e-12, atol=1e-13)
    for layer, output in ((one, single), (three, triple)):
        output.hidden.square().sum().backward()
        assert torch.equal(output.stats["expert_counts"] > 0, layer.experts.v.grad.any(dim=-1))
    torch.testing.assert_close(three.experts.v.grad, 9 * one.experts.v.grad)


@pytest.mark.parametrize("norm", ["batch", "layer", "qk"])
def test_random_queries_use_nearly_all_experts(norm):
    torch.manual_seed(0)
    layer = PEER(32, num_experts=64**2, query_norm=norm)
    stats = layer(torch.randn(4096, 32)).stats
    assert stats["usage"] >= 0.95
    assert 0 < stats["unevenness"] < 0.6


def test_batch_norm_spreads_a_stream_that_is_not_centred():
    """As in the paper, usage rises and unevenness falls with query batch normalisation."""
    hidden = 0.3 * torch.randn(2048, 32) + 2 * torch.randn(32)
    found = {}
    for norm in ("none", "batch"):
        torch.manual_seed(0)
        layer = PEER(32, num_experts=32**2, num_heads=4, top_k=4, query_norm=norm)
        found[norm] = layer(hidden).stats
    assert found["batch"]["usage"] > found["none"]["usage"] + 0.2
    assert found["batch"]["unevenness"] < found["none"]["unevenness"] - 0.5


def test_statistics_are_those_of_the_weights():
    layer = peer().eval()
    hidden = tokens()
    mask = torch.rand(50) < 0.7
    experts, weights = layer.route(hidden)
    mass = torch.zeros(64, dtype=torch.float64)
    counts = torch.zeros(64, dtype=torch.int64)
    for t in mask.nonzero().flatten():
        for i, g in zip(experts[t].flatten(), weights[t].flatten(), strict=True):
            mass[i] += g
            counts[i] += 1
    share = mass / mass.sum()
    divergence = sum(p * (p * 64).log() for p in share if p)
    stats = layer(hidden, mask=mask).stats
    assert torch.equal(stats["expert_counts"], counts)
    assert stats["tokens"] == mask.sum()
    torch.testing.assert_close(stats["usage"].double(), (counts > 0).double().mean())
    torch.testing.assert_close(stats["unevenness"].double(), divergence, rtol=1e-5, atol=1e-6)
    assert "expert_counts" not in PEER(D, num_experts=65**2)(torch.randn(3, D)).stats


def test_router_input_asks_and_hidden_is_answered():
    layer = peer().eval()
    hidden, asked = tokens(), tokens(seed=5)
    experts, weights = layer.route(asked)
    assert all(map(torch.equal, layer.route(hidden, asked), (experts, weights)))
    expected = layer.experts.reference(hidden, experts.flatten(1), weights.flatten(1))
    for call in (layer, layer.reference):
        found = call(hidden, router_input=asked).hidden
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(InputError, match=r"router_input: shape \(50, 17\) does not match hidden's"):
        layer(hidden, router_input=torch.randn(50, 17))


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "qk", "none"])
@pytest.mark.parametrize("share_keys", [True, False])
def test_every_option_equals_the_reference(score_fn, query_norm, share_keys):
    options = {"score_fn": score_fn, "query_norm": query_norm, "share_keys": share_keys}
    layer = peer(gated=True, activation="gelu_tanh", **options)
    again = FeedForward.from_config(layer.config()).double()
    again.load_state_dict(layer.state_dict())
    hidden, mask = tokens(), torch.rand(50) < 0.8
    found = []
    for module, call in ((layer, layer.forward), (again, again.reference)):
        x = hidden.clone().requires_grad_()
        output = call(x, mask=mask).hidden
        (output * tokens(seed=2)).sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in module.parameters())])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).abs().max() <= 1e-10 * slow.abs().max()
    assert (found[0][0][~mask] == 0).all()


def test_training_keeps_no_gathered_rows():
    layer = PEER(64, num_experts=32**2, num_heads=4, top_k=16, query_norm="layer")
    hidden = torch.randn(256, 64, requires_grad=True)
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = layer(hidden).hidden
    gathered = 256 * 4 * 16 * 64 * 4
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert output.requires_grad
    assert max(saved.values()) < gathered / 8
    assert sum(saved.values()) - held < gathered / 2


def test_initial_scale_is_the_documented_one():
    torch.manual_seed(0)
    layer = PEER(64, num_experts=64**2, num_heads=4, top_k=8, gated=True)
    layer.reset_parameters(num_layers=6)
    e = layer.experts
    torch.testing.assert_close(e.u.std().item(), 64**-0.5, rtol=0.01, atol=0)
    torch.testing.assert_close(e.gate.std().item(), 64**-0.5, rtol=0.01, atol=0)
    torch.testing.assert_close(e.v.std().item(), (2 * 6 * 4 * 8) ** -0.5, rtol=0.01, atol=0)


def test_default_sizes_follow_the_width():
    sizes = {}
    for width in (6, 24, 512, 4096, 8192):
        with torch.device("meta"):
            layer = PEER(width)
        sizes[width] = (layer.num_experts, layer.d_key)
    assert sizes == {
        6: (16**2, 2),
        24: (16**2, 12),
        512: (128**2, 256),
        4096: (1024**2, 2048),
        8192: (1024**2, 4096),
    }


def test_a_million_experts_cost_what_the_paper_says():
    with torch.device("meta"):
        layer = PEER(1024, num_experts=1024**2, d_key=512)
    cost = layer.cost()
    n, d, hk, keys, queries = 1024**2, 1024, 128, 1024 * 512, 1024 * 8 * 512
    norm = 2 * 8 * 512
    assert cost.total_parameters == 2 * n * d + keys + queries + norm
    assert cost.active_parameters == 2 * hk * d + keys + queries + norm
    assert cost.flops_per_token == 2 * queries + 2 * 8 * keys + 4 * hk * d


def test_a_store_smaller_than_its_choices_is_active_once():
    cost = PEER(D, num_experts=16, num_heads=8, top_k=4).cost()
    assert cost.active_parameters == cost.total_parameters


def test_experts_are_spared_decay_and_schedule():
    layer = PEER(D, gated=True, sparse=True, expert_lr_multiplier=4.0)
    groups = {group.name: group for group in layer.parameter_groups()}
    experts = groups["experts"]
    assert {id(p) for p in experts.parameters} == {id(p) for p in layer.experts.parameters()}
    assert (experts.weight_decay, experts.schedule, experts.sparse) == (False, False, True)
    assert experts.lr_multiplier == 4.0
    assert groups["matrices"].weight_decay
    assert not groups["matrices"].sparse


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    # In fp64, so that no rounding, another on each processor, grows in 150 steps.
    layer = PEER(D, num_experts=256, num_heads=4, top_k=4).double()
    target = moezoo.DenseFFN(D).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        x = torch.randn(128, D, dtype=torch.float64)
        loss = (layer(x).hidden - target(x).hidden.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1000}, r"num_experts: 1000 is not a square; .* 961 \(31²\) and 1024"),
        ({"num_experts": 0}, r"num_experts: 0 is out of range"),
        ({"num_experts": 64, "top_k": 9}, r"top_k: 9 is more than 8, the side of num_experts=64"),
        ({"score_fn": "softmin"}, r"score_fn: 'softmin' is not known; did you mean 'softmax'"),
        ({"query_norm": "bach"}, r"query_norm: 'bach' is not known; did you mean 'batch'"),
        ({"activation": "gelo"}, r"activation: 'gelo' is not known; did you mean 'gelu'"),
        ({"d_key": 7}, r"d_key: 7 is odd"),
        ({"expert_lr_multiplier": -1}, r"expert_lr_multiplier: -1 is out of range"),
        ({"num_heads": 0}, r"num_heads: 0 is out of range"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        PEER(D, **arguments)
