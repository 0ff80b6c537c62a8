"""FastFeedForward against its papers: what is mixed, what is read, what is driven where."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moezoo import FastFeedForward, InputError
from moezoo.routing import tree

D = 16


def fff(**arguments) -> FastFeedForward:
    torch.manual_seed(0)
    return FastFeedForward(D, **{"depth": 3, "d_leaf": 5, **arguments}).double()


def tokens(count: int = 64) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def walk(layer: FastFeedForward, x: torch.Tensor) -> tuple[list[int], int]:
    """Go down for one token as the paper says it: the nodes asked, and the leaf."""
    node, asked = 0, []
    while node < layer.tree.num_nodes:
        asked.append(node)
        right = x @ layer.tree.weight[node] + layer.tree.bias[node] >= 0
        node = 2 * node + (2 if right else 1)
    return asked, node - layer.tree.num_nodes


def answer_of(layer: FastFeedForward, leaf: int, x: torch.Tensor) -> torch.Tensor:
    inner = (layer.leaves.gate_up_proj[leaf] @ x + layer.leaves.gate_up_bias[leaf]).relu()
    return layer.leaves.down_proj[leaf] @ inner + layer.leaves.down_bias[leaf]


class RowsRead(TorchDispatchMode):
    """Count the rows that embeddings read of one parameter; refuse any other op on its values."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self.storage, self.rows = parameter.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        ours = [
            a
            for a in args
            if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == self.storage
        ]
        if ours and func is torch.ops.aten.embedding.default:
            self.rows += args[1].numel()
        elif ours:
            view = isinstance(output, torch.Tensor) and (
                output.untyped_storage().data_ptr() == self.storage
            )
            assert view, f"{func} reads the whole parameter"
        return output


@pytest.mark.parametrize("depth", [0, 1, 4, 9])
def test_hard_inference_reads_one_node_per_level(depth):
    layer = fff(depth=depth).eval()
    with torch.no_grad(), RowsRead(layer.tree.weight) as reader:
        layer(tokens(7))
    assert reader.rows == 7 * depth


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_hard_inference_touches_its_path_and_one_leaf_only(depth):
    layer = fff(depth=depth).eval()
    for x in tokens(8):
        expected = layer(x).hidden
        nodes, leaf = walk(layer, x)
        torch.testing.assert_close(expected, answer_of(layer, leaf, x), rtol=0, atol=1e-12)
        poisoned = fff(depth=depth).eval()
        with torch.no_grad():
            for parameter, kept in [
                *((p, nodes) for p in poisoned.tree.parameters()),
                *((p, [leaf]) for p in poisoned.leaves.parameters()),
            ]:
                others = torch.ones(len(parameter), dtype=torch.bool)
                others[kept] = False
                parameter[others] = torch.nan
        assert torch.equal(poisoned(x).hidden, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_without_gradients_is_the_same_function(gated, dtype):
    layer = fff(gated=gated).to(dtype).eval()
    x, mask = tokens().to(dtype), torch.arange(64) % 5 > 0
    with torch.no_grad():
        fast = layer(x, mask=mask)
        slow = layer.double().reference(x.double(), mask=mask)
    assert fast.hidden.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3  # one rounding to bf16
    assert (fast.hidden - slow.hidden).norm() <= tolerance * slow.hidden.norm()
    assert torch.equal(fast.stats["expert_counts"], slow.stats["expert_counts"])


def test_inference_grows_with_depth_and_not_with_width():
    measured = []
    for depth in (2, 4, 8):
        layer = fff(depth=depth).eval()
        with FlopCounterMode(display=False) as counter:
            layer(tokens(10))
        measured.append(counter.get_total_flops() / 10)
        assert measured[-1] == layer.cost().flops_per_token == 2 * depth * D + 4 * D * 5
    assert measured[2] - measured[1] == 2 * (measured[1] - measured[0]) == 8 * D


@pytest.mark.parametrize("master", [0, 6])
@pytest.mark.parametrize("gated", [False, True])
def test_hard_training_equals_inference(master, gated):
    layer = fff(hard=True, d_master=master, gated=gated)
    trained = layer.train()(tokens())
    torch.testing.assert_close(trained.hidden, layer.eval()(tokens()).hidden, rtol=0, atol=1e-12)
    assert "hardening" in trained.losses


def test_hard_decisions_give_nodes_gradient_through_losses_only():
    layer = fff(hard=True, hardening=0.0)
    layer(tokens()).hidden.sum().backward()
    assert layer.tree.weight.grad is None
    layer = fff(hard=True, hardening=1.0)
    layer(tokens()).losses["hardening"].backward()
    assert layer.tree.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("depth", [0, 1, 6])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_leaf_probabilities_sum_to_one(depth, scale):
    logits = scale * torch.randn(50, 2**depth - 1)
    p = tree.leaf_probabilities((-logits).sigmoid(), logits.sigmoid())
    assert p.shape == (50, 2**depth)
    torch.testing.assert_close(p.sum(-1), torch.ones(50), rtol=0, atol=1e-6)


def test_soft_output_is_the_mixture_of_the_leaves():
    layer = fff(depth=2)
    for x in tokens(5):
        c = (layer.tree.weight @ x + layer.tree.bias).sigmoid()
        pi = [(1 - c[0]) * (1 - c[1]), (1 - c[0]) * c[1], c[0] * (1 - c[2]), c[0] * c[2]]
        expected = sum(p * answer_of(layer, leaf, x) for leaf, p in enumerate(pi))
        torch.testing.assert_close(layer(x).hidden, expected, rtol=0, atol=1e-12)


def test_steep_boundaries_turn_soft_into_hard():
    distance = []
    for scale in (1.0, 10.0, 1e8):
        soft, sharp = fff(hard=False, depth=5).eval(), fff(depth=5).eval()
        with torch.no_grad():
            for p, q in zip(soft.tree.parameters(), sharp.tree.parameters(), strict=True):
                p.mul_(scale)
                q.mul_(scale)
        distance.append((soft(tokens()).hidden - sharp(tokens()).hidden).abs().max().item())
    assert distance[0] > distance[1] > 0.01
    assert distance[2] < 1e-9


@pytest.mark.parametrize("leak", [0.0, 0.2, 0.7])
def test_region_leak_swaps_children_as_often_as_told_and_in_training_only(leak):
    layer = fff(depth=1, region_leak=leak, hard=True)
    with torch.no_grad():
        for parameter in layer.leaves.parameters():
            parameter.zero_()
        layer.leaves.down_bias[1] = 1.0
    hidden = tokens(4000)
    went_right = layer.eval()(hidden).hidden[:, 0]
    straight = hidden @ layer.tree.weight[0] + layer.tree.bias[0] >= 0
    assert torch.equal(went_right, straight.double())
    swapped = (layer.train()(hidden).hidden[:, 0] != went_right).double().mean()
    assert abs(swapped - leak) <= 3 * math.sqrt(leak * (1 - leak) / 4000)


def test_soft_evaluation_does_not_leak():
    leaky, plain = fff(region_leak=0.5, hard=False), fff(hard=False)
    assert torch.equal(leaky.eval()(tokens()).hidden, plain.eval()(tokens()).hidden)
    assert not torch.equal(leaky.train()(tokens()).hidden, plain.train()(tokens()).hidden)


def test_every_node_leaks_for_itself():
    layer = fff(depth=2, region_leak=0.5, hard=True)
    reached = layer(tokens(1)[:1].expand(4000, D)).stats["expert_counts"] / 4000
    assert ((reached - 0.25).abs() < 3 * math.sqrt(0.25 * 0.75 / 4000)).all()


def test_leak_mixes_with_swapped_probabilities_and_keeps_the_entropy():
    layer = fff(depth=1, region_leak=1.0, hardening=1.0)
    for x in tokens(3):
        c = (layer.tree.weight[0] @ x + layer.tree.bias[0]).sigmoid()
        expected = c * answer_of(layer, 0, x) + (1 - c) * answer_of(layer, 1, x)
        output = layer(x)
        torch.testing.assert_close(output.hidden, expected, rtol=0, atol=1e-12)
        entropy = -c * c.log() - (1 - c) * (1 - c).log()
        torch.testing.assert_close(output.losses["hardening"], entropy, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("reduction", "share"), [("sum", 1.0), ("per_token", 1 / 64), ("mean", 1 / (64 * 7))]
)
def test_hardening_loss_equals_the_formula(reduction, share):
    layer = fff(hardening=0.3, hardening_reduction=reduction)
    c = (tokens() @ layer.tree.weight.T + layer.tree.bias).sigmoid()
    total = -(c * c.log() + (1 - c) * (1 - c).log()).sum()
    output = layer(tokens())
    torch.testing.assert_close(output.losses["hardening"], 0.3 * share * total, rtol=1e-10, atol=0)
    assert output.stats["node_entropy"].item() == pytest.approx(total.item() / (64 * 7))
    assert layer.eval()(tokens()).losses == {}


def test_entropy_is_exact_where_probabilities_round_to_one():
    logits = torch.tensor([-60.0, -9.0, 0.0, 9.0, 60.0])
    z = logits.double()
    log_c, log_rest = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    exact = -z.sigmoid() * log_c - (-z).sigmoid() * log_rest
    torch.testing.assert_close(tree.bernoulli_entropy(logits).double(), exact, rtol=1e-5, atol=0)


def test_load_balancing_equals_the_formula():
    layer = fff(load_balancing=2.0)
    c = (tokens() @ layer.tree.weight.T + layer.tree.bias).sigmoid()
    f, p = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for t, x in enumerate(tokens()):
        f[walk(layer, x)[1]] += 1 / 64
        for leaf in range(8):
            steps = tree.path(leaf, 3)
            p[leaf] += math.prod(c[t, n] if right else 1 - c[t, n] for n, right in steps) / 64
    output = layer(tokens())
    expected = 2.0 * 8 * (f * p).sum()
    torch.testing.assert_close(output.losses["load_balancing"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.stats["expert_counts"].double() / 64, f)
    assert output.stats["usage"] == (f > 0).double().mean()
    kl = sum(share * math.log(8 * share) for share in f.tolist() if share)
    assert output.stats["unevenness"].item() == pytest.approx(kl, rel=1e-5)


def test_load_balancing_of_a_collapsed_tree_is_the_number_of_leaves():
    layer = fff(load_balancing=1.0)
    with torch.no_grad():
        layer.tree.weight.zero_()
        layer.tree.bias.fill_(-100.0)
    assert layer(tokens()).losses["load_balancing"].item() == pytest.approx(8.0)


def test_losses_of_training_see_no_padding():
    layer = fff(hardening=1.0, hardening_reduction="sum", load_balancing=1.0)
    mask = torch.arange(64) % 3 > 0
    padded = tokens().masked_fill(~mask.unsqueeze(-1), 1e3)
    alone, beside = layer(tokens()[mask]), layer(padded, mask=mask)
    assert alone.losses.keys() == beside.losses.keys() == {"hardening", "load_balancing"}
    for name, loss in alone.losses.items():
        torch.testing.assert_close(beside.losses[name], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(beside.hidden[mask], alone.hidden, rtol=0, atol=1e-12)
    assert not beside.hidden[~mask].any()
    assert torch.equal(beside.stats["expert_counts"], alone.stats["expert_counts"])


@pytest.mark.parametrize("training", [True, False])
def test_depth_zero_is_one_plain_block(training):
    layer = fff(depth=0, load_balancing=1.0).train(training)
    hidden = tokens(6)
    for call in (layer, layer.reference):
        output = call(hidden)
        expected = torch.stack([answer_of(layer, 0, x) for x in hidden])
        torch.testing.assert_close(output.hidden, expected, rtol=0, atol=1e-12)
        assert output.losses.get("hardening", 0.0) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_master_leaf_is_mixed_in_by_a_learned_share(training):
    plain, layer = fff().train(training), fff(d_master=6).train(training)
    assert layer.master_mix == 0.5
    layer.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        layer.master_mix.fill_(-1.3)
    share = 1 / (1 + math.exp(1.3))
    expected = share * plain(tokens()).hidden + (1 - share) * layer.master(tokens()).hidden
    torch.testing.assert_close(layer(tokens()).hidden, expected, rtol=0, atol=1e-12)


def test_router_input_decides_in_place_of_the_hidden_state():
    layer = fff(depth=4).eval()
    hidden, other = tokens(), tokens().flip(0)
    counts = layer(hidden, router_input=other).stats["expert_counts"]
    assert torch.equal(counts, layer(other).stats["expert_counts"])
    found = layer(hidden, router_input=other).hidden[3]
    expected = answer_of(layer, walk(layer, other[3])[1], hidden[3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_option_hard_overrules_the_mode():
    soft, hard, default = fff(hard=False), fff(hard=True), fff()
    assert torch.equal(default(tokens()).hidden, soft(tokens()).hidden)
    assert not torch.equal(default(tokens()).hidden, hard(tokens()).hidden)
    for layer in (soft, hard, default):
        layer.eval()
    assert torch.equal(default(tokens()).hidden, hard(tokens()).hidden)
    assert not torch.equal(default(tokens()).hidden, soft(tokens()).hidden)
    assert "node_entropy" in soft(tokens()).stats
    assert "node_entropy" not in hard(tokens()).stats


@pytest.mark.parametrize("hard", [None, True])
@pytest.mark.parametrize("gated", [False, True])
def test_leaf_dropout_equals_the_reference_with_all_gradients(hard, gated):
    layer = fff(leaf_dropout=0.4, hard=hard, gated=gated, d_master=6)
    parameters = list(layer.parameters())
    found = []
    for call in (layer, layer.reference):
        torch.manual_seed(5)
        output = call(tokens())
        total = output.hidden.square().sum() + sum(output.losses.values())
        found.append([output.hidden, *torch.autograd.grad(total, parameters)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_leaf_dropout_drops_neurons_of_leaves_in_training_only():
    layer, plain = fff(leaf_dropout=1.0), fff()
    probabilities = layer._decide(tokens(), False, False).p_TE
    expected = probabilities @ layer.leaves.down_bias  # all that no neuron says
    torch.testing.assert_close(layer(tokens()).hidden, expected, rtol=0, atol=1e-12)
    assert torch.equal(layer.eval()(tokens()).hidden, plain.eval()(tokens()).hidden)
    layer, hidden = fff(leaf_dropout=0.25), tokens(4000)
    scale = layer._dropout_scale(hidden)
    torch.testing.assert_close(scale.unique(), torch.tensor([0, 4 / 3], dtype=torch.float64))
    share = (scale == 0).double().mean((1, 2))
    assert share.mean().item() == pytest.approx(0.25, abs=3 * (0.1875 / scale.numel()) ** 0.5)
    assert share.std() > 0  # each token has its own


@pytest.mark.parametrize("depth", [0, 2])
def test_the_packages_inference_leaves_the_output_bias_out(depth):
    upstream, layer = (fff(depth=depth, compat=compat) for compat in ("upstream_eval", None))
    hidden = tokens()
    assert torch.equal(upstream(hidden).hidden, layer(hidden).hidden)  # training is not concerned
    upstream.eval()
    for call in (upstream, upstream.reference):
        for x, found in zip(hidden[:9], call(hidden[:9]).hidden, strict=True):
            leaf = walk(layer, x)[1]
            expected = answer_of(layer, leaf, x)
            if depth:  # the package fails at depth 0
                expected = expected - layer.leaves.down_bias[leaf]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert FastFeedForward.from_config(upstream.config()).compat == "upstream_eval"
    upstream.hard = False  # the package has no soft inference
    soft = layer.train()(hidden).hidden
    torch.testing.assert_close(upstream(hidden).hidden, soft, rtol=0, atol=1e-12)


def after_training(hardening: float) -> tuple[float, float, float]:
    """Learn four classes by quadrant; give the nodes' entropy, soft and hard accuracy."""
    torch.manual_seed(0)
    layer = FastFeedForward(
        D, depth=2, d_leaf=4, hardening=hardening, hardening_reduction="per_token"
    ).double()  # in which rounding, another on each processor, grows to nothing in 400 steps
    hidden = torch.randn(512, D, dtype=torch.float64)
    labels = (hidden[:, 0] > 0).long() * 2 + (hidden[:, 1] > 0).long()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(400):
        output = layer(hidden)
        loss = torch.nn.functional.cross_entropy(output.hidden[:, :4], labels)
        optimizer.zero_grad()
        (loss + sum(output.losses.values())).backward()
        optimizer.step()
    soft, hard = (
        (call()(hidden).hidden[:, :4].argmax(-1) == labels).double().mean().item()
        for call in (layer.train, layer.eval)
    )
    return layer.train()(hidden).stats["node_entropy"].item(), soft, hard


def test_hardening_closes_the_gap_between_soft_and_hard():
    entropy, soft, hard = after_training(hardening=3.0)
    assert entropy < 0.1
    assert soft > 0.99
    assert abs(soft - hard) < 0.01
    entropy, soft, hard = after_training(hardening=0.0)
    assert entropy > 0.2
    assert soft - hard > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": -1}, "depth: -1 is out of range"),
        ({"depth": 25}, "depth: 25 is out of range"),
        ({"d_leaf": 0}, "d_leaf: 0 is out of range"),
        ({"region_leak": 1.5}, "region_leak: 1.5 is out of range"),
        ({"hardening_reduction": "means"}, "hardening_reduction: .*did you mean 'mean'"),
        ({"hard": "yes"}, "hard: 'yes' is not known; give true, false or null"),
        ({"leaf_dropout": 1.5}, "leaf_dropout: 1.5 is out of range"),
        ({"compat": "upstream"}, "compat: 'upstream' is not known; .*'upstream_eval'"),
        ({"activation": "rulu"}, "activation: .*did you mean 'relu'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        FastFeedForward(D, **arguments)


def test_default_is_as_wide_as_the_dense_block():
    layer = FastFeedForward(64)
    assert layer.num_experts * layer.d_leaf == 4 * 64
