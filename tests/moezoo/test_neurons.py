"""Neurons of every layer: they add up to its output; planted sparsity; pictures."""

import pytest
import torch

import moezoo
from moezoo.analysis.curves import draw_sparsity, ranked
from moezoo.analysis.neurons import neurons_of
from moezoo.analysis.sparsity import SparsityCounter

D = 32
WITHOUT = (
    moezoo.Engram,
    moezoo.Finedeep,
    moezoo.L3,
    moezoo.MoLE,
    moezoo.PerLayerEmbedding,
    moezoo.PersistentMemoryAttention,
    moezoo.STEM,
)
VARIANTS = {method.name: method.build for method in moezoo.zoo() if method.layer not in WITHOUT} | {
    "biased": lambda d: moezoo.DenseFFN(d, d_ff=7, bias=True),
    "statistical": lambda d: moezoo.TopKFFN(d, d_ff=40, top_k=5, selection="statistical"),
    "shared gate": lambda d: moezoo.SparseMoE(
        d, num_experts=3, top_k=2, d_expert=5, num_shared_experts=2, shared_gate=True
    ),
    "weighed inputs": lambda d: moezoo.SparseMoE(
        d,
        num_experts=3,
        top_k=2,
        d_expert=5,
        router=moezoo.RouterOptions(weights=moezoo.WeightOptions(apply_to="input")),
    ),
    "weighed shared": lambda d: moezoo.SparseMoE(
        d,
        num_experts=3,
        top_k=2,
        d_expert=5,
        num_shared_experts=2,
        router=moezoo.RouterOptions(
            score="sigmoid", weights=moezoo.WeightOptions(with_shared=True, expert_scale=True)
        ),
    ),
    "latent": lambda d: moezoo.SparseMoE(
        d, num_experts=3, top_k=2, d_expert=5, d_latent=9, num_shared_experts=1
    ),
    "norms": lambda d: moezoo.SparseMoE(
        d,
        num_experts=3,
        d_expert=5,
        d_latent=9,
        expert_norms=moezoo.ExpertNormOptions(input=True, output=True),
    ),
    "rows in turn": lambda d: moezoo.SparseMoE(d, num_experts=3, d_expert=5, interleaved=True),
    "bounded gates": lambda d: moezoo.SparseMoE(
        d,
        num_experts=3,
        d_expert=5,
        num_shared_experts=1,
        glu=moezoo.GLUOptions(limit=0.5, up_shift=1.0),
    ),
    "identity": lambda d: moezoo.SparseMoE(d, num_experts=3, d_expert=5, num_identity_experts=2),
    "skip": lambda d: moezoo.SparseMoE(d, num_experts=3, d_expert=5, num_skip_experts=2),
    "carved": lambda d: moezoo.CarvedMoE(d, num_experts=4, top_k=2, d_expert=6, bias=True),
    "soft tree": lambda d: moezoo.FastFeedForward(d, depth=2, d_leaf=5, hard=False, d_master=3),
    "gated PEER": lambda d: moezoo.PEER(
        d, num_experts=25, num_heads=2, top_k=3, gated=True, query_norm="none"
    ),
    "narrow values": lambda d: moezoo.ProductKeyMemory(
        d, num_keys=6, num_heads=2, top_k=3, v_dim=5
    ),
    "narrow gated values": lambda d: moezoo.MemoryPlus(
        d, num_keys=6, num_heads=2, top_k=3, v_dim=5
    ),
    "norm after the sum": lambda d: moezoo.HashLayer(
        d, num_experts=3, d_expert=5, activation="relu", gated=False, compat="parlai"
    ),
    "trees": lambda d: moezoo.UltraFastFFF(d, num_trees=3, depth=2),
}


def output_biases(layer, hidden, context):
    """Return what a layer adds that no neuron writes."""
    total = torch.zeros(hidden.shape[-1], dtype=hidden.dtype)
    if isinstance(layer, moezoo.DenseFFN) and layer.bias:
        total = layer.down_proj.bias
    if isinstance(layer, moezoo.SparseMoE) and layer.num_identity_experts:
        routing = layer.route(hidden, context.get("router_input"), context.get("mask"))
        of_identity = routing.weights * (routing.indices >= layer.num_experts)
        total = of_identity.sum(-1).unflatten(0, hidden.shape[:-1]).unsqueeze(-1) * hidden
    if isinstance(layer, moezoo.FastFeedForward):
        silent = torch.zeros_like(hidden)
        with torch.no_grad():
            copied = moezoo.FeedForward.from_config(layer.config()).to(hidden.dtype).eval()
            copied.load_state_dict(layer.state_dict())
            copied.leaves.down_proj.zero_()
            if layer.d_master:
                copied.master.down_proj.weight.zero_()
        total = copied(hidden + silent, **context).hidden
    return total


@pytest.mark.parametrize("routed_apart", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_coefficients_times_values_are_the_layers_output(name, routed_apart):
    torch.manual_seed(0)
    layer = VARIANTS[name](D).double().eval()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if parameter.ndim < 2 or "bias" in key:
                parameter.normal_()
    hidden = torch.randn(2, 9, D, dtype=torch.float64)
    context = {"token_ids": torch.randint(100, (2, 9)), "mask": torch.ones(2, 9, dtype=torch.bool)}
    context["mask"][1, 6:] = False
    if routed_apart:
        context["router_input"] = torch.randn_like(hidden)
    if isinstance(layer, moezoo.SparseMoE) and layer.capacity is not None:
        layer.capacity = layer.gate.capacity = None  # coefficients are those before any limit
    with torch.no_grad():
        wanted = layer(hidden, **context).hidden - output_biases(layer, hidden, context)
        found = torch.zeros(18, D, dtype=torch.float64)
        for neurons in neurons_of(layer):
            for block in neurons.read(hidden, context):
                coefficients = block.activations * block.weights
                if block.neurons.ndim == 1:
                    found[block.rows] += coefficients @ neurons.values(block.neurons)
                else:
                    # Heads may choose the same neuron, which is there once.
                    real = block.neurons >= 0
                    assert all(
                        len(row[row >= 0].unique()) == (row >= 0).sum() for row in block.neurons
                    )
                    coefficients = coefficients.masked_fill(~real, 0.0)
                    tokens = hidden.flatten(0, 1)[block.rows]
                    tokens = tokens.repeat_interleave(block.neurons.shape[1], dim=0)
                    values = neurons.values(block.neurons.clamp(min=0).flatten(), tokens)
                    values = values.unflatten(0, block.neurons.shape)
                    found[block.rows] += torch.einsum("rj,rjd->rd", coefficients, values)
    if isinstance(layer, moezoo.HashLayer) and layer.norm is not None:  # follows the sum
        found = layer.norm(hidden.flatten(0, 1) + found) * context["mask"].reshape(-1, 1)
    real = context["mask"].flatten()
    torch.testing.assert_close(found[real], wanted.reshape(18, D)[real], rtol=1e-6, atol=1e-8)
    assert (found[~real] == 0).all()


def test_without_tokens_values_of_memory_plus_are_only_projected():
    layer = moezoo.MemoryPlus(D, num_keys=4, num_heads=1, top_k=2, v_dim=6).eval()
    (neurons,) = neurons_of(layer)
    (block,) = neurons.read(torch.randn(5, D), {})
    assert block.activations.sum(-1).tolist() == pytest.approx([1.0] * 5)
    wanted = layer.memory.values.weight[[3, 0]] @ layer.out_proj.weight.t()
    torch.testing.assert_close(neurons.values(torch.tensor([3, 0])), wanted)
    assert neurons.label(7) == "value 7"


def test_a_layer_whose_neurons_are_not_known_is_named():
    with pytest.raises(moezoo.InputError, match="neurons of PersistentMemoryAttention"):
        neurons_of(moezoo.PersistentMemoryAttention(D))


def count(layer, hidden, threshold=0.01, **context):
    (neurons,) = neurons_of(layer)
    counter = SparsityCounter(neurons.number, threshold)
    with torch.no_grad():
        counter.add(neurons.read(hidden, context), int(context.get("mask", hidden[..., 0]).numel()))
    return counter


def test_planted_neurons_fire_as_planted():
    layer = moezoo.DenseFFN(4, d_ff=6, activation="relu", gated=False)
    with torch.no_grad():
        layer.up_proj.weight.zero_()
        layer.up_proj.weight[:4] = torch.eye(4)
    # Neuron 0 fires for every token, 1 for half of them but weakly for one, 2 once, the rest never.
    hidden = torch.tensor([[2.0, 1, 0, 0], [2, 0, 0, -3], [2, 0.1, 2, 0], [2, 0, 0, -1]])
    counter = count(layer, hidden, threshold=0.1)
    assert counter.nonzero.tolist() == [4, 2, 1, 0, 0, 0]
    assert counter.strong.tolist() == [4, 1, 1, 0, 0, 0]
    summary = counter.summary()
    assert (summary.neurons, summary.tokens, summary.computed) == (6, 4, 1.0)
    assert summary.nonzero == pytest.approx(7 / 24)
    assert summary.strong == pytest.approx(6 / 24)
    ratios = [9 / 5, 1, 4.1**2 / 8.01, 1]
    assert summary.effective == pytest.approx(sum(ratios) / 24, rel=1e-6)
    assert summary.dead == pytest.approx(3 / 6)
    assert (summary.frequency_50, summary.frequency_most) == (0.0, 1.0)
    assert summary.gini == pytest.approx((0 + 0 + 0 + 1 + 3 + 20) / 36)


@pytest.mark.parametrize(
    ("layer", "computed"),
    [
        (moezoo.SparseMoE(D, num_experts=8, top_k=2, d_expert=5), 2 / 8),
        (moezoo.PEER(D, num_experts=64, num_heads=1, top_k=4), 4 / 64),
        (moezoo.UltraFastFFF(D, depth=3), 4 / 15),
        (moezoo.TopKFFN(D, d_ff=40, top_k=10), 1.0),
    ],
)
def test_what_is_computed_is_known_beforehand(layer, computed):
    summary = count(layer.eval(), torch.randn(50, D)).summary()
    assert summary.computed == pytest.approx(computed)
    assert summary.strong <= summary.nonzero <= computed
    if isinstance(layer, moezoo.TopKFFN):
        assert summary.nonzero == pytest.approx(10 / 40, rel=0.02)


def test_two_passes_add_up():
    torch.manual_seed(0)
    layer = moezoo.SparseMoE(D, num_experts=4, top_k=2, d_expert=5).eval()
    hidden = torch.randn(30, D)
    (neurons,) = neurons_of(layer)
    parts = SparsityCounter(neurons.number, 0.01)
    for part in hidden.split(17):
        parts.add(neurons.read(part, {}), len(part))
    whole = count(layer, hidden)
    assert torch.equal(parts.strong, whole.strong)
    assert parts.summary().effective == pytest.approx(whole.summary().effective, rel=1e-6)


def test_the_picture_has_every_layer():
    torch.manual_seed(0)
    counter = count(
        moezoo.SparseMoE(D, num_experts=4, top_k=2, d_expert=400).eval(), torch.randn(30, D)
    )
    frequency = counter.strong / 30
    summaries = {"layer 0": counter.summary()}
    figure = draw_sparsity(summaries, {"layer 0": frequency}, {"layer 0": "layer 0: MoE"}, "test")
    line = figure.axes[1].lines[0]
    assert len(line.get_xdata()) == 512
    assert line.get_ydata()[0] == pytest.approx(float(frequency.max()))
    assert (line.get_ydata()[1:] <= line.get_ydata()[:-1]).all()
    place, values = ranked(torch.tensor([0.1, 0.4, 0.2]))
    assert values.tolist() == pytest.approx([0.4, 0.2, 0.1])
    assert place.tolist() == pytest.approx([100 / 6, 50, 500 / 6])
