"""Times, memory and limits, against what can be counted by hand."""

import itertools
import math

import pytest
import torch

from moezoo.bench import gate, limits, timing
from moezoo.bench.case import Contender, Work
from moezoo.bench.limits import Limits
from moezoo.bench.memory import Allocation, highest, saved_bytes, temporary_bytes
from moezoo.bench.timing import Timing, interleave

CPU = torch.device("cpu")


def test_saved_bytes_by_hand():
    x = torch.randn(6, 4, requires_grad=True)
    w = torch.randn(4, 10, requires_grad=True)
    scale = torch.randn(10)

    def forward():
        hidden = (x @ w).exp()  # x and w are given; the result of exp is kept: 6 x 10
        return (hidden * scale).sum(-1)  # scale is kept, but it is a constant

    contender = Contender(forward, {"x": x, "w": w}, constants=(scale,))
    assert saved_bytes(contender) == 6 * 10 * 4
    assert saved_bytes(Contender(forward, {"x": x, "w": w})) == 6 * 10 * 4 + 10 * 4


def test_a_saved_view_counts_its_whole_storage_once():
    x = torch.randn(8, requires_grad=True)

    def forward():
        whole = x.exp()  # kept by exp itself: 8 numbers
        return whole[:4] * whole[4:]  # two views of the same storage

    assert saved_bytes(Contender(forward, {"x": x})) == 8 * 4


def test_temporary_bytes_by_hand():
    def step():
        first, second = torch.empty(1000), torch.empty(3000)
        del first
        result = torch.empty(5000)
        del second
        return (result,)

    assert temporary_bytes(step, CPU) == 4 * (1000 + 3000)
    sparse = torch.eye(3).to_sparse()
    assert temporary_bytes(lambda: (sparse,), CPU) == 0


def test_highest_leaves_out_what_is_kept_and_knows_reused_addresses():
    sizes = [(1, 10), (2, 5), (1, -10), (1, 20), (3, 7), (2, -5), (9, -100)]
    events = [Allocation(time, *event) for time, event in enumerate(sizes)]
    assert highest(events, set()) == 32
    # Address 1 holds the result only the second time.
    assert highest(events, {1}) == 15
    assert highest(events, {1, 3}) == 15
    assert highest([], set()) == 0


def test_samples_are_interleaved_and_slow_calls_get_fewer(monkeypatch):
    order = []
    cost = {"ours": 0.5, "slow": 5.0, "fast": 0.1}

    def sample(call, repeats):
        name = call()
        order.append(name)
        return cost[name]

    monkeypatch.setattr(timing, "_sample_cpu", sample)
    calls = {name: (lambda name=name: name) for name in cost}
    found = interleave(calls, CPU, runs=10, budget=2.0, always="ours")
    assert {name: len(t.seconds) for name, t in found.items()} == {
        "ours": 10,
        "slow": 3,
        "fast": 10,
    }
    assert order[:3] == ["ours", "slow", "fast"]  # once each, before anything counts
    rest = order[3:]
    assert rest[:3] == ["ours", "fast", "ours"]
    assert max(len(list(run)) for name, run in itertools.groupby(rest)) == 1
    places = [i for i, name in enumerate(rest) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(places)) < 10  # spread over the rounds


def test_short_calls_are_repeated_within_a_sample():
    calls = {"ours": lambda: None}
    (found,) = interleave(calls, CPU, runs=2, budget=1.0, always="ours").values()
    assert found.repeats > 10
    assert len(found.seconds) == 2


def test_median_and_spread():
    found = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert found.median == 3.0
    assert found.spread == pytest.approx((52 - 1.5) / 2 / 3)
    assert Timing((1.0,)).spread == 0


def test_limits():
    known = Limits(read=10.0, write=2.0, matmul={"float32": 100.0})
    assert known.seconds(Work(flops=100, read=20, written=4), "float32") == 4.0
    assert known.seconds(Work(flops=1000, read=20, written=4), "float32") == 10.0
    other = Limits(read=5.0, write=3.0, matmul={"float32": 50.0})
    assert known.best(other) == Limits(10.0, 3.0, {"float32": 100.0})
    measured = limits.measure(CPU, small=True)
    rates = [measured.read, measured.write, *measured.matmul.values()]
    assert all(rate > 0 for rate in rates)
    assert set(measured.matmul) == {"float32", "bfloat16"}


def test_differences():
    ones = torch.ones(4)
    ours = gate.Answer(ones, {"w": torch.zeros(2)})
    same = gate.difference(ours, gate.Answer(ones, {"w": torch.zeros(2)}))
    assert same.error == 0
    off = gate.difference(ours, gate.Answer(ones * 1.5, {"w": torch.zeros(2)}))
    assert (off.where, off.error) == ("the output", pytest.approx(0.5))
    # Any number is infinitely far from a gradient of zero.
    gone = gate.difference(ours, gate.Answer(ones, {"w": torch.ones(2)}))
    assert str(gone) == "differs by inf in the gradient of w"
    shape = gate.difference(ours, gate.Answer(ones, {"w": torch.zeros(3)}))
    assert shape.error == float("inf")
    assert same.error <= gate.tolerance(torch.float32) < gate.tolerance(torch.bfloat16) < off.error


def test_sparse_gradients_are_compared_with_dense_ones():
    table = torch.randn(5, 2, requires_grad=True)
    rows = torch.tensor([1, 3, 3])

    def contender(sparse):
        return Contender(
            lambda: torch.nn.functional.embedding(rows, table, sparse=sparse), {"table": table}
        )

    direction = torch.randn(3, 2)
    answers = [gate.answer(contender(sparse), direction) for sparse in (False, True)]
    assert gate.difference(*answers).error <= 1e-7
    assert answers[1].gradients["table"].layout is torch.strided


def test_whole_numbers_are_equal_or_wrong():
    wanted = torch.tensor([1 << 40, 7])
    assert gate.relative_error(wanted.clone(), wanted) == 0
    assert gate.relative_error(wanted + torch.tensor([1, 0]), wanted) == math.inf
