"""Matrices without their zeros: every backend against the formats' meaning, and the formats."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels import native, sparse_linear
from moezoo_kernels.sparse_linear import GroupSparse, op, pack_blocks, pack_groups, pays

FORMATS = ["blocks of 16", "blocks of 32", "2:4", "1:4", "3:8"]
# Whole tiles and passes, rests of every length, one token, and none.
TOKENS = [0, 1, 2, 7, 43, 131]


def drawn(kind, rows=96, columns=64, dtype=torch.float64):
    """A matrix with such zeros, and the same packed; rows of blocks are empty and full, too."""
    generator = torch.Generator().manual_seed(len(kind) + rows)
    dense = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind.startswith("blocks"):
        block = int(kind[-2:])
        kept = torch.rand(rows // block, columns // block, generator=generator) < 0.4
        kept[0], kept[1] = False, True
        dense *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
        dense = dense.to(dtype)
        return dense, pack_blocks(dense, block)
    n, m = map(int, kind.split(":"))
    order = torch.rand(rows, columns // m, m, generator=generator).argsort(-1)
    dense = (dense.view_as(order) * (order < n)).view(rows, columns)
    dense[5] = 0.0
    dense = dense.to(dtype)
    return dense, pack_groups(dense, n, m)


def operands(tokens, columns, rows, dtype):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    return x.to(dtype), bias.to(dtype)


def exact(x, dense, bias):
    """Sums over columns one by one, in fp64."""
    total = torch.zeros(len(x), len(dense), dtype=torch.float64)
    for column in range(dense.shape[1]):
        total += x[:, column, None].double() * dense[:, column].double()
    return total if bias is None else total + bias.double()


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_is_the_matrix(kind):
    dense, matrix = drawn(kind, rows=96 if "blocks" in kind else 43, columns=96)
    assert torch.equal(matrix.dense(), dense)
    if isinstance(matrix, GroupSparse):
        assert matrix.density == matrix.n / matrix.m
    else:
        stored = matrix.values.abs().amax(dim=(1, 2)) > 0
        assert bool(stored.all())
        assert matrix.density == matrix.values.numel() / dense.numel()


@pytest.mark.parametrize("kind", FORMATS)
def test_torch_gives_the_reference_and_its_gradients(kind):
    dense, matrix = drawn(kind)
    x, bias = operands(7, 64, 96, torch.float64)
    found = []
    for name in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        with moezoo_kernels.use(name):
            y = sparse_linear(leaves[0], matrix, leaves[1])
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][0], exact(x, dense, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_library_multiplies(native_library, poison_empty, kind, dtype):
    dense, matrix = drawn(kind, rows=96 if "blocks" in kind else 43, dtype=dtype)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-6
    for tokens in TOKENS:
        x, bias = operands(tokens, 64, len(dense), dtype)
        for added in (None, bias):
            with moezoo_kernels.use("cpu"):
                found = sparse_linear(x, matrix, added)
            assert found.dtype == dtype
            wanted = exact(x, dense, added)
            assert (found.double() - wanted).norm() <= bound * wanted.norm()
            if added is None and "blocks" in kind:
                assert not found[:, : matrix.block].any()  # whose rows have no block


@pytest.mark.parametrize("kind", ["blocks of 32", "2:4"])
def test_gradients_of_the_fused_op(kind):
    dense, matrix = drawn(kind, dtype=torch.float32)
    x, bias = operands(5, 64, 96, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, bias)]
    y = sparse_linear(leaves[0], matrix, leaves[1])
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
    of_x, of_bias = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(of_x, grad @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_bias, grad.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["blocks of 16", "2:4"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_any_number_of_threads_gives_the_same_bits(native_library, kind, tokens):
    """One token shares rows among threads; 300 are several tiles."""
    _, matrix = drawn(kind, rows=1024, columns=1024 if tokens == 1 else 256, dtype=torch.float32)
    x, bias = operands(tokens, matrix.shape[1], 1024, torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        with moezoo_kernels.use("cpu"):
            found.append(sparse_linear(x, matrix, bias))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], bias.expand(tokens, -1))


def test_a_matrix_of_zeros_gives_the_bias(native_library):
    x, bias = operands(3, 64, 32, torch.float32)
    zeros = torch.zeros(32, 64)
    for matrix in (pack_blocks(zeros, 32), pack_groups(zeros, 1, 4)):
        with moezoo_kernels.use("cpu"):
            assert torch.equal(sparse_linear(x, matrix, bias), bias.expand(3, -1))


def test_what_is_no_number_is_kept():
    dense = torch.zeros(32, 32)
    dense[3, 17] = float("nan")
    for matrix in (pack_blocks(dense, 16), pack_groups(dense, 1, 8)):
        found = sparse_linear(torch.ones(2, 32), matrix)
        assert found.isnan().nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.skipif(isinstance(native.load(), str), reason="no C++ library")
def test_op_compiler_autocast_and_flops():
    for kind in ("blocks of 32", "2:4"):
        dense, matrix = drawn(kind, dtype=torch.float32)
        x, bias = operands(3, 64, 96, torch.float32)
        x.requires_grad_()
        if kind != "2:4":
            opcheck(op.sparse_linear, (x, *matrix.tensors, bias, 96, 0, 0, "cpu"))
            compiled = torch.compile(
                lambda t, given=matrix, b=bias: sparse_linear(t, given, b),
                fullgraph=True,
                backend="aot_eager",
            )
            assert torch.equal(compiled(x), sparse_linear(x, matrix, bias))
        with FlopCounterMode(display=False) as counter:
            sparse_linear(x.detach(), matrix)
        assert counter.get_total_flops() == 2 * 3 * matrix.values.numel()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = sparse_linear(x.detach(), matrix, bias)
        assert found.dtype == torch.bfloat16
        wanted = F.linear(x.detach(), dense, bias)
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()


def test_leading_dimensions_stay():
    dense, matrix = drawn("blocks of 16")
    x = operands(6, 64, 96, torch.float64)[0].view(2, 3, 64)
    torch.testing.assert_close(sparse_linear(x, matrix), F.linear(x, dense))
    assert sparse_linear(x[0, 0], matrix).shape == (96,)


def test_it_pays_where_there_is_little_to_read(monkeypatch):
    monkeypatch.setattr(native, "unusable", lambda device, dtype: None)
    half, few = torch.zeros(512, 512), torch.zeros(512, 512)
    half[:, :256] = few[:, :32] = 1.0
    blocks, sparse = pack_blocks(half.bfloat16(), 32), pack_blocks(few.bfloat16(), 32)
    assert pays(sparse, 1)
    assert pays(sparse, 2048)
    assert pays(blocks, 1)
    assert not pays(blocks, 2048)  # dense bf16 products may be several times as fast
    assert pays(pack_blocks(half, 32), 2048)
    assert not pays(pack_blocks(torch.ones(512, 512), 32), 1)
    half[:, 1::2], half[:, ::2] = 0.0, 1.0
    groups = pack_groups(half, 4, 8)
    assert pays(groups, 1)
    assert not pays(groups, 64)
    assert not pays(pack_blocks(few[:64, :64], 32), 1)  # calling takes longer
    assert not pays(sparse, 0)
    with moezoo_kernels.use("torch"):
        assert not pays(sparse, 1)


def test_what_does_not_fit_is_named():
    dense, matrix = drawn("2:4", dtype=torch.float32)
    x, bias = operands(3, 64, 96, torch.float32)
    with pytest.raises(ValueError, match=r"block: 8 is not known; choose from: 16, 32"):
        pack_blocks(dense, 8)
    with pytest.raises(ValueError, match=r"block: 24 x 64 is no multiple of 16"):
        pack_blocks(dense[:24], 16)
    with pytest.raises(ValueError, match=r"dense: give a floating matrix \(N, K\), not \(64,\)"):
        pack_blocks(dense[0], 16)
    with pytest.raises(ValueError, match="n: a group has 2 numbers that are not zero; give n 2"):
        pack_groups(dense, 1, 4)
    with pytest.raises(ValueError, match="n, m: 4:16 is not known"):
        pack_groups(dense, 4, 16)
    with pytest.raises(ValueError, match="m: 64 inputs are no multiple of 6"):
        pack_groups(dense, 2, 6)
    with pytest.raises(ValueError, match=r"x: shape is \(3, 32\); the matrix reads 64"):
        sparse_linear(x[:, :32], matrix)
    with pytest.raises(ValueError, match=r"matrix: dtype is torch\.float32, of x torch\.float64"):
        sparse_linear(x.double(), matrix)
    with pytest.raises(ValueError, match=r"bias: it is \(3,\) in torch.float32; give \(96,\)"):
        sparse_linear(x, matrix, bias[:3])
    with pytest.raises(ValueError, match="matrix: it lies on meta, x on cpu"):
        sparse_linear(x, replace(matrix, values=matrix.values.to("meta")))
