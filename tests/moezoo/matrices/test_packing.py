"""Evaluation without zeros: the same numbers, packed anew after every change, never in the way."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import moezoo
import moezoo_kernels
from moezoo.matrices import NM, LowRank, Pruned, SoftNM, Transposable, build_matrix
from moezoo.matrices.masked import Latent
from moezoo_kernels import native
from moezoo_kernels.sparse_linear import BlockSparse, GroupSparse, paying

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="no C++ library")

SIZE = (64, 96)
OPTIONS = {
    "blocks of 32": (Pruned(block=32, sparsity=0.7), BlockSparse),
    "blocks of 48": (Pruned(block=16 * 3, sparsity=0.7), BlockSparse),
    "n_m": (NM(n=2, m=4), GroupSparse),
    "fst": (Transposable(), GroupSparse),
    "s_ste": (SoftNM(n=1, m=4), GroupSparse),
}


@pytest.fixture(autouse=True)
def small_matrices_pay(monkeypatch):
    monkeypatch.setattr(paying, "_LEAST_NUMBERS", 0)


def made(options, bias=True):
    torch.manual_seed(0)
    size = (96, 96) if getattr(options, "block", 0) == 48 else SIZE
    matrix = build_matrix(options, *size, bias)
    matrix.reset_parameters(0.1)
    if bias:
        torch.nn.init.normal_(matrix.bias)
    return matrix.eval()


def tokens(matrix, count=1):
    return torch.randn(count, matrix.in_features, generator=torch.Generator().manual_seed(1))


def whole(matrix, x):
    with torch.no_grad():
        return F.linear(x.double(), matrix.dense().double(), matrix.bias.double())


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_multiplies_without_zeros(name):
    options, kind = OPTIONS[name]
    matrix = made(options)
    for count in (1, 3, 70):
        x = tokens(matrix, count)
        with torch.no_grad():
            found = matrix(x)
            packed = matrix.packed(x)
        assert (found.double() - whole(matrix, x)).norm() <= 1e-6 * found.norm()
        pays = count < 70 or kind is BlockSparse
        assert isinstance(packed, kind) if pays else packed is None


def changes_of(matrix):
    """Return everything that changes a matrix."""
    other = copy.deepcopy(matrix)
    with torch.no_grad():
        other.latent.neg_().add_(0.1)
        if hasattr(other, "mask"):
            other.mask.copy_(other.mask.roll(32, 0))

    def add():
        with torch.no_grad():
            matrix.latent.mul_(2.0)

    def move():
        if hasattr(matrix, "mask"):
            matrix.mask.copy_(matrix.mask.roll(32, 0))

    def learn():
        optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.1)
        matrix(tokens(matrix)).square().sum().backward()
        optimizer.step()

    def replace():
        matrix.latent = torch.nn.Parameter(matrix.latent.detach() + 1.0)

    def round_off():
        matrix.bfloat16().float()  # perhaps into the same memory

    load = functools.partial(matrix.load_state_dict, other.state_dict())
    return add, move, learn, load, replace, round_off


@pytest.mark.parametrize("name", ["blocks of 32", "n_m", "s_ste"])
def test_every_change_is_seen(name):
    matrix = made(OPTIONS[name][0])
    x = tokens(matrix)
    with torch.no_grad():
        packed = matrix.packed(x)
        assert matrix.packed(x) is packed  # once for many calls
    for change in changes_of(matrix):
        with torch.no_grad():
            matrix(x)
        change()
        with torch.no_grad():
            found = matrix(x)
            assert matrix.packed(x) is not None
        assert (found.double() - whole(matrix, x)).norm() <= 1e-6 * found.norm()


@pytest.mark.parametrize("options", [NM(n=2, m=4), SoftNM(n=1, m=4), Pruned(sparsity=0.5)])
def test_many_tokens_multiply_with_one_masked_copy_until_something_changes(options, monkeypatch):
    matrix, counts = made(options), []
    x, dense = tokens(matrix, 70), matrix.dense
    monkeypatch.setattr(matrix, "dense", lambda: counts.append(1) or dense())

    def call():
        counts.clear()
        with torch.no_grad():
            return matrix(x)

    wanted = F.linear(x, dense(), matrix.bias)
    for _ in range(2):
        assert torch.equal(call(), wanted)
    for change in (lambda: None, *changes_of(matrix)):
        change()
        wanted = F.linear(x, dense(), matrix.bias)
        for _ in range(3):
            assert torch.equal(call(), wanted)
        assert not counts  # the copy of the call before
    kept = matrix._packing._whole
    pruned = isinstance(options, Pruned)
    if pruned:  # what lies outside a mask is zero after a step: no copy is needed
        with torch.no_grad():
            matrix.latent.mul_(matrix.mask)
        for _ in range(2):
            call()
        kept = matrix._packing._whole
    assert (kept.data_ptr() == matrix.latent.data_ptr()) == pruned
    with torch.inference_mode():
        assert torch.equal(matrix(x), F.linear(x, dense(), matrix.bias))
    matrix.train()
    assert matrix._packing._whole is None
    matrix(x).sum().backward()
    assert matrix.latent.grad is not None
    with torch.no_grad():
        matrix(x)
    assert matrix._packing._whole is None  # training keeps none


def test_training_forgets_it_and_learns_as_before():
    matrix = made(OPTIONS["blocks of 32"][0])
    x = tokens(matrix)
    with torch.no_grad():
        before = matrix.packed(x)
        matrix.train()
        assert matrix.packed(x) is None
        matrix.eval()
        again = matrix.packed(x)
    assert before is not again
    assert torch.equal(before.values, again.values)
    matrix(x).sum().backward()  # weights that want a gradient get one, in evaluation too
    assert torch.equal(matrix.latent.grad, matrix.mask * x.expand_as(matrix.latent))


@pytest.mark.parametrize("name", ["blocks of 32", "n_m"])
def test_tokens_have_gradients_through_frozen_weights(name):
    matrix = made(OPTIONS[name][0]).requires_grad_(False)
    with torch.inference_mode():
        matrix(tokens(matrix))  # what is packed here is used below
    x = tokens(matrix).requires_grad_()
    assert matrix.packed(x) is not None
    (found,) = torch.autograd.grad(matrix(x).sum(), x)
    torch.testing.assert_close(found[0], matrix.dense().sum(0), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_is_no_part_of_anything_that_is_kept():
    matrix = made(OPTIONS["blocks of 32"][0])
    names = list(matrix.state_dict())
    assert matrix.packed(tokens(matrix)) is not None
    assert list(matrix.state_dict()) == names == ["bias", "latent", "mask"]
    twin = copy.deepcopy(matrix)
    assert twin._packing._packed is None
    half = copy.deepcopy(matrix).bfloat16()
    x = tokens(matrix)
    assert half.packed(x.bfloat16()).values.dtype == torch.bfloat16
    assert half.packed(x) is None  # whose dtype is another: torch says so
    assert twin.packed(x) is not None


@torch.no_grad()
def test_what_is_left_to_whole_products():
    x = torch.randn(1, 64)
    single = made(Pruned(sparsity=0.9))  # zeros anywhere
    dense = made(NM(n=2, m=4, leak="linear"))  # where nothing is zero yet
    wide = made(NM(n=4, m=16))
    many = made(Pruned(block=32, sparsity=0.1))
    for matrix in (single, dense, wide, many):
        assert matrix.packed(x) is None
        assert torch.equal(matrix(x), F.linear(x, matrix.dense(), matrix.bias))
    dense.progress.fill_(1.0)
    assert dense.packed(x) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense.packed(x) is None
    with moezoo_kernels.use("torch"):
        assert dense.packed(x) is None
    assert dense.double().packed(x.double()) is None
    compiled = torch.compile(made(Pruned(block=32)), fullgraph=True, backend="eager")
    assert compiled(x).shape == (1, 96)
    assert not isinstance(build_matrix(LowRank(rank=2), 8, 8, False), Latent)


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_evaluates_as_its_reference(gated):
    torch.manual_seed(0)
    block = moezoo.DenseFFN(
        64, 96, gated=gated, bias=True, matrices=Pruned(block=16, sparsity=0.8)
    ).eval()
    for projection in block.projections().values():
        torch.nn.init.normal_(projection.bias)
    x = torch.randn(2, 3, 64)
    assert block.down_proj.packed(block.inner(x)) is not None
    wanted = block.double().reference(x.double()).hidden
    block.float()
    for found in (block(x).hidden, block.infer(x)):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
