"""Every method of the zoo keeps the promises of the layer API; listed once, tested throughout."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moezoo
from moezoo.feed_forward import FeedForward, Method
from moezoo.routing.stats import MOST_COUNTS

sys.path.insert(0, str(Path(__file__).parent))

from plain.compare import assert_causal_as_declared

METHODS = [pytest.param(method, id=method.name) for method in moezoo.zoo()]
D = 24
# These select among the very activations that autocast rounds: a neuron at the edge may go either
# way. Everyone else decides in fp32.
SELECT_AMONG_ROUNDED = {"top_k_ffn", "spark_ffn", "cats", "teal", "drelu", "l1_reglu"}


def make(method: Method, dtype: torch.dtype = torch.float32, seed: int = 0) -> FeedForward:
    torch.manual_seed(seed)
    layer = method.build(D).to(dtype)
    for parameter in layer.parameters():  # zero-initialised routers would tie
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return layer


def token_ids(hidden: torch.Tensor) -> torch.Tensor:
    """Name each token, for layers that route on names; a prefix keeps its names."""
    position = torch.arange(hidden.shape[-2]) if hidden.ndim > 1 else torch.arange(1)
    return (position * 7 % 50).expand(hidden.shape[:-1])


def run(layer: FeedForward, hidden: torch.Tensor, **kwargs):
    return layer(hidden, token_ids=token_ids(hidden), **kwargs)


def gradients(layer: FeedForward, hidden: torch.Tensor, call: str, **kwargs) -> dict:
    """Run a call and return its output, losses and the gradient of everything trainable."""
    layer.zero_grad(set_to_none=True)
    hidden = hidden.clone().requires_grad_()
    torch.manual_seed(7)
    output = getattr(layer, call)(hidden, token_ids=token_ids(hidden), **kwargs)
    direction = torch.randn(
        output.hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    total = (output.hidden * direction).sum() + sum(output.losses.values())
    total.backward()
    found = {"hidden": output.hidden.detach(), "d hidden": hidden.grad}
    found |= {f"loss {name}": loss.detach() for name, loss in output.losses.items()}
    found |= {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return found


def assert_same(fast: dict, slow: dict, tolerance: float) -> None:
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        assert (fast[name] is None) == (value is None), name
        if value is not None:
            scale = value.abs().max().clamp(min=1e-6) if value.numel() else 1.0
            error = (fast[name] - value).abs().max() / scale if value.numel() else 0.0
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("method", METHODS)
@given(
    shape=st.sampled_from([(1,), (63,), (2, 31), (3, 1, 5)]),
    training=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=6, deadline=None)
def test_fast_path_equals_reference_with_all_gradients(method, shape, training, masked, seed):
    layer = make(method, torch.float64, seed).train(training)
    hidden = torch.randn(*shape, D, dtype=torch.float64)
    mask = torch.rand(shape) < 0.7 if masked else None
    fast = gradients(layer, hidden, "forward", mask=mask)
    slow = gradients(layer, hidden, "reference", mask=mask)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 31)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_infer_returns_the_hidden_states_of_a_call(method, dtype, shape):
    layer = make(method, dtype).eval()
    hidden = torch.randn(*shape, D).to(dtype)
    ids = token_ids(hidden)
    for mask in (None, torch.arange(hidden[..., 0].numel()).reshape(shape) % 3 > 0):
        with torch.no_grad():
            for read in (None, torch.randn(*shape, D).to(dtype)):
                context = {"token_ids": ids, "router_input": read, "mask": mask}
                expected = layer(hidden, **context).hidden
                assert torch.equal(layer.infer(hidden, **context), expected)


@pytest.fixture
def default_dtype():
    """Set torch's default dtype, as Lightning does for `bf16-true`, and put it back."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_torchs_default_dtype_changes_nothing(method, default, tokens, default_dtype):
    layer = make(method, torch.float32).eval()
    hidden = torch.randn(1, tokens, D)
    ids = token_ids(hidden)

    def computed() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            inferred = layer.infer(hidden, token_ids=ids)
        return {"infer": inferred, **gradients(layer, hidden, "forward")}

    expected = computed()
    default_dtype(default)
    actual = computed()
    default_dtype(torch.float32)
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_router_input_decides_in_place_of_hidden_on_both_paths(method, training):
    layer = make(method, torch.float64).train(training)
    hidden, other = torch.randn(2, 40, D, dtype=torch.float64)
    plain = gradients(layer, hidden, "forward")
    fast = gradients(layer, hidden, "forward", router_input=other)
    assert_same(fast, gradients(layer, hidden, "reference", router_input=other), 1e-10)
    same = gradients(layer, hidden, "forward", router_input=hidden)["hidden"]
    torch.testing.assert_close(same, plain["hidden"], rtol=1e-12, atol=1e-12)
    assert torch.equal(fast["hidden"], plain["hidden"]) != layer.reads_router_input


@pytest.mark.parametrize("method", METHODS)
def test_who_answers_follows_router_input_alone(method):
    # Neurons that are zero by their activation would not show that they were chosen.
    smooth = {"activation": "gelu"} if method.name == "top_k_ffn" else {}
    layer = method.build(D, **smooth).double().eval()
    if not layer.reads_router_input:
        pytest.skip("it chooses nothing, or by token_ids")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one, two, asked, other = torch.randn(4, 40, D, dtype=torch.float64)
    first, second, third = (
        layer(hidden, router_input=read).stats
        for hidden, read in [(one, asked), (two, asked), (one, other)]
    )
    # The mass of a neuron is its activation, which is what answers, not who.
    who = set(first) - ({"unevenness"} if isinstance(layer, moezoo.TopKFFN) else set())
    assert all(torch.equal(first[name], second[name]) for name in who)
    if layer.causal:  # expert choice fills every expert, whoever asks
        assert any(not torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_reruns_are_bit_identical(method, poison_empty):
    layer = make(method)
    hidden = torch.randn(63, D)
    first, second = (gradients(layer, hidden, "forward") for _ in range(2))
    assert_same(first, second, 0.0)
    assert all(v is None or v.isfinite().all() for v in first.values())


@pytest.mark.parametrize("method", METHODS)
def test_config_round_trip_through_json(method):
    layer = make(method)
    config = json.loads(json.dumps(layer.config()))
    again = FeedForward.from_config(config)
    assert type(again) is type(layer)
    assert again.config() == layer.config()
    again.load_state_dict(layer.state_dict())
    hidden = torch.randn(5, D)
    assert torch.equal(run(again.eval(), hidden).hidden, run(layer.eval(), hidden).hidden)


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_is_readable_and_defaults_build(method):
    layer = method.layer(D)
    assert layer.config()["init_args"]["d_model"] == D
    assert run(layer, torch.randn(3, D)).hidden.shape == (3, D)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_invisible(method):
    layer = make(method, torch.float64).eval()
    if not layer.causal:
        pytest.skip("who is chosen depends on the number of tokens")
    real = torch.randn(1, 9, D, dtype=torch.float64)
    padded = torch.cat([torch.full((1, 4, D), 1e3, dtype=torch.float64), real], dim=1)
    mask = torch.arange(13).unsqueeze(0) >= 4
    names = token_ids(real)
    alone = layer(real, token_ids=names)
    beside = layer(padded, token_ids=torch.nn.functional.pad(names, (4, 0)), mask=mask)
    torch.testing.assert_close(beside.hidden[:, 4:], alone.hidden, rtol=1e-12, atol=1e-12)
    assert alone.losses.keys() == beside.losses.keys()
    for name, loss in alone.losses.items():
        torch.testing.assert_close(beside.losses[name], loss, rtol=1e-12, atol=0)
    for name, value in alone.stats.items():
        torch.testing.assert_close(beside.stats[name], value)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_see_later_ones_exactly_in_layers_that_are_not_causal(method):
    assert_causal_as_declared(make(method, torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (1, 1)])
def test_empty_and_single_token(method, shape):
    for training in (True, False):
        layer = make(method).train(training)
        hidden = torch.randn(*shape, D, requires_grad=True)
        output = run(layer, hidden)
        assert output.hidden.shape == hidden.shape
        (output.hidden.sum() + sum(output.losses.values())).backward()
        assert all(v.isfinite().all() for v in [*output.losses.values(), *output.stats.values()])
        assert all(p.grad is not None for p in layer.parameters() if p.ndim == 3)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_runs_experts_in_bf16_and_routes_in_fp32(method):
    layer = make(method).eval()
    hidden = torch.randn(33, D)
    exact = run(layer, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(layer, hidden)
    assert rounded.hidden.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in rounded.losses.values())
    edge = method.name in SELECT_AMONG_ROUNDED
    for name, value in exact.stats.items():
        if layer.kind == "feed_forward":
            changed = (rounded.stats[name] - value).abs().sum()
            assert changed <= (0.03 * value.sum() if edge else 0), name
        else:  # attention routes nothing; its weights follow autocast, as its products do
            torch.testing.assert_close(rounded.stats[name], value, rtol=2e-2, atol=0)
    error = (rounded.hidden.float() - exact.hidden).norm() / exact.hidden.norm()
    assert error < (5e-2 if edge else 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_nothing(method):
    layer = make(method)
    hidden = torch.randn(33, D)
    plain = gradients(layer, hidden, "forward")
    calls = layer.forward
    layer.forward = lambda h, **kw: checkpoint(calls, h, use_reentrant=False, **kw)
    assert_same(gradients(layer, hidden, "forward"), plain, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_graph_break(method):
    layer = make(method).eval()
    hidden = torch.randn(17, D)
    plain = gradients(layer, hidden, "forward")
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    layer.forward = compiled
    assert_same(gradients(layer, hidden, "forward"), plain, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_cost_formulas_equal_what_torch_counts(method):
    layer = make(method).eval()
    tokens = 64
    with FlopCounterMode(display=False) as counter:
        output = run(layer, torch.randn(tokens, D))
    cost = layer.cost()
    # A formula per token cannot hold what grows with the context: two products over its keys.
    context = 0 if layer.kind == "feed_forward" else 4 * tokens * tokens * D
    assert cost.total_parameters == sum(p.numel() for p in layer.parameters())
    assert cost.active_parameters <= cost.total_parameters
    dropped = int(output.stats.get("dropped", 0))
    skipped = dropped * layer.experts.flops_per_assignment() if dropped else 0
    if method.name == "remoe":  # it begins with half of the experts; the formula is for top_k
        more = int(output.stats["expert_counts"].sum()) - tokens * layer.top_k
        skipped -= more * layer.experts.flops_per_assignment()
    if method.name == "zaya":  # the formula is for the mean to which the bias steers
        ran = int(output.stats["expert_counts"][: layer.num_experts].sum())
        steered = tokens * (cost.flops_per_token - layer.gate.flops_per_token())
        skipped = steered - ran * layer.experts.flops_per_assignment()
    assert counter.get_total_flops() == tokens * cost.flops_per_token - skipped + context
    assert layer.to(torch.bfloat16).cost().bytes_per_token * 2 == cost.bytes_per_token


@pytest.mark.parametrize("method", METHODS)
def test_the_load_of_slots_is_what_the_statistics_summarise(method):
    layer = make(method, torch.float64).eval()
    hidden, mask = torch.randn(4, 15, D, dtype=torch.float64), torch.rand(4, 15) < 0.7
    stats = run(layer, hidden, mask=mask).stats
    load = layer.slot_load(hidden, token_ids=token_ids(hidden), mask=mask)
    if load is None:
        assert "usage" not in stats
        return
    assert load.counts.shape == load.mass.shape == (math.prod(load.shape),)
    assert stats["tokens"] == mask.sum()
    assert ("expert_counts" in stats) == (len(load.counts) <= MOST_COUNTS)
    if "expert_counts" in stats:
        assert torch.equal(stats["expert_counts"], load.counts)
    assert stats["usage"].item() == pytest.approx((load.mass > 0).double().mean().item(), rel=1e-6)
    share = load.mass.double() / load.mass.sum()
    divergence = math.log(len(share)) - torch.special.entr(share).sum().item()
    assert stats["unevenness"].item() == pytest.approx(divergence, rel=1e-5, abs=1e-6)
    halves = [
        layer.slot_load(part, token_ids=token_ids(part), mask=seen)
        for part, seen in zip(hidden.split(2), mask.split(2), strict=True)
    ]
    if layer.causal:
        assert torch.equal(halves[0].counts + halves[1].counts, load.counts)
        torch.testing.assert_close(halves[0].mass + halves[1].mass, load.mass)


@pytest.mark.parametrize("method", METHODS)
def test_parameter_groups_hold_each_parameter_once(method):
    layer = make(method)
    grouped = [p for group in layer.parameter_groups() for p in group.parameters]
    assert len(grouped) == len(list(layer.parameters()))
    assert {id(p) for p in grouped} == {id(p) for p in layer.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_reset_parameters_covers_every_parameter_and_buffer(method):
    layer = method.build(D)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        with torch.no_grad():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -99)
    layer.reset_parameters(num_layers=4)
    for name, tensor in layer.state_dict().items():
        assert (tensor.isfinite() & (tensor != -99)).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_output_keeps_the_scale_of_its_input(method):
    """A block whose output explodes or vanishes at initialisation would not train."""
    torch.manual_seed(0)
    layer = method.build(128).eval()
    ratio = run(layer, torch.randn(256, 128)).hidden.std()
    assert 0.01 < ratio < 3.0


def test_wrong_shapes_are_named():
    layer = moezoo.SparseMoE(D)
    with pytest.raises(moezoo.InputError, match=r"hidden: last dimension is 25.*d_model is 24"):
        layer(torch.randn(3, D + 1))
    with pytest.raises(moezoo.InputError, match=r"mask: shape \(2,\) does not match"):
        layer(torch.randn(3, D), mask=torch.ones(2, dtype=torch.bool))


def test_names_are_unique_and_papers_named():
    names = [method.name for method in moezoo.zoo()]
    assert len(set(names)) == len(names) >= 12
    for method in moezoo.zoo():
        year_month, _, number = method.paper.arxiv.partition(".")
        if method.name != "per_layer_embedding":  # of which there is code alone
            assert len(year_month) == 4
            assert number.isdigit()
    with pytest.raises(ValueError, match="'switch' is registered already"):
        moezoo.register(Method("switch", moezoo.DenseFFN, moezoo.zoo()[0].paper))
