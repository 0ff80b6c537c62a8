"""Predictors of the neurons a token needs: labels, recall at k, training, low-rank gates."""

import math

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo.convert import Block
from moezoo.convert.select.labels import (
    contributions,
    energy_at,
    label,
    recall_at,
    smallest_count,
    strongest,
)
from moezoo.convert.select.predictors import (
    LowRankScores,
    Training,
    select,
    train_predictor,
    whitened_factors,
    whitened_scores,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(act=F.relu, gated: bool = False, tokens: int = 1200) -> tuple[Block, torch.Tensor]:
    """A block whose neurons depend on 6 directions of 24, on inputs of unequal lengths."""
    d, width, rank = 24, 96, 6
    rows = normal(width, rank, seed=1) @ normal(rank, d, seed=2) / 3 + 0.05 * normal(width, d)
    gate = rows if gated else None
    up = normal(width, d, seed=3) * d**-0.5 if gated else rows
    down = normal(d, width, seed=4) * normal(width, seed=5).exp()
    bias_in = None if gated else -0.8 + 0.3 * normal(width, seed=6)
    x = normal(tokens, d, seed=7) * (1 + 2 * torch.rand(d, generator=torch.manual_seed(8)))
    return Block(gate, up, down, act, bias_in, normal(d, seed=9)), x


def test_positive_labels_are_the_neurons_that_relu_leaves():
    block, x = planted()
    assert torch.equal(label(block, x, "positive"), block.hidden(x) > 0)
    gated, x = planted(gated=True)
    assert torch.equal(label(gated, x, "positive"), F.linear(x, gated.gate) > 0)


@pytest.mark.parametrize("act", [F.silu, F.gelu, F.leaky_relu])
def test_positive_labels_are_refused_where_nothing_is_zero(act):
    block, x = planted(act, gated=True)
    with pytest.raises(InputError, match=r"labels: 'positive' fits ReLU .*; use strongest"):
        label(block, x, "positive")


def test_strongest_labels_weigh_activations_with_their_columns():
    block, x = planted(F.silu, gated=True, tokens=37)
    labels = label(block, x, "strongest", 0.25)
    assert torch.equal(labels.sum(dim=1), torch.full((37,), 24))
    hidden = block.hidden(x)
    for t in range(37):
        part = (block.down * hidden[t]).norm(dim=0)
        assert part[labels[t]].min() >= part[~labels[t]].max() * (1 - 1e-5)
    assert not torch.equal(labels, strongest(hidden.abs(), 24))


@pytest.mark.parametrize(
    ("rule", "share", "message"),
    [
        ("strongest", None, "share: .*give it"),
        ("strongest", 0.0, "share: 0 labels no neuron"),
        ("strongest", 1.5, "share: 1.5 is out of range"),
        ("positive", 0.2, "share: .*leave it out"),
        ("weakest", None, "labels: 'weakest' is not known"),
    ],
)
def test_bad_labels_are_refused(rule, share, message):
    block, x = planted(tokens=5)
    with pytest.raises(InputError, match=message):
        label(block, x, rule, share)


def test_recall_at_k_is_that_of_a_count_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    labels = torch.tensor([[True, False, True, False], [False, True, False, False]])
    assert recall_at(scores, labels, 2) == pytest.approx(1 / 3)  # 0 of the first; 3, 0 of the rest
    assert recall_at(scores, labels, 3) == pytest.approx(1.0)
    assert recall_at(scores, torch.zeros_like(labels), 2) == 0.0


def test_energy_is_the_share_of_squares_and_not_of_neurons():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    parts = torch.tensor([[1.0, 2.0, 4.0, 0.0], [3.0, 0.0, 0.0, 1.0]])
    assert energy_at(scores, parts, 2) == pytest.approx((1 + 4 + 0 + 1) / 31)
    assert energy_at(parts, parts, 1) == pytest.approx(25 / 31)
    assert energy_at(scores, parts, 4) == 1.0


def test_calling_everything_needed_does_not_win():
    """Its recall at one half is 1; at k it is what chance has, and a predictor's is better."""
    block, x = planted()
    labels = label(block, x, "positive")
    count = round(float(labels.sum(dim=1).float().mean()))
    everything = torch.full_like(labels[900:], 9, dtype=torch.float32)
    assert bool((everything.sigmoid() >= 0.5)[labels[900:]].all())
    trained = train_predictor(
        x[:900], labels[:900], (x[900:], labels[900:]), count, Training(rank=8, batch=32, epochs=12)
    )
    assert recall_at(everything, labels[900:], count) < count / 96 + 0.15
    assert trained.recall > recall_at(everything, labels[900:], count) + 0.2
    assert trained.recall == recall_at(trained.scores(x[900:]), labels[900:], count)


def test_plain_cross_entropy_predicts_as_many_neurons_as_are_needed():
    """A weight on negatives of about their density, as published, would predict twice as many."""
    block, x = planted()
    labels = label(block, x, "positive")
    count = round(float(labels.sum(dim=1).float().mean()))
    trained = train_predictor(
        x[:900], labels[:900], (x[900:], labels[900:]), count, Training(rank=8, batch=32, epochs=12)
    )
    predicted = (trained.scores(x[900:]) > 0).sum() / labels[900:].sum()
    assert 0.75 < float(predicted) < 1.25


@pytest.mark.parametrize("norm", [False, True])
def test_a_trained_predictor_finds_what_six_directions_decide(norm):
    block, x = planted(F.silu, gated=True)
    labels = label(block, x, "strongest", 0.25)
    options = Training(rank=8, norm=norm, batch=32, epochs=10)
    trained = train_predictor(x[:900], labels[:900], (x[900:], labels[900:]), 24, options)
    assert trained.scores.rank == 8
    assert trained.recall > 0.45  # chance is 0.25
    again = train_predictor(x[:900], labels[:900], (x[900:], labels[900:]), 24, options)
    assert torch.equal(again.scores.expand, trained.scores.expand)


def test_the_best_epoch_is_kept_and_not_the_last():
    """Labels that inputs say nothing of: each epoch is chance, and training stops early."""
    x = normal(300, 8)
    labels = normal(300, 32, seed=3) > 0.5
    held_out = (x[200:], labels[200:])
    options = Training(rank=4, epochs=30, patience=2, lr=0.05)
    trained = train_predictor(x[:200], labels[:200], held_out, 10, options)
    assert trained.epoch < 30
    assert trained.recall == recall_at(trained.scores(x[200:]), labels[200:], 10)


def test_held_out_tokens_must_be_others():
    x, labels = normal(100, 8), normal(100, 32, seed=1) > 0
    for other in (slice(0, 1), slice(79, 100), slice(-0, None)):
        with pytest.raises(InputError, match="held_out: some of its tokens are trained on"):
            train_predictor(x[:80], labels[:80], (x[other], labels[other]), 4, Training(rank=2))
    with pytest.raises(InputError, match="held_out: there are no tokens"):
        train_predictor(x[:80], labels[:80], (x[100:], labels[100:]), 4, Training(rank=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Training(rank=0), "rank: 0 is out of range"),
        (Training(lr=0.0), "lr: 0 trains nothing"),
        (Training(epochs=-1), "epochs: -1 is out of range"),
    ],
)
def test_bad_training_is_refused(options, message):
    x, labels = normal(20, 8), normal(20, 16, seed=1) > 0
    with pytest.raises(InputError, match=message):
        train_predictor(x[:10], labels[:10], (x[10:], labels[10:]), 4, options)


def test_scores_are_those_of_the_formula():
    a, b, bias, length = normal(3, 7), normal(11, 3), normal(11, seed=2), normal(11).abs()
    x = normal(5, 7, seed=4)
    inner = x @ a.t()
    assert torch.allclose(LowRankScores(a, b, bias)(x), inner @ b.t() + bias, atol=1e-6)
    mean, variance = inner.mean(1, keepdim=True), inner.var(1, correction=0, keepdim=True)
    normed = (inner - mean) / (variance + 1e-5).sqrt()
    assert torch.allclose(LowRankScores(a, b, norm=True)(x), normed @ b.t(), atol=1e-5)
    gate = LowRankScores(a, b, act=F.silu, length=length)(x)
    assert torch.allclose(gate, F.silu(inner @ b.t()).abs() * length, atol=1e-6)


def test_smallest_count_is_the_first_that_reaches_the_recall():
    block, x = planted(F.silu, gated=True, tokens=300)
    labels = label(block, x, "strongest", 0.1)
    scores = whitened_scores(block, x, 8)(x)
    for recall in (0.3, 0.9, 0.99):
        count = smallest_count(scores, labels, recall)
        assert recall_at(scores, labels, count) >= recall
        assert recall_at(scores, labels, count - 1) < recall
        assert smallest_count(scores, labels, recall, 16) == math.ceil(count / 16) * 16
    assert smallest_count(scores, labels, 1.0, 128) == 96
    with pytest.raises(InputError, match="recall: 0 needs no neuron"):
        smallest_count(scores, labels, 0.0)


def test_whitened_factors_err_least_on_inputs():
    weight, x = normal(20, 12, dtype=torch.float64), normal(400, 12, seed=1, dtype=torch.float64)
    x = x * torch.linspace(0.05, 3, 12, dtype=torch.float64)
    b, a = whitened_factors(weight, x, 4)

    def error(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((x @ (weight - left @ right).t()).square().sum())

    whitened = error(b, a)
    u, s, v = torch.linalg.svd(weight)
    assert whitened < 0.9 * error(u[:, :4] * s[:4], v[:4])
    outputs = torch.linalg.svdvals(x @ weight.t())
    assert whitened == pytest.approx(float(outputs[4:].square().sum()), rel=1e-9)
    full_b, full_a = whitened_factors(weight, x, 12)
    assert torch.allclose(full_b @ full_a, weight, atol=1e-10)
    with pytest.raises(InputError, match="rank: 13 is out of range"):
        whitened_factors(weight, x, 13)


@pytest.mark.parametrize("gated", [False, True])
def test_a_gate_of_full_rank_ranks_by_the_gate_itself(gated):
    block, x = planted(F.silu, gated=gated, tokens=50)
    scores = whitened_scores(block, x, 24)(x)
    rows = block.gate if gated else block.up
    exact = F.silu(F.linear(x, rows, block.bias_in)).abs() * block.down.norm(dim=0)
    if gated:
        exact = exact * F.linear(x, block.up).square().mean(0).sqrt()
    assert torch.allclose(scores, exact, rtol=1e-3, atol=1e-4)


def test_selected_neurons_alone_make_the_output():
    block, x = planted(F.silu, gated=True, tokens=9)
    scores = whitened_scores(block, x, 8)
    output = select(block, scores, 10, x)
    for t in range(9):
        chosen = scores(x[t : t + 1])[0].topk(10).indices
        expected = block.take(chosen).run(x[t : t + 1])[0]
        assert torch.allclose(output[t], expected, atol=1e-4)
    assert torch.allclose(select(block, scores, 96, x), block.run(x), atol=1e-4)
    kept = contributions(block.hidden(x), block.down)
    exact = select(block, lambda x: contributions(block.hidden(x), block.down), 10, x)
    assert not torch.allclose(exact, output, atol=1e-2)
    assert kept.shape == (9, 96)
