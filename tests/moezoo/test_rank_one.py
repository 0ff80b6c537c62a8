"""Single-neuron experts: the module against every expert on every token, and its options."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moezoo import InputError
from moezoo.experts.rank_one import RankOneExperts
from moezoo_kernels.activations import ACTIVATIONS

T, D, N, J = 63, 24, 49, 6


def experts(gated=False, sparse=False, dtype=torch.float64, activation="gelu") -> RankOneExperts:
    torch.manual_seed(0)
    return RankOneExperts(D, N, J, activation=activation, gated=gated, sparse=sparse).to(dtype)


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
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_equals_the_dense_reference_with_all_gradients(gated, activation, poison_empty):
    module = experts(gated, activation=activation)
    inputs = assignments()
    fast = gradients(module, "forward", *inputs)
    slow = gradients(module, "reference", *inputs)
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-11, atol=1e-12, msg=name)


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


def test_construction_allocates_little_beside_the_parameters():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        module = RankOneExperts(64, 4096, 128, activation="gelu", gated=True)
    events = recorded.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in moves))
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    assert held <= peak <= 1.1 * held


def test_bad_choices_of_the_user_are_named():
    with pytest.raises(InputError, match=r"activation: 'gelo' is not known; did you mean 'gelu'"):
        RankOneExperts(D, N, J, activation="gelo", gated=False)
