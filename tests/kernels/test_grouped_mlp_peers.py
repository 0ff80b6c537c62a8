"""Adapters to other projects' kernels: on stand-ins that compute what theirs promise."""

import importlib.util
import types

import pytest
import torch
import torch.nn.functional as F

from moezoo_kernels import backends
from moezoo_kernels.activations import GLUOptions
from moezoo_kernels.grouped_mlp import peers, reference

T, D, E, H, K = 7, 5, 4, 3, 2


def flatten_sort_count(chosen, num_experts):
    experts, order = chosen.flatten().sort()
    return experts, order, experts.bincount(minlength=num_experts).cumsum(0)


def parallel_linear(
    x, w, k, experts, order, offsets, expert_biases=None, gates=None, grouped_in=False,
    grouped_out=False,
):  # fmt: skip
    """As scattermoe's: row i of the sorted order is slot order[i], of token order[i] // k."""
    assert offsets[-1] == len(experts) == len(order)
    rows = x if grouped_in else x[order // k]
    y = torch.stack([row @ w[e] for row, e in zip(rows, experts.tolist(), strict=True)])
    if expert_biases is not None:
        y = y + expert_biases[experts]
    if grouped_out:
        return y
    y = torch.zeros_like(y).index_copy(0, order, y)
    return y if gates is None else (gates.unsqueeze(1) @ y.unflatten(0, gates.shape)).squeeze(1)


def gmm(rows, w, sizes, trans_b):
    assert trans_b
    assert sizes.dtype == torch.int64
    assert sizes.device.type == "cpu"
    parts = rows.split(sizes.tolist())
    return torch.cat([F.linear(part, w[e]) for e, part in enumerate(parts)])


def gather(x, order, experts, bins, k):
    assert bins[-1] == len(order)
    return x[order.long() // k]


def scatter(rows, order, experts, weights, bins, k):
    slots = torch.zeros_like(rows).index_copy(0, order.long(), rows)
    return (slots * weights.unsqueeze(-1)).unflatten(0, (-1, k)).sum(1)


def sort(flat, end_bit):
    assert flat.dtype == torch.int32
    assert int(flat.max()) < 2**end_bit
    experts, order = flat.sort()
    return experts, order.int()


@pytest.fixture
def stand_ins(install_module):
    install_module(
        "scattermoe.parallel_experts",
        flatten_sort_count=flatten_sort_count,
        parallel_linear=parallel_linear,
    )
    install_module(
        "megablocks.ops",
        sort=sort,
        histogram=lambda flat, n: flat.bincount(minlength=n).int(),
        inclusive_cumsum=lambda x, dim: x.cumsum(dim).squeeze(),
        gather=gather,
        scatter=scatter,
    )
    install_module("megablocks.grouped_gemm_util", ops=types.SimpleNamespace(gmm=gmm))


def operands(gated: bool, bias: bool, experts: int = E, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    inner = 2 * H if gated else H
    shapes = {"x": (T, D), "w_in": (experts, inner, D), "w_out": (experts, D, H)}
    shapes |= {"weights": (T, K)}
    if bias:
        shapes |= {"bias_in": (experts, inner), "bias_out": (experts, D)}
    tensors = {
        name: torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        for name, shape in shapes.items()
    }
    indices = torch.randint(-1, experts, (T, K), device=device)
    indices[0] = -1
    return {**tensors, "indices": indices}


def answers(run, tensors, **options):
    output = run(**tensors, **options)
    inputs = [t for t in tensors.values() if t.requires_grad]
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return output, torch.autograd.grad((output * probe.view_as(output)).sum(), inputs)


@pytest.mark.parametrize("package", ["scattermoe", "megablocks"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("experts", [1, E])
def test_adapters_equal_the_reference(stand_ins, package, gated, bias, experts):
    tensors = operands(gated, bias, experts)
    options = {"activation": "gelu", "gated": gated}
    ours, our_gradients = answers(reference.grouped_mlp, tensors, **options)
    theirs, their_gradients = answers(peers.grouped_mlp, tensors, package=package, **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(their_gradients, our_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("package", ["scattermoe", "megablocks"])
def test_adapters_bound_gates_and_read_pairs(stand_ins, package):
    tensors = operands(gated=True, bias=True)
    options = {"glu": GLUOptions(limit=0.5, up_shift=1.0), "interleaved": True}
    ours, our_gradients = answers(reference.grouped_mlp, tensors, **options)
    theirs, their_gradients = answers(peers.grouped_mlp, tensors, package=package, **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(their_gradients, our_gradients, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(reference.grouped_mlp(**tensors), ours)


@pytest.mark.parametrize("package", ["scattermoe", "megablocks"])
def test_an_empty_batch_comes_back_empty(stand_ins, package):
    tensors = operands(True, False)
    tensors |= {name: tensors[name][:0] for name in ("x", "indices", "weights")}
    output = peers.grouped_mlp(**tensors, package=package)
    assert output.shape == (0, D)
    output.sum().backward()
    assert not tensors["w_in"].grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scattermoe", "megablocks"])
def test_the_real_packages_equal_the_reference(name):
    backend = backends._BACKENDS["grouped_mlp"][name]
    device, dtype = torch.device("cuda"), torch.bfloat16
    if reason := backend.usable(device, dtype):
        pytest.skip(f"{name}: {reason}")
    tensors = operands(True, False, dtype=dtype, device="cuda")
    ours, our_gradients = answers(reference.grouped_mlp, tensors)
    theirs, their_gradients = answers(backend.function, tensors)
    for a, b in zip([theirs, *their_gradients], [ours, *our_gradients], strict=True):
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


def test_megablocks_says_what_else_it_needs(monkeypatch):
    found = {"megablocks": object()}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    usable = backends._BACKENDS["grouped_mlp"]["megablocks"].usable
    cuda = torch.device("cuda")
    assert usable(cuda, torch.bfloat16) == "its grouped_gemm is not installed"
    found["grouped_gemm"] = object()
    assert usable(cuda, torch.bfloat16) is None
    assert usable(cuda, torch.float32) == "computes in bf16 only, not float32"
