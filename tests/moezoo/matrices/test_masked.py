"""Sparse matrices: what is kept, what learns, and that both go on as they stood."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import moezoo
from moezoo import InputError
from moezoo.matrices import NM, Pruned, SoftNM, Transposable, build_matrix, rules

SIZE = (24, 16)


def make(options, size=SIZE, bias=False):
    torch.manual_seed(0)
    matrix = build_matrix(options, *size, bias).double().train()
    matrix.reset_parameters(size[0] ** -0.5)
    return matrix


def tokens(count=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIZE[0], dtype=torch.float64, generator=generator)


def gradient_of_dense(dense, x):
    """The gradient of a dense matrix of these values, for the loss that train() takes."""
    dense = dense.detach().requires_grad_()
    (F.linear(x, dense) ** 2).sum().backward()
    return dense.grad


def train(matrix, optimizer, x, progress=None):
    optimizer.zero_grad()
    ((matrix(x) ** 2).sum() + sum(matrix.losses().values())).backward()
    optimizer.step()
    matrix.step(progress)


METHODS = {
    "sr_ste": NM(decay=2e-4),
    "sdgf": NM(stages="step"),
    "mdgf": NM(leak="linear", end=0.5),
    "fst": Transposable(every=3),
    "s_ste": SoftNM(),
    "spdf": Pruned(sparsity=0.75, dense_from=0.6),
    "rigl": Pruned(sparsity=0.8, growth=0.3, every=3),
    "gradual": Pruned(sparsity=0.8, start=0.1, end=0.7, every=2),
    "blast": Pruned(sparsity=0.7, block=4, end=0.6, growth=0.3, every=2, scope="matrix"),
}


@pytest.mark.parametrize("name", METHODS)
def test_forward_on_the_identity_is_the_dense_matrix(name):
    matrix = make(METHODS[name])
    found = matrix(torch.eye(SIZE[0], dtype=torch.float64))
    torch.testing.assert_close(found.t(), matrix.dense(), rtol=0, atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        matrix.eval()(tokens())
    assert counter.get_total_flops() == 11 * matrix.cost().flops_per_token


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name):
    def fresh():
        matrix = make(METHODS[name])
        return matrix, torch.optim.AdamW(matrix.parameters(), lr=0.05)

    def go_on(matrix, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            train(matrix, optimizer, tokens(seed=step), (step + 1) / 20)

    whole, optimizer = fresh()
    go_on(whole, optimizer, range(7))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    moved = copy.deepcopy(whole)
    go_on(whole, optimizer, range(7, 20))
    resumed, other = fresh()
    with torch.no_grad():
        resumed.latent.normal_()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert torch.equal(moved.dense(), resumed.dense())
    go_on(resumed, other, range(7, 20))
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_the_gradient_of_sr_ste_is_the_papers():
    matrix, x = make(NM(n=1, m=4, decay=0.3)), tokens()
    mask = rules.best_of_group(matrix.latent.detach().abs(), 1, 4)
    assert torch.equal(matrix.mask, mask)
    loss = (matrix(x) ** 2).sum() + matrix.losses()["masked_decay"]
    loss.backward()
    straight = gradient_of_dense(matrix.latent * mask, x)
    expected = straight + 0.3 * matrix.latent.detach() * ~mask
    torch.testing.assert_close(matrix.latent.grad, expected, rtol=1e-12, atol=0)


def test_decay_is_added_once_to_a_step_of_several_micro_batches():
    matrix, x = make(NM(decay=0.3)), tokens(12)
    ((matrix(x) ** 2).sum() / 12 + matrix.losses()["masked_decay"]).backward()
    whole, matrix.latent.grad = matrix.latent.grad, None
    for part in x.split(4):
        (((matrix(part) ** 2).sum() / 4 + matrix.losses()["masked_decay"]) / 3).backward()
    torch.testing.assert_close(matrix.latent.grad, whole, rtol=1e-12, atol=1e-14)


def test_the_mask_of_n_of_m_follows_the_weights_after_a_step():
    matrix, x = make(NM()), tokens()
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.02)
    before = matrix.mask.clone()
    for _ in range(5):
        train(matrix, optimizer, x)
        assert torch.equal(matrix.mask, rules.best_of_group(matrix.latent.abs(), 2, 4))
    assert not torch.equal(matrix.mask, before)
    assert torch.equal(matrix.dense() != 0, matrix.mask)


def test_stages_of_sdgf_are_equal_parts_of_the_run():
    matrix = make(NM(n=1, m=8, stages="step", start=0.2, end=0.8))
    kept = []
    for progress in (0.0, 0.19, 0.21, 0.36, 0.51, 0.66, 0.79, 0.9, 1.0):
        matrix.step(progress)
        kept.append(set(matrix.mask.reshape(-1, 8).sum(1).tolist()))
    assert kept == [{8}, {8}, {7}, {4}, {2}, {1}, {1}, {1}, {1}]
    fine = build_matrix(NM(stages="fine"), 64, 4, False)
    fine.reset_parameters(0.1)
    for progress, width in ((0.1, 32), (0.3, 16), (0.6, 8), (0.9, 4)):
        fine.step(progress)
        assert fine.mask.reshape(-1, width).sum(1).unique().tolist() == [width // 2]


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_mdgf_leaks_less_and_less_and_evaluates_what_it_trains(kind):
    matrix = make(NM(leak=kind, start=0.2, end=0.7))
    outside = ~matrix.mask
    shares = []
    for progress in (0.1, 0.2, 0.45, 0.7, 0.9):
        matrix.step(progress)
        ratio = (matrix.dense() / matrix.latent)[outside]
        shares.append(ratio.mean().item())
        assert torch.equal(matrix.dense()[matrix.mask], matrix.latent[matrix.mask])
        assert torch.equal(matrix.train()(tokens()), matrix.eval()(tokens()))
    half = 0.5 if kind == "linear" else 2.718281828**-2.5
    assert shares == pytest.approx([1, 1, half, 0, 0], rel=1e-5)


def test_fst_moves_its_mask_every_so_many_steps_and_ends_dense():
    matrix, x = make(Transposable(every=3, dense_from=0.7)), tokens(12)
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.02)
    moved = []
    for step in range(1, 11):
        before = matrix.mask.clone()
        train(matrix, optimizer, x, step / 10)
        moved.append(not torch.equal(matrix.mask, before))
        if step < 7:
            assert matrix.mask.reshape(-1, 4).sum(1).unique().tolist() == [2]
            assert matrix.mask.t().reshape(-1, 4).sum(1).unique().tolist() == [2]
    assert moved == [False, False, True, False, False, True, True, False, False, False]
    assert matrix.mask.all()
    assert not matrix.losses()["masked_decay"]
    matrix.latent.grad = None
    (matrix(x) ** 2).sum().backward()
    exact = gradient_of_dense(matrix.latent, x)
    torch.testing.assert_close(matrix.latent.grad, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [Transposable(decay=0.0), SoftNM()], ids=["fst", "s_ste"])
def test_sampled_gradients_average_to_the_straight_through_one(options):
    matrix, x = make(options), tokens(9)
    exact = gradient_of_dense(matrix.dense(), x)
    draws = []
    for seed in range(400):
        torch.manual_seed(seed)
        matrix.latent.grad, read = None, x.clone().requires_grad_()
        (matrix(read) ** 2).sum().backward()
        draws.append(matrix.latent.grad)
    found = torch.stack(draws)
    error = (found.mean(0) - exact).abs()
    limit = found.std(0) / 400**0.5
    assert (error <= 5 * limit + 1e-9).all()
    assert (error <= limit + 1e-9).double().mean() > 0.6  # 68 % of a normal
    torch.testing.assert_close(read.grad, 2 * (x @ matrix.dense().t()) @ matrix.dense())


def test_s_ste_is_continuous_and_its_scale_stays():
    matrix = make(SoftNM(), (1024, 64))
    assert matrix.scale.item() == pytest.approx(1.483, abs=0.02)
    assert ((matrix.dense() != 0).reshape(-1, 4).sum(1) == 2).all()
    w = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.float64)
    small = build_matrix(SoftNM(), 4, 1, False).double()
    with torch.no_grad():
        small.scale.fill_(2.0)
        small.latent.copy_(w)
        torch.testing.assert_close(small.dense(), torch.tensor([[0.0, -2, 4, 0]]).double())
        small.latent[0, 0] = 2.0 + 1e-9  # two magnitudes change places
        torch.testing.assert_close(small.dense(), torch.tensor([[0.0, 0, 2, 0]]).double())
    small.step()
    assert small.scale == 2.0


def best(values, count):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest(scope):
    options = Pruned(sparsity=0.75, growth=0.5, every=2, scope=scope)
    matrix, x = make(options), tokens()
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    shape = (16, 24) if scope == "row" else (1, 16 * 24)
    kept = shape[1] // 4
    for step in range(1, 9):
        before, dense = matrix.mask.clone(), matrix.dense().detach().clone()
        optimizer.zero_grad()
        (matrix(x) ** 2).sum().backward()
        slope = gradient_of_dense(dense, x)
        listening = step % 2 == 0
        heard = slope if listening else slope * before
        torch.testing.assert_close(matrix.latent.grad, heard, rtol=1e-12, atol=1e-14)
        optimizer.step()
        size = (matrix.latent.detach() * before).abs()
        matrix.step(step / 20)
        assert torch.equal(matrix.latent, matrix.latent * matrix.mask)
        assert matrix.mask.reshape(shape).sum(1).unique().tolist() == [kept]
        if not listening:
            assert torch.equal(matrix.mask, before)
            continue
        share = 0.5 * (1 + math.cos(math.pi * step / 20 / 0.75)) / 2
        grown = int(share * kept)
        rows = zip(*(t.reshape(shape).tolist() for t in (before, size, slope.abs())), strict=True)
        for (had, magnitude, gradient), now in zip(rows, matrix.mask.reshape(shape), strict=True):
            alive = [m if h else -1.0 for h, m in zip(had, magnitude, strict=True)]
            stay = set(best(alive, kept - grown))
            others = [-1.0 if i in stay else g for i, g in enumerate(gradient)]
            assert set(now.nonzero().flatten().tolist()) == stay | set(best(others, grown))
        new = matrix.mask & ~before
        assert new.any()
        assert not matrix.latent[new].any()  # they start at zero


def test_growth_ends_and_is_not_listened_to_any_more():
    matrix, x = make(Pruned(growth=0.5, growth_end=0.5, every=2)), tokens()
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.01)
    heard = []
    for step in range(1, 13):
        before = matrix.mask.clone()
        train(matrix, optimizer, x, step / 12)
        heard.append(bool(matrix.latent.grad[~before].any()))
    assert heard == [False, True, False, True, False, True, *[False] * 6]


def test_weights_outside_a_static_mask_are_as_if_they_were_not_there():
    matrix, x = make(Pruned(sparsity=0.5)), tokens()
    mask = matrix.mask.clone()
    # Their variance is that of the inputs that a neuron has, and not of all.
    assert matrix.latent[mask].std().item() == pytest.approx((1 / 12) ** 0.5, rel=0.15)
    assert matrix.mask.sum(1).unique().tolist() == [12]
    optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(4):
        train(matrix, optimizer, x)
        assert not matrix.latent.grad[~mask].any()
    assert torch.equal(matrix.mask, mask)
    assert torch.equal(matrix.latent != 0, mask)
    assert not matrix.scheduled


def test_the_dense_phase_of_spdf_begins_with_the_same_numbers():
    matrix, x = make(Pruned(sparsity=0.75, dense_from=0.5)), tokens()
    optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.05)
    train(matrix, optimizer, x, 0.4)
    dead, before = ~matrix.mask, matrix(x)
    matrix.latent.data[dead] = 7.0  # whatever an optimizer did
    matrix.step(0.5)
    assert matrix.mask.all()
    assert torch.equal(matrix(x), before)
    assert not matrix.latent[dead].any()
    train(matrix, optimizer, x, 0.6)
    assert matrix.latent[dead].all()


def test_gradual_pruning_follows_its_curve_and_never_turns_back():
    matrix, x = make(Pruned(sparsity=0.75, start=0.25, end=0.75, every=1)), tokens()
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.01)
    kept, before = [], matrix.mask.clone()
    for step in range(1, 21):
        size = matrix.latent.detach().abs()
        train(matrix, optimizer, x, step / 20)
        kept.append(int(matrix.mask[0].sum()))
        assert not (matrix.mask & ~before).any()
        dropped = before & ~matrix.mask
        if dropped.any():
            assert size[dropped].max() < 2 * size[matrix.mask].median()
        before = matrix.mask.clone()
    assert kept[:5] == [24] * 5
    assert kept[14:] == [6] * 6
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 6
    matrix.step(0.3)  # a run that was made longer
    assert int(matrix.mask[0].sum()) == 6


def test_blast_keeps_whole_blocks_and_grows_others():
    options = Pruned(
        sparsity=0.75, block=4, end=0.5, growth=0.9, growth_end=0.9, every=1, scope="matrix"
    )
    matrix, x = make(options, bias=True), tokens()
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.002)
    counts, grown = [], 0
    for step in range(1, 11):
        before = matrix.mask[::4, ::4].clone()
        train(matrix, optimizer, x, step / 10)
        blocks = matrix.mask[::4, ::4]
        assert torch.equal(rules.in_blocks(blocks, 4), matrix.mask)
        counts.append(int(blocks.sum()))
        grown += int((blocks & ~before).sum())
    assert counts[0] == 15  # of 24; the cubic curve wants 24 (1 - .75 (1 - .8³)), 15.2
    assert counts[4:] == [6] * 6
    assert grown > 0


def test_masks_are_part_of_a_state_dict_and_parameters_are_not_renamed():
    layer = moezoo.DenseFFN(24, 32, matrices=NM(), bias=True)
    assert set(layer.up_proj.state_dict()) == {"latent", "mask", "bias"}
    assert layer.state_dict()["up_proj.mask"].dtype == torch.bool
    assert layer.bfloat16().up_proj.mask.dtype == torch.bool
    optimizer_groups = {g.name: len(g.parameters) for g in layer.parameter_groups()}
    assert optimizer_groups == {"matrices": 3, "vectors": 3}


def test_what_is_kept_is_active_and_all_of_it_is_computed():
    dense = moezoo.DenseFFN(24, 32).cost()
    for options, share in (
        (NM(n=1), 1 / 4),
        (Transposable(), 1 / 2),
        (SoftNM(), 1 / 2),
        (Pruned(sparsity=0.75, block=4, scope="matrix"), 1 / 4),
    ):
        cost = moezoo.DenseFFN(24, 32, matrices=options).cost()
        assert cost.active_parameters == share * dense.total_parameters
        assert cost.total_parameters == dense.total_parameters
        assert cost.flops_per_token == dense.flops_per_token
        assert cost.bytes_per_token == dense.bytes_per_token


def test_a_plain_block_is_taken_of_what_counts():
    layer = moezoo.DenseFFN(24, 32, matrices=NM(n=1), bias=True).eval()
    neurons, x = torch.tensor([3, 1, 30]), torch.randn(5, 24)
    kept = torch.zeros(32)
    kept[neurons] = 1.0
    expected = F.linear(layer.inner(x) * kept, layer.down_proj.dense(), layer.down_proj.bias)
    torch.testing.assert_close(layer.take(neurons)(x).hidden, expected)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (NM(n=4), "matrices.n: 4 is out of range"),
        (NM(m=5), "matrices.m: a width of the block, 24, is no multiple of 5"),
        (NM(stages="fine"), "matrices.stages: a width of the block, 24, is no multiple of 32"),
        (NM(stages="step", leak="linear"), "matrices.leak: stages and a leak are two methods"),
        (NM(leak="linear", start=0.5, end=0.4), "matrices.end: 0.4 is not after start, 0.5"),
        (NM(decay=-1.0), "matrices.decay: -1 is out of range"),
        (Transposable(every=0), "matrices.every: 0 is out of range"),
        (Transposable(dense_from=0.0), "matrices.dense_from: 0 is before the run"),
        (SoftNM(sampled=1), "matrices.sampled: 1 is neither true nor false"),
        (Pruned(sparsity=1.0), "matrices.sparsity: 1 is out of range"),
        (Pruned(block=5), "matrices.block: a width of the block, 24, is no multiple of 5"),
        (Pruned(start=0.2), "matrices.start: pruning ends at 0, before it begins"),
        (Pruned(scope="column"), "matrices.scope: 'column' is not known"),
        (Pruned(growth=0.1, growth_end=0.0), "matrices.growth_end: growth has ended at 0"),
    ],
)
def test_mistakes_are_named(matrices, message):
    with pytest.raises(InputError, match=message):
        moezoo.DenseFFN(24, 32, matrices=matrices)
    if isinstance(matrices, Transposable):
        with pytest.raises(InputError, match="transposable masks are 4 × 4, 22"):
            moezoo.DenseFFN(22, 32, matrices=Transposable())


def test_a_later_run_does_not_turn_schedules_back():
    staged, leaking = make(NM(stages="step")), make(NM(leak="linear", end=0.5))
    dense = make(Transposable(every=1, dense_from=0.5))
    for matrix in (staged, leaking, dense):
        matrix.step(1.0)
        before = matrix.dense().detach().clone()
        again = make(matrix.options)
        again.load_state_dict(matrix.state_dict())
        again.step(0.01)
        assert torch.equal(again.dense(), before)
