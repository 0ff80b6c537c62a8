"""Single-neuron experts: the fused op against the dense reference, and what it keeps in memory."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from moezoo import InputError
from moezoo.experts import rank_one_op
from moezoo.experts.rank_one import RankOneExperts, rank_one_experts

T, D, N, J = 63, 24, 49, 6


def experts(gated=False, sparse=False, dtype=torch.float64, activation="gelu") -> RankOneExperts:
    torch.manual_seed(0)
    return RankOneExperts(D, N, J, activation, gated, sparse).to(dtype)


def assignments(tokens=T, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Few rows, so a token often has one twice; some unused, some slots empty."""
    x = torch.randn(tokens, D, dtype=dtype)
    indices = torch.randint(-1, N // 2, (tokens, J))
    return x, indices, torch.rand(tokens, J, dtype=dtype).masked_fill(indices < 0, 0.0)


def gradients(module, call, x, indices, weights) -> dict[str, torch.Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = getattr(module, call)(x, indices, weights)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (y * direction.to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad.masked_fill(indices < 0, 0.0)}
    return found | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2"])
def test_equals_the_dense_reference_with_all_gradients(gated, activation, poison_empty):
    module = experts(gated, activation=activation)
    inputs = assignments()
    fast = gradients(module, "forward", *inputs)
    slow = gradients(module, "reference", *inputs)
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-11, atol=1e-12, msg=name)


def test_empty_slots_have_no_gradient_and_padding_may_be_anything():
    module = experts(gated=True)
    x, indices, weights = assignments()
    indices[5] = -1
    clean = gradients(module, "forward", x, indices, weights)
    x[5] = torch.nan
    assert (clean["y"][5] == 0).all()
    found = gradients(module, "forward", x, indices, weights)
    for name in ("y", "x", "weights", "u", "v", "gate"):
        assert torch.equal(found[name], clean[name]), name
    weights = torch.rand(T, J, dtype=torch.float64).requires_grad_()
    module(torch.randn(T, D, dtype=torch.float64), indices, weights).sum().backward()
    assert (weights.grad[indices < 0] == 0).all()
    assert (weights.grad[indices >= 0] != 0).all()


def test_chunks_of_tokens_change_nothing(monkeypatch):
    module = experts(gated=True)
    inputs = assignments()
    whole = gradients(module, "forward", *inputs)
    for rows in (1, 2 * J, 5 * J):
        monkeypatch.setattr(rank_one_op, "_CHUNK_BYTES", {"cpu": rows * D * 8})
        for name, value in gradients(module, "forward", *inputs).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-14, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_short_dtypes_stay_near_the_exact_answer(dtype, gated):
    short = experts(gated, dtype=dtype)
    exact = experts(gated)
    exact.load_state_dict(short.state_dict())
    x, indices, weights = assignments(200)
    x, weights = x.to(dtype), weights.float()
    expected = gradients(exact, "reference", x.double(), indices, weights.double())
    found = gradients(short, "forward", x, indices, weights)
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-6
    for name, value in expected.items():
        assert found[name].dtype == (torch.float32 if name == "weights" else dtype)
        assert (found[name].double() - value).norm() <= bound * value.norm(), name


def test_frozen_tables_get_no_gradient_and_the_others_the_same():
    module = experts(gated=True)
    inputs = assignments()
    whole = gradients(module, "forward", *inputs)
    module.u.requires_grad_(False)
    found = gradients(module, "forward", *inputs)
    assert found.pop("u") is None
    for name, value in found.items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("tokens", [0, 1, T])
def test_sparse_gradients_hold_the_rows_that_were_read(tokens):
    inputs = assignments(tokens)
    dense = gradients(experts(True), "forward", *inputs)
    sparse = gradients(experts(True, sparse=True), "forward", *inputs)
    read = inputs[1].unique()
    for name in ("u", "v", "gate"):
        assert sparse[name].is_sparse
        assert torch.equal(sparse[name].coalesce().indices()[0], read[read >= 0])
        assert torch.equal(sparse[name].to_dense(), dense[name])
    assert torch.equal(sparse["x"], dense["x"])


def test_a_sparse_step_leaves_other_rows_alone():
    module = experts(sparse=True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    x, indices, weights = assignments()
    optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
    module(x, indices, weights).square().sum().backward()
    optimizer.step()
    read = torch.zeros(N, dtype=torch.bool)
    read[indices[indices >= 0]] = True
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter[~read], before[name][~read])
        assert (parameter[read] != before[name][read]).any(dim=-1).all()


def test_sparse_gradients_under_compile_are_refused():
    module = experts(sparse=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"sparse: torch.compile has no sparse"):
        compiled(*assignments())


def test_op_is_registered_as_torch_wants_it():
    module = experts(gated=True)
    x, indices, weights = assignments(5)
    tensors = (x.requires_grad_(), module.u, module.v)
    rest = (indices, weights.requires_grad_(), "silu", False)
    for gate in (module.gate, None):
        opcheck(torch.ops.moezoo.rank_one_experts.default, (*tensors, gate, *rest))


@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_of_the_rows_read(gated):
    module = experts(gated)
    x, indices, weights = assignments()
    rows = int((indices >= 0).sum()) * D * 2
    with FlopCounterMode(display=False) as counter:
        y = module(x.requires_grad_(), indices, weights.requires_grad_())
    assert counter.get_total_flops() == rows * (3 if gated else 2)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * rows * (3 if gated else 2)


class Meter:
    """The most memory that was allocated at once, and the largest single piece, in bytes."""

    def __enter__(self) -> "Meter":
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        events = list(self._profile.profiler.kineto_results.events())
        moves = sorted(
            (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.nbytes()
        )
        held = self.peak = 0
        self.largest = max((size for _, size in moves), default=0)
        for _, size in moves:
            held += size
            self.peak = max(self.peak, held)


def test_construction_allocates_little_beside_the_parameters():
    with Meter() as meter:
        module = RankOneExperts(64, 4096, 128, "gelu", gated=True)
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    assert held <= meter.peak <= 1.1 * held


@pytest.mark.parametrize("gated", [False, True])
def test_no_tensor_of_every_gathered_row_is_saved_or_exists(gated):
    tokens, choices, width = 2048, 32, 64
    module = RankOneExperts(width, 100, choices, "gelu", gated)
    x = torch.randn(tokens, width, requires_grad=True)
    indices = torch.randint(100, (tokens, choices))
    weights = torch.rand(tokens, choices, requires_grad=True)
    gathered = tokens * choices * width * 4
    module(x, indices, weights).sum().backward()  # first use loads code
    module.zero_grad()

    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = module(x, indices, weights)
    own = {t.data_ptr() for t in (x, indices, weights, *module.parameters())}
    extra = sum(size for pointer, size in saved.items() if pointer not in own)
    assert extra == tokens * choices * 4 * (2 if gated else 1)  # pre-activations

    with Meter() as meter:
        module(x, indices, weights)
    assert meter.peak < gathered / 4
    with Meter() as meter:
        y.sum().backward()
    assert meter.largest <= gathered / 8
    assert meter.peak < gathered / 2

    def written_out(x):
        inner = torch.einsum("td,tjd->tj", x, module.u[indices])
        return torch.einsum("tj,tjd->td", weights * nn.functional.gelu(inner), module.v[indices])

    with Meter() as meter:  # the meter sees what it is to find
        written_out(x)
    assert meter.largest >= gathered


def test_bad_choices_of_the_user_are_named():
    with pytest.raises(InputError, match=r"activation: 'gelo' is not known; did you mean 'gelu'"):
        RankOneExperts(D, N, J, "gelo", False)
    module = experts()
    x, indices, weights = assignments()
    with pytest.raises(IndexError):
        rank_one_experts(x, module.u, module.v, indices + N, weights)
