"""Flat block butterflies beside a product of low rank: their pattern, size, start and cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo
from moezoo import InputError
from moezoo.matrices import Pixelfly, build_matrix

SIZES = [(24, 40), (40, 24)]
FORMS = {
    "default": Pixelfly(),
    "one_factor": Pixelfly(size=4, factors=1, rank=5, mix="half"),
    "all_factors": Pixelfly(size=8, factors=3, rank=3),
}


def make(options, size, bias=True):
    torch.manual_seed(0)
    matrix = build_matrix(options, *size, bias).double()
    matrix.reset_parameters(size[0] ** -0.5)
    if bias:
        torch.nn.init.normal_(matrix.bias)
    return matrix


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_it_multiplies_by_the_dense_matrix_and_costs_what_torch_counts(form, size):
    matrix = make(FORMS[form], size)
    identity = torch.eye(size[0], dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found = matrix(identity) - matrix.bias
    torch.testing.assert_close(found.t(), matrix.dense(), rtol=0, atol=1e-12)
    cost = matrix.cost()
    assert counter.get_total_flops() == size[0] * cost.flops_per_token
    assert cost.total_parameters == sum(p.numel() for p in matrix.parameters())
    assert cost.active_parameters == cost.total_parameters


@pytest.mark.parametrize("form", FORMS)
def test_the_blocks_lie_where_a_product_of_butterfly_factors_has_its_first_terms(form):
    options = FORMS[form]
    matrix = make(options, (24, 40))
    with torch.no_grad():
        matrix.second.zero_()
    n = options.size
    found = (matrix.dense() != 0).reshape(n, 40 // n, n, 24 // n).transpose(1, 2)
    assert torch.equal(found.all(dim=(2, 3)), found.any(dim=(2, 3)))
    butterfly = torch.zeros(n, n, dtype=torch.bool)
    for half in (2**f for f in range(options.factors)):
        for i in range(n):
            for j in range(n):  # two halves of 2 half neighbours, joined by four diagonals
                together = i // (2 * half) == j // (2 * half)
                butterfly[i, j] |= together and abs(i - j) in (0, half)
    assert torch.equal(found.all(dim=(2, 3)), butterfly)
    assert butterfly.sum(1).tolist() == butterfly.sum(0).tolist() == [options.factors + 1] * n


def test_numbers_of_parameters():
    cost = make(Pixelfly(size=8, factors=2), (48, 96), bias=False).cost()
    blocks = 48 * 96 * 3 // 8
    rank = blocks // (2 * (48 + 96))  # half as many numbers as the blocks have
    assert cost.total_parameters == blocks + rank * (48 + 96) + 1
    assert cost.flops_per_token == 2 * (cost.total_parameters - 1)


@pytest.mark.parametrize("mix", ["learned", "half"])
def test_both_parts_begin_with_half_of_a_dense_matrixs_variance(mix):
    matrix = make(Pixelfly(size=16, rank=24, mix=mix), (128, 512), bias=False)
    whole = matrix.dense()
    with torch.no_grad():
        matrix.second.zero_()
    butterfly = matrix.dense()
    assert (whole.square().sum() / 512).item() == pytest.approx(1.0, abs=0.06)
    assert (butterfly.square().sum() / 512).item() == pytest.approx(0.5, abs=0.03)


def test_the_mix_is_trained_and_not_decayed():
    layer = moezoo.DenseFFN(24, matrices=Pixelfly())
    groups = {group.name: group for group in layer.parameter_groups()}
    assert any(layer.up_proj.mix is p for p in groups["vectors"].parameters)
    assert not groups["vectors"].weight_decay
    matrix = make(Pixelfly(), (24, 40))
    x = torch.randn(5, 24, dtype=torch.float64)
    matrix(x).sum().backward()
    before = matrix.mix.grad.item()
    with torch.no_grad():
        ends = []
        for share in (1.0, 0.0):
            matrix.mix.fill_(share)
            ends.append(matrix(x).sum().item())
    assert before == pytest.approx(ends[0] - ends[1], rel=1e-9)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (Pixelfly(size=6), "matrices.size: 6 is no power of two"),
        (Pixelfly(size=1), "matrices.size: 1 is out of range"),
        (Pixelfly(size=16), "matrices.size: a width of the block, 24, is no multiple of 16"),
        (
            Pixelfly(factors=4),
            "matrices.factors: 4 is out of range; give .* ≤ 3",
        ),
        (Pixelfly(rank=25), "matrices.rank: 25 is out of range"),
        (Pixelfly(mix="token"), "matrices.mix: 'token' is not known"),
    ],
)
def test_mistakes_are_named(matrices, message):
    with pytest.raises(InputError, match=message):
        moezoo.DenseFFN(24, matrices=matrices)
