"""Products of sparse factors, and sparse matrices beside a product of low rank."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import moezoo
from moezoo import InputError
from moezoo.matrices import Doped, Factorized, Parallel, Pruned, build_matrix

SIZE = (24, 40)
FORMS = {
    "factorized": Factorized(sparsity=0.6, growth=0.4, every=2),
    "factorized_blocks": Factorized(sparsity=0.5, block=4, scope="matrix"),
    "doped": Doped(sparsity=0.6, growth=0.4, every=2),
    "doped_gradual": Doped(sparsity=0.5, start=0.1, end=0.6, every=1, rank=3),
}


def make(options, size=SIZE, bias=True):
    torch.manual_seed(0)
    matrix = build_matrix(options, *size, bias).double().train()
    matrix.reset_parameters(size[0] ** -0.5)
    return matrix


def masks(matrix):
    return {name: t.clone() for name, t in matrix.state_dict().items() if name.endswith("mask")}


def train(matrix, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(9, SIZE[0], dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (matrix(x) ** 2).sum().backward()
        optimizer.step()
        matrix.step((step + 1) / 20)


@pytest.mark.parametrize("form", FORMS)
def test_forward_on_the_identity_is_the_dense_matrix(form):
    matrix = make(FORMS[form])
    torch.nn.init.normal_(matrix.bias)
    found = matrix(torch.eye(SIZE[0], dtype=torch.float64)) - matrix.bias
    torch.testing.assert_close(found.t(), matrix.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("kind", [Factorized, Doped])
def test_what_counts_is_as_much_as_in_a_dense_matrix(kind, sparsity):
    """A count of branches, round(1 / (1 - s)), would be 2 at 0.6, and 0.8 of the operations."""
    matrix = make(kind(sparsity=sparsity), (96, 160), bias=False)
    active = matrix.cost().active_parameters
    kept = sum(int(mask.sum()) for mask in masks(matrix).values())
    dense = sum(p.numel() for name, p in matrix.named_parameters() if "latent" not in name)
    assert active == kept + dense
    assert active == pytest.approx(96 * 160, rel=0.03)


@pytest.mark.parametrize("kind", [Factorized, Doped])
def test_it_begins_with_a_dense_matrixs_variance(kind):
    matrix = make(kind(sparsity=0.75), (128, 384), bias=False)
    assert (matrix.dense().square().sum() / 384).item() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("form", ["factorized", "doped", "doped_gradual"])
def test_masks_move_and_a_run_goes_on_from_a_checkpoint_bit_for_bit(form):
    def fresh():
        matrix = make(FORMS[form])
        return matrix, torch.optim.AdamW(matrix.parameters(), lr=0.03)

    whole, optimizer = fresh()
    begun = masks(whole)
    train(whole, optimizer, range(5))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, range(5, 12))
    for name, mask in masks(whole).items():
        assert not torch.equal(mask, begun[name]), name
        weights = whole.state_dict()[name.replace("mask", "latent")]
        assert not weights[~mask].any()
    resumed, other = fresh()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, range(5, 12))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_schedule_wants_to_know_how_far_the_run_is():
    for kind in (Factorized, Doped):
        layer = moezoo.DenseFFN(24, 32, matrices=kind(growth=0.3))
        with pytest.raises(InputError, match=r"step: matrices with a schedule"):
            layer.step()
        moezoo.DenseFFN(24, 32, matrices=kind()).step()


def test_options_are_those_of_a_pruned_matrix_and_a_rank():
    options = {"kind": "doped", "sparsity": 0.5, "block": 4, "rank": 3}
    layer = moezoo.DenseFFN(24, 32, matrices=options)
    assert layer.matrices == Doped(sparsity=0.5, block=4, rank=3)
    assert layer.config()["init_args"]["matrices"]["kind"] == "doped"
    assert type(moezoo.DenseFFN(24, 32, matrices={"kind": "pruned"}).matrices) is Pruned


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (Factorized(rank=0), "matrices.rank: 0 is out of range"),
        (Factorized(rank=6, block=4), "matrices.block: a width of the block, 6, is no multiple"),
        (Factorized(sparsity=1.0), "matrices.sparsity: 1 is out of range"),
        (Doped(block=5), "matrices.block: a width of the block, 24, is no multiple of 5"),
        (Doped(rank=1.5), "matrices.rank: 1.5 is not a whole number"),
    ],
)
def test_mistakes_are_named(matrices, message):
    with pytest.raises(InputError, match=message):
        moezoo.DenseFFN(24, 32, matrices=matrices)


@pytest.mark.parametrize("gated", [True, False])
def test_parallel_units_are_the_papers_sum(gated):
    """``y = Σ_i D_i h``, ``h = Σ_j f(W_j x)``: written out, from the latent weights and masks."""
    torch.manual_seed(0)
    layer = moezoo.DenseFFN(
        12, 3 * 20, gated=gated, bias=True, matrices=Parallel(sparsity=0.6, branches=3)
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)

    def branch(matrix, number):
        rows = slice(20 * number, 20 * (number + 1))
        return x @ (matrix.latent[rows] * matrix.mask[rows]).t() + matrix.bias[rows]

    hidden = 0.0
    for number in range(3):
        value = branch(layer.up_proj, number)
        gate = branch(layer.gate_proj, number) if gated else value
        hidden = hidden + torch.nn.functional.silu(gate) * (value if gated else 1.0)
    answer = layer.down_proj.bias
    for part in layer.down_proj.branches:
        answer = answer + hidden @ (part.latent * part.mask).t()
    found = layer(x).hidden
    torch.testing.assert_close(found, answer, rtol=1e-12, atol=1e-11)
    leaves = (x, *layer.parameters())
    slope = torch.randn(7, 12, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, leaves, slope) for y in (found, answer))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)
    # A stock block of all neurons computes the same.
    plain = layer.take(torch.arange(60))
    torch.testing.assert_close(plain(x).hidden, answer, rtol=1e-12, atol=1e-11)


def changes_of(matrix):
    """Return everything that changes a matrix of branches."""
    other = copy.deepcopy(matrix)
    last = matrix.branches[-1]
    with torch.no_grad():
        other.branches[0].latent.neg_().add_(0.1)
        other.branches[1].mask.copy_(other.branches[1].mask.roll(1, 0))

    def add():
        with torch.no_grad():
            last.latent.mul_(2.0)

    def move():
        last.mask.copy_(last.mask.roll(1, 0))

    def learn():
        optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.1)
        matrix(torch.ones(2, matrix.in_features, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    def replace():
        last.latent = torch.nn.Parameter(last.latent.detach() + 1.0)

    def swap():
        matrix.branches[0] = other.branches[0]

    def round_off():
        matrix.float().double()  # perhaps into the same memory

    def train():
        matrix.train()
        with torch.no_grad():
            matrix.branches[0].latent.add_(1.0)
        matrix.eval()

    load = functools.partial(matrix.load_state_dict, other.state_dict())
    return add, move, learn, load, replace, swap, round_off, train


def test_parallel_branches_are_added_up_once_until_something_changes(monkeypatch):
    options = Parallel(sparsity=0.6, branches=3)
    matrix = build_matrix(options, 30, 7, True, reads_hidden=True).double().eval()
    matrix.reset_parameters(0.1)
    with torch.no_grad():
        matrix.bias.normal_()
        for branch in matrix.branches:
            branch.latent.add_(0.3)  # outside the masks, too
    x, counts, added = torch.randn(5, 30, dtype=torch.float64), [], matrix._added
    monkeypatch.setattr(matrix, "_added", lambda: counts.append(1) or added())

    def wanted():
        total = sum(branch.latent * branch.mask for branch in matrix.branches)
        return F.linear(x.view(5, 3, 10).sum(1), total.detach(), matrix.bias.detach())

    for change in (lambda: None, *changes_of(matrix)):
        change()
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(matrix(x), wanted(), rtol=1e-13, atol=1e-13)
        counts.clear()
        with torch.no_grad():
            kept = matrix(x)
        assert not counts
        assert torch.equal(kept, F.linear(x.view(5, 3, 10).sum(1), added(), matrix.bias))
    with torch.inference_mode():
        torch.testing.assert_close(matrix(x), wanted(), rtol=1e-13, atol=1e-13)
    assert not counts
    assert set(matrix.state_dict()) == {"bias"} | {
        f"branches.{n}.{name}" for n in range(3) for name in ("latent", "mask")
    }
    assert copy.deepcopy(matrix)._packing._whole is None

    # What learns is never kept, in evaluation neither; frozen weights let gradients through.
    matrix.zero_grad()
    matrix(x).sum().backward()
    assert counts
    for branch in matrix.branches:
        torch.testing.assert_close(
            branch.latent.grad, branch.mask * x.view(5, 3, 10).sum((0, 1)).expand(7, 10)
        )
    matrix.requires_grad_(False)
    (found,) = torch.autograd.grad(matrix(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(found[0], matrix.dense().sum(0))
    matrix.train()
    assert matrix._packing._whole is None
    with torch.no_grad():
        matrix(x)
        matrix(x)
    assert matrix._packing._whole is None


@pytest.mark.parametrize("branches", [None, 2])
def test_parallel_branches_keep_a_dense_blocks_products_and_variance(branches):
    options = Parallel(sparsity=0.75, branches=branches)
    count = options.count
    matrix = build_matrix(options, count * 64, 96, False, reads_hidden=True)
    matrix.reset_parameters((count * 64) ** -0.5)
    cost = matrix.cost()
    assert cost.active_parameters == count * 64 * 96 // 4
    assert cost.total_parameters == count * 64 * 96
    assert cost.flops_per_token == 2 * 64 * 96
    assert count == (4 if branches is None else 2)
    assert (matrix.dense().square().sum() / 96).item() == pytest.approx(1.0, abs=0.1)
    matrix.step(0.5)
    assert torch.equal(matrix.dense()[:, :64], matrix.dense()[:, -64:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Parallel(sparsity=0.6), r"matrices.branches: 1 / \(1 - sparsity\) is 2.5; give a number"),
        (Parallel(branches=0), "matrices.branches: 0 is out of range"),
        (Parallel(branches=7), "matrices.branches: a width of the block, 64, is no multiple of 7"),
        (Parallel(block=8, branches=16), "matrices.block: a width of the block, 4, is no multiple"),
    ],
)
def test_mistakes_in_branches_are_named(options, message):
    with pytest.raises(InputError, match=message):
        moezoo.DenseFFN(24, 64, matrices=options)
