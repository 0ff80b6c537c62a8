"""product_key_top_k in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import product_key_top_k
from moezoo_kernels.product_key_top_k.reference import product_key_top_k as reference

pytest.importorskip("triton", reason="triton is not installed")

NAN, INF = float("nan"), float("inf")
# Tokens, heads, n, K; the last is beyond what the kernel holds in registers.
SIZES = [(1, 2, 1, 1), (2, 1, 5, 3), (1, 1, 18, 5), (0, 2, 4, 2), (1, 1, 70, 66)]


def halves_of(kind, tokens, heads, n, device="cpu", by_head=True):
    torch.manual_seed(0)
    shape = (heads, 2, tokens, n) if by_head else (2, tokens, heads, n)
    values = {"few": [-0.5, 0.0, -0.0, 0.25], "odd": [NAN, -NAN, -INF, 1.0]}
    halves = torch.randn(shape)
    if kind != "normal":
        drawn = torch.tensor(values[kind])
        halves = drawn[torch.randint(0, len(drawn), shape)]
    halves = halves.to(device)
    return halves.permute(1, 2, 0, 3) if by_head else halves


def check(halves, top_k):
    results = []
    for function in (reference, product_key_top_k):
        leaf = halves.detach().requires_grad_()
        with moezoo_kernels.use("triton"):
            scores, slots = function(leaf, top_k)
        grad = torch.linspace(-1, 1, scores.numel(), device=leaf.device).view(scores.shape)
        results.append((scores.detach(), slots, *torch.autograd.grad(scores, leaf, grad)))
    (scores, slots, of_halves), (same_scores, same_slots, same_of_halves) = results
    torch.testing.assert_close(same_scores, scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(same_slots, slots)
    torch.testing.assert_close(same_of_halves, of_halves, rtol=2e-6, atol=2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize(("tokens", "heads", "n", "top_k"), SIZES)
def test_the_interpreter_equals_the_reference(tokens, heads, n, top_k):
    check(halves_of("normal", tokens, heads, n), top_k)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["few", "odd"])
def test_the_interpreter_breaks_ties_like_the_reference(kind):
    check(halves_of(kind, 2, 2, 9, by_head=False), 4)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels.product_key_top_k import triton_select

    strides = dict.fromkeys(("half_stride", "token_stride", "head_stride", "heads"), "i64")
    data = {"halves": "*fp32", "scores": "*fp32", "slots": "*i64"}
    sizes = {"n": 200, "top_k": 10, "ROW": 256, "CHOICES": 16}
    compile_for(capability, triton_select._select.fn, data | strides, sizes)
    data = {"grad": "*fp32", "slots": "*i64", "halves": "*fp32"}
    sizes = {"n": 1000, "top_k": 32, "COLUMNS": 1024}
    compile_for(capability, triton_select._scatter, data | strides, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "few", "odd"])
@pytest.mark.parametrize("sizes", [*SIZES, (100, 8, 512, 16), (100, 4, 1024, 32), (9, 1, 300, 64)])
def test_a_gpu_equals_the_reference(kind, sizes):
    tokens, heads, n, top_k = sizes
    for by_head in (True, False):
        check(halves_of(kind, tokens, heads, n, "cuda", by_head), top_k)
