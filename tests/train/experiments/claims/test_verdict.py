"""Claims hold, fail or stay undecided by means and standard errors of paired differences."""

import pytest

from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.common.verdict import is_positive, is_small, paired, signed


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "fails"),
        ([1.0, -0.5, 0.2], "undecided"),
        # Three standard errors are not enough for three seeds: Student's t asks for 4.3.
        ([1.0, 2.0, 3.0], "undecided"),
        ([2.0, 2.5, 3.0], "holds"),
        ([5.0], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
    ],
)
def test_a_claim_needs_zero_outside_of_the_interval(differences, outcome):
    verdict = is_positive("it helps", differences)
    assert verdict.outcome == outcome
    assert verdict.difference.value == pytest.approx(sum(differences) / len(differences))
    assert str(verdict).startswith(f"it helps: {outcome} (")


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.01, -0.01, 0.0], "holds"),
        ([0.2, 0.21, 0.19], "fails"),
        ([-0.2, -0.21, -0.19], "fails"),
        # A large error is no sign of equality, nor is a single seed.
        ([0.3, -0.3, 0.0], "undecided"),
        ([0.08, 0.1, 0.12], "undecided"),
        ([0.0], "undecided"),
    ],
)
def test_two_are_the_same_only_if_the_whole_interval_is_within_the_margin(differences, outcome):
    assert is_small("the same", differences, margin=0.1).outcome == outcome


def test_differences_are_of_the_same_seed():
    assert paired({0: 1.0, 2: 5.0, 3: 1.0}, {2: 7.0, 0: 1.5}) == [0.5, 2.0]


def test_signs_are_written():
    assert signed(Mean(0.5, 0.1, 3)) == "+0.500 ± 0.100"
    assert signed(Mean(-0.5, None, 1)) == "−0.500"
