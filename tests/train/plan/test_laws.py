"""Scaling laws: what they say, what they are fitted to, and that their two N stay apart."""

import json
import math
from functools import partial

import pytest
import torch

from moezoo import DenseFFN, InputError
from moezoo.matrices import NM, Doped, LowRank, Pruned, SoftNM, Transposable, build_matrix
from moezoo.matrices.kept import kept_share, mean_kept_share
from moezoo_train.plan.counting import count_weights
from moezoo_train.plan.law_fit import Observation, fit
from moezoo_train.plan.laws import (
    PUBLISHED,
    AverageLaw,
    FinalCount,
    MeanCount,
    Reach,
    SparseLaw,
    as_json,
    read_law,
)

AVERAGE = AverageLaw(E=1.6, A=300.0, alpha=0.33, B=500.0, beta=0.3)
SPARSE = SparseLaw(a_S=14.0, b_S=0.8, c_S=40.0, b_N=0.24, a_D=5e8, b_D=0.22, c=0.7)
(CHINCHILLA,) = (one.law for one in PUBLISHED if isinstance(one.law, AverageLaw))
(T5,) = (one.law for one in PUBLISHED if isinstance(one.law, SparseLaw))

# Losses of the T5 models of arXiv:2309.08520, as the code that goes with it lists them: by the size
# of the dense one of a quarter of a million steps, twice and four times as many, for S = 0, 1/2,
# 3/4 and 7/8 of as many parameters that are left.
SPARSITIES = (0.0, 0.5, 0.75, 0.875)
LOSSES = {
    1 / 128: ((3.1256, 2.8417, 2.7468, 2.6938), (3.0798, 2.7804, 2.7035, 2.6491),
              (3.0334, 2.7383, 2.6680, 2.6270)),
    1 / 32: ((2.5545, 2.3919, 2.3210, 2.2855), (2.4999, 2.3246, 2.2691, 2.2343),
             (2.4508, 2.2850, 2.2256, 2.1988)),
    1 / 8: ((2.1760, 2.0477, 1.9879, 1.9726), (2.1030, 1.9841, 1.9227, 1.9033),
            (2.0540, 1.9240, 1.8660, 1.8510)),
    1 / 2: ((1.8828, 1.8178, 1.7683, 1.7610), (1.7999, 1.7230, 1.6853, 1.6745),
            (1.7401, 1.6539, 1.6110, 1.6030)),
}  # fmt: skip


def of_t5():
    for scale, durations in LOSSES.items():
        for steps, losses in zip((250_000, 500_000, 1_000_000), durations, strict=True):
            for sparsity, loss in zip(SPARSITIES, losses, strict=True):
                left = 24 * 12 * 768**2 * scale
                yield FinalCount(left, sparsity), 128.0 * 512 * steps, loss


def observe(law, count, tokens, sparsity=0.0, loss=None):
    """A run whose two N differ as those of gradual pruning do."""
    final = FinalCount(count, sparsity)
    mean = MeanCount(count / (1 - sparsity) * (1 - 0.625 * sparsity))
    if loss is None:
        loss = law.loss(final if isinstance(law, SparseLaw) else mean, tokens)
    return Observation(f"{count:g}/{tokens:g}/{sparsity:g}", mean, final, tokens, loss)


def runs(law, sparsities=(0.0, 0.5, 0.8)):
    sizes = ((1e6, 1e8), (1e6, 8e8), (1e7, 3e8), (1e7, 4e9), (9e7, 2e9), (9e7, 3e10))
    return [
        observe(law, count, tokens, sparsity) for count, tokens in sizes for sparsity in sparsities
    ]


def test_without_sparsity_both_are_chinchillas_law():
    for law in (SPARSE, T5):
        dense = law.dense()
        for count, tokens in ((1e6, 1e8), (7e10, 1.4e12)):
            expected = dense.E + dense.A / count**dense.alpha + dense.B / tokens**dense.beta
            assert law.loss(FinalCount(count), tokens) == pytest.approx(expected, rel=1e-12)
            assert dense.loss(MeanCount(count), tokens) == pytest.approx(expected, rel=1e-12)
    # Gopher's size and the other's, arXiv:2203.15556
    assert CHINCHILLA.loss(MeanCount(280e9), 300e9) == pytest.approx(1.993, abs=0.002)
    assert CHINCHILLA.loss(MeanCount(70e9), 1.4e12) == pytest.approx(1.936, abs=0.002)


def test_the_two_numbers_of_parameters_cannot_be_taken_for_each_other():
    with pytest.raises(TypeError, match="the average law wants a MeanCount"):
        AVERAGE.loss(FinalCount(1e6), 1e8)
    with pytest.raises(TypeError, match="the sparse law wants a FinalCount"):
        SPARSE.loss(MeanCount(1e6), 1e8)
    with pytest.raises(TypeError, match="the average law wants a MeanCount"):
        AVERAGE.loss(1e6, 1e8)


def test_the_published_sparse_law_says_the_published_losses():
    errors = [abs(T5.loss(count, tokens) / loss - 1) for count, tokens, loss in of_t5()]
    assert max(errors) < 0.035
    assert sum(errors) / len(errors) < 0.012


def test_fitted_to_the_published_losses_it_is_about_the_published_law():
    observations = [
        observe(T5, count.value, tokens, count.sparsity, loss) for count, tokens, loss in of_t5()
    ]
    found = fit(observations, "sparse")
    assert found.law.b_N == pytest.approx(T5.b_N, abs=0.03)
    assert max(map(abs, found.left_out)) < 0.02
    # They are of three lengths, a factor of four: b_D, a_D and c make up for each other.
    for count, tokens, _ in of_t5():
        assert found.law.loss(count, tokens) == pytest.approx(T5.loss(count, tokens), rel=0.03)


@pytest.mark.parametrize("law", [AVERAGE, SPARSE])
def test_a_law_is_found_from_losses_that_follow_it(law):
    found = fit(runs(law), law.name)
    for name, value in vars(law).items():
        assert getattr(found.law, name) == pytest.approx(value, rel=0.01), name
    assert max(map(abs, (*found.errors, *found.left_out))) < 1e-4
    far = observe(law, 1e9, 1e11, 0.9)
    count = far.final if isinstance(law, SparseLaw) else far.mean
    assert found.law.loss(count, 1e11) == pytest.approx(far.loss, rel=1e-3)
    assert not found.reach.holds(count, 1e11)
    assert found.reach.holds(type(count)(2e6), 1e9)


def test_one_run_that_failed_moves_little():
    observations = runs(AVERAGE)
    spoiled = observations[4]
    observations[4] = observe(AVERAGE, spoiled.final.value, spoiled.tokens, 0.5, 2 * spoiled.loss)
    found = fit(observations, "average")
    assert found.law.loss(MeanCount(5e7), 5e9) == pytest.approx(
        AVERAGE.loss(MeanCount(5e7), 5e9), rel=0.01
    )
    assert abs(found.errors[4]) > 0.4


@pytest.mark.parametrize(
    ("observations", "name", "message"),
    [
        (runs(AVERAGE)[:5], "average", "runs: the average law has 5 coefficients and takes 6 runs"),
        (runs(SPARSE)[:7], "sparse", "runs: the sparse law has 7 coefficients and takes 8 runs"),
        (
            runs(SPARSE, (0.0, 0.5)),
            "sparse",
            "law wants three values of sparsity or more, and .* 2",
        ),
        (
            [observe(AVERAGE, 1e6, 1e8 * 2**n) for n in range(7)],
            "average",
            "law wants three values of parameters or more, and these have 1",
        ),
        (
            [observe(AVERAGE, 1e6 * 2**n, 1e8) for n in range(7)],
            "average",
            "law wants three values of tokens or more, and these have 1",
        ),
        (
            [observe(AVERAGE, 1e6 * 2**n, 2e7 * 2**n) for n in range(7)],
            "average",
            "runs: all have about 20 tokens per parameter",
        ),
    ],
)
def test_runs_that_make_no_law_are_refused(observations, name, message):
    with pytest.raises(InputError, match=message):
        fit(observations, name)


def kept(options):
    matrix = build_matrix(options, 64, 32, False)
    return mean_kept_share(matrix), kept_share(matrix, 1.0)


def test_weights_that_count_follow_the_schedules():
    assert kept(Pruned(sparsity=0.75)) == pytest.approx((0.25, 0.25))
    assert kept(Pruned(sparsity=0.75, dense_from=0.6)) == pytest.approx((0.55, 1.0))
    quarter_to_three = Pruned(sparsity=0.8, start=0.25, end=0.75)
    assert kept(quarter_to_three) == pytest.approx((1 - 0.625 * 0.8, 0.2), abs=1e-4)
    assert kept(Transposable(dense_from=0.8)) == pytest.approx((0.6, 1.0))
    assert kept(Transposable(dense_from=None)) == (0.5, 0.5)
    assert kept(SoftNM(n=1)) == pytest.approx((0.25, 0.25))
    assert kept(NM(n=1)) == pytest.approx((0.25, 0.25))
    assert kept(NM(n=1, leak="linear", end=0.4)) == pytest.approx((0.4 + 0.6 / 4, 0.25))
    stages = kept(NM(n=1, m=8, stages="step", start=0.2))
    assert stages == pytest.approx((0.2 + 0.2 * (7 + 4 + 2 + 1) / 8, 1 / 8), abs=2e-3)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 0.65, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        Pruned(sparsity=0.75, start=0.1, end=0.6, every=1),
        Pruned(sparsity=0.5, dense_from=0.6),
        NM(stages="step", start=0.3, end=0.9),
        Transposable(dense_from=0.6),
    ],
)
def test_they_are_as_many_as_the_mask_has(options, progress):
    matrix = build_matrix(options, 64, 32, False)
    matrix.reset_parameters(0.1)
    matrix.step(progress)
    assert matrix.mask.double().mean().item() == pytest.approx(
        kept_share(matrix, progress), abs=0.01
    )


def test_the_weights_of_a_model_are_those_of_its_blocks(make_module):
    def counts(**arguments):
        with torch.device("meta"):
            ffn = partial(DenseFFN, d_ff=64, bias=True, **arguments)
            return count_weights("run", make_module("dense", ffn=ffn).model)

    attention, ffn = 4 * (2 * 32 * 32 + 2 * 32 * 16), 4 * 3 * 32 * 64
    mean, final = counts()
    assert (mean.value, final.value, final.sparsity) == (attention + ffn, attention + ffn, 0.0)
    mean, final = counts(matrices=Pruned(sparsity=0.5, start=0.25, end=0.75))
    assert mean.value == pytest.approx(attention + (1 - 0.3125) * ffn, rel=1e-4)
    assert final.value == attention + 0.5 * ffn
    assert final.sparsity == pytest.approx(0.5 * ffn / (attention + ffn))
    factors = 4 * 3 * 8 * (32 + 64)
    assert counts(matrices=LowRank(rank=8, guide=0.5))[0].value == attention + factors
    mean, final = counts(matrices=Doped(sparsity=0.5, rank=8))
    assert final.value == attention + factors + 0.5 * ffn
    with torch.device("meta"), pytest.raises(InputError, match="run: layer 0 is a SparseMoE; thes"):
        count_weights("run", make_module("moe").model)


def test_a_law_is_read_as_it_was_written():
    for law in (AVERAGE, SPARSE):
        reach = Reach((1e6, 2e7), (1e8, 3e9), (0.0, 0.75))
        text = json.dumps(as_json(law, reach))
        assert read_law("law", json.loads(text)) == (law, reach)
    values = json.loads(text)
    for change, message in (
        ([], "law: it is no fitted law"),
        ({"law": "spars"}, "law: 'spars' is not known; did you mean 'sparse'?"),
        ({"coefficients": {"E": 1.0}}, "law: a sparse law has a_S, b_S"),
        ({"coefficients": values["coefficients"] | {"c": math.nan}}, "law.c: nan is out of range"),
        ({"coefficients": values["coefficients"] | {"c": "1"}}, "law.c: '1' is not a number"),
        ({"reach": None}, "law.reach: is missing"),
        ({"reach": {"tokens": [1, 2]}}, "law.reach.parameters: None is not two numbers"),
    ):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            read_law("law", values | change if isinstance(change, dict) else change)
