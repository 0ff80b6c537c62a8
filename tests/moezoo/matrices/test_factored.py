"""Factored matrices: what they multiply to, how they begin, and the guide beside them."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo
from moezoo import InputError
from moezoo.matrices import BlockDense, BlockShuffle, LowRank, build_matrix
from moezoo_kernels.linear import is_plain_linear

SIZES = [(24, 36), (36, 24)]
FORMS = {
    "low_rank": LowRank(rank=7),
    "low_rank_normal": LowRank(rank=7, init="normal"),
    "block_dense": BlockDense(blocks=3, rank=9),
    "block_shuffle": BlockShuffle(blocks=3),
    "block_shuffle_of_four": BlockShuffle(blocks=4),
}
GUIDED = {
    "low_rank": LowRank(rank=7, guide=0.5),
    "block_dense": BlockDense(blocks=3, rank=9, guide=0.5),
    "block_shuffle": BlockShuffle(blocks=3, guide=0.5),
}


def make(options, size=(24, 36), bias=True):
    torch.manual_seed(0)
    matrix = build_matrix(options, *size, bias).double()
    matrix.reset_parameters(size[0] ** -0.5)
    if bias:
        torch.nn.init.normal_(matrix.bias)
    return matrix


def tokens(width, count=11):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_forward_on_the_identity_is_the_dense_matrix(form, size):
    matrix = make(FORMS[form], size)
    found = matrix(torch.eye(size[0], dtype=torch.float64)) - matrix.bias
    torch.testing.assert_close(found.t(), matrix.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_cost_is_what_torch_counts(form, size):
    matrix, x = make(FORMS[form], size), tokens(size[0])
    with FlopCounterMode(display=False) as counter:
        matrix(x)
    cost = matrix.cost()
    assert counter.get_total_flops() == len(x) * cost.flops_per_token
    assert cost.total_parameters == sum(p.numel() for p in matrix.parameters())
    assert cost.active_parameters == cost.total_parameters


def test_numbers_of_parameters_are_the_papers():
    assert make(LowRank(rank=6), bias=False).cost().total_parameters == 6 * (24 + 36)
    found = make(BlockDense(blocks=3, rank=9), bias=False).cost().total_parameters
    assert found == 24 * 9 // 3 + 9 * 36
    found = make(BlockShuffle(blocks=3), bias=False).cost().total_parameters
    assert found == 24 * (24 + 36) // 3


@pytest.mark.parametrize("size", SIZES)
def test_the_rank_is_the_rank(size):
    for options, rank in ((LowRank(rank=7), 7), (BlockDense(blocks=3, rank=9), 9)):
        assert torch.linalg.matrix_rank(make(options, size).dense()) == rank
    assert torch.linalg.matrix_rank(make(BlockShuffle(blocks=3), size).dense()) == 24


def test_a_shuffle_mixes_the_blocks():
    """Without it the product of two block-diagonal factors would be block-diagonal."""
    matrix = make(BlockShuffle(blocks=3), (24, 24), bias=False)
    assert (matrix.dense() != 0).all()
    unshuffled = torch.block_diag(*matrix.second) @ torch.block_diag(*matrix.first)
    error = (unshuffled - matrix.dense()).norm() / matrix.dense().norm()
    assert error > 1.2  # as far apart as two unrelated operators


def test_spectral_init_keeps_the_kept_spectrums_variance_and_normal_all_of_it():
    torch.manual_seed(0)
    kept = {}
    for init in ("spectral", "normal"):
        matrix = build_matrix(LowRank(rank=32, init=init), 128, 512, False)
        matrix.reset_parameters(128**-0.5)
        kept[init] = (matrix.dense().square().sum() / 512).item()
    drawn = torch.linalg.svdvals(torch.randn(512, 128) * 128**-0.5).square()
    assert kept["spectral"] == pytest.approx((drawn[:32].sum() / 512).item(), rel=0.02)
    assert kept["spectral"] < 0.5
    assert kept["normal"] == pytest.approx(1.0, abs=0.06)


def test_blocks_begin_orthogonal():
    matrix = make(BlockShuffle(blocks=3), (24, 36))
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    for factor in (matrix.first, matrix.second):
        torch.testing.assert_close(factor.transpose(1, 2) @ factor, eye)


@pytest.mark.parametrize("form", GUIDED)
def test_a_guide_begins_as_the_product(form):
    matrix, x = make(GUIDED[form]), tokens(24)
    assert matrix.train().guided_share() == 1.0
    torch.testing.assert_close(matrix.train()(x), matrix.eval()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", GUIDED)
def test_a_guide_acts_in_training_alone_by_half_a_cosine(form):
    matrix, x = make(GUIDED[form]), tokens(24)
    with torch.no_grad():
        matrix.guide.normal_()
    own, dense = matrix.eval()(x), matrix.dense()
    guide = x @ matrix.guide.t() + matrix.bias
    shares = {0.0: 1.0, 0.125: 0.5 + 0.125**0.5, 0.25: 0.5, 0.5: 0.0, 0.9: 0.0}
    for progress, share in shares.items():
        matrix.step(progress)
        assert float(matrix.guided_share()) == pytest.approx(share, abs=1e-12)
        expected = share * guide + (1 - share) * own
        torch.testing.assert_close(matrix.train()(x), expected, rtol=0, atol=1e-12)
        assert torch.equal(matrix.eval()(x), own)
    assert torch.equal(matrix.dense(), dense)


@pytest.mark.parametrize("form", GUIDED)
def test_an_ended_guide_learns_nothing_and_costs_no_product(form):
    matrix, x = make(GUIDED[form]).train(), tokens(24)
    matrix.step(0.6)
    with FlopCounterMode(display=False) as counter:
        matrix(x).sum().backward()
    # Three products with each factor, but that x wants no gradient of the first.
    products = 3 * matrix.cost().flops_per_token - 2 * matrix.first.numel()
    assert counter.get_total_flops() == len(x) * products
    assert matrix.guide.grad is not None  # DDP waits for one
    assert not matrix.guide.grad.any()
    resumed = make(GUIDED[form]).train()
    resumed.load_state_dict(matrix.state_dict())
    torch.testing.assert_close(resumed(x), matrix(x), rtol=0, atol=0)


def test_the_guide_is_no_part_of_the_cost_and_of_a_plain_block():
    layer = moezoo.DenseFFN(24, 36, matrices=LowRank(rank=7, guide=0.5))
    without = moezoo.DenseFFN(24, 36, matrices=LowRank(rank=7))
    one, other = layer.cost(), without.cost()
    assert one.total_parameters == other.total_parameters + 3 * 24 * 36
    assert one.active_parameters == other.active_parameters
    assert one.flops_per_token == other.flops_per_token
    x = torch.randn(5, 24)
    plain = layer.eval().take(torch.arange(36))
    assert plain.matrices is None
    torch.testing.assert_close(plain(x).hidden, layer(x).hidden, rtol=1e-5, atol=1e-6)


def test_a_dense_block_without_matrices_is_llamas():
    layer = moezoo.DenseFFN(24)
    assert set(layer.state_dict()) == {f"{n}_proj.weight" for n in ("gate", "up", "down")}
    assert all(is_plain_linear(p) for p in layer.projections().values())


def test_a_schedule_wants_to_know_how_far_the_run_is():
    layer = moezoo.DenseFFN(24, matrices=LowRank(guide=0.5))
    with pytest.raises(InputError, match=r"step: matrices with a schedule"):
        layer.step()
    layer.step(0.1)
    moezoo.DenseFFN(24, matrices=LowRank()).step()
    assert math.isclose(float(layer.up_proj.progress), 0.1, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (LowRank(rank=25), "matrices.rank: 25 is out of range"),
        (LowRank(init="svd"), "matrices.init: 'svd' is not known"),
        (LowRank(guide=1.5), "matrices.guide: 1.5 is out of range"),
        (BlockDense(blocks=5), "matrices.blocks: a width of the block, 24, is no multiple of 5"),
        (BlockDense(rank=6), "matrices.rank: 6 is no multiple of blocks, 4"),
        (BlockShuffle(blocks=0), "matrices.blocks: 0 is out of range"),
        (BlockShuffle(blocks=24), "matrices.blocks: a width of the block, 64, is no multiple"),
        ({"kind": "low_rang"}, "matrices.kind: 'low_rang' is not known; did you mean 'low_rank'"),
        ({"kind": "low_rank", "ranks": 3}, "matrices: unknown option 'ranks'; did you mean 'rank'"),
        ("low_rank", "matrices: 'low_rank' is not a mapping of options"),
    ],
)
def test_mistakes_are_named(matrices, message):
    with pytest.raises(InputError, match=message):
        moezoo.DenseFFN(24, matrices=matrices)


def test_a_guide_that_has_ended_does_not_come_back_in_a_later_run():
    matrix, x = make(GUIDED["low_rank"]).train(), tokens(24)
    with torch.no_grad():
        matrix.guide.normal_()
    matrix.step(1.0)
    again = make(GUIDED["low_rank"]).train()
    again.load_state_dict(matrix.state_dict())
    again.step(0.01)
    assert torch.equal(again(x), matrix.eval()(x))


@pytest.mark.parametrize("rows", [(0,), (1,), (3, 5)])
def test_products_in_place_are_those_of_batches_and_so_are_their_gradients(rows):
    from moezoo.matrices.blocks import batched, by_blocks

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*rows, 12, dtype=torch.float64, generator=generator)
    blocks = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    slope = torch.randn(*rows, 15, dtype=torch.float64, generator=generator)
    for leaves in ((x, blocks), (x,), (blocks,)):
        for leaf in (x, blocks):
            leaf.requires_grad_(any(leaf is one for one in leaves))
        ours, theirs = by_blocks(x, blocks), batched(x.reshape(-1, 12), blocks).reshape(*rows, 15)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        found, expected = (torch.autograd.grad(y, leaves, slope) for y in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    if rows == (3, 5):
        x.requires_grad_()
        assert torch.autograd.gradgradcheck(by_blocks, (x, blocks), atol=1e-6)
