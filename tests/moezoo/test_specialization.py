"""Specialisation: choices against the layers' own sums, planted tables, chance, paths."""

import math
from collections import Counter

import pytest
import torch

import moezoo
import moezoo.analysis.specialization as module
from moezoo.analysis.choices import slot_choices
from moezoo.analysis.paths import Paths
from moezoo.analysis.specialization import (
    chance_information,
    count_pairs,
    entropy,
    information_terms,
    mutual_information,
    occurrence_entropy,
    specialization,
)
from moezoo.analysis.token_map import draw_paths, draw_tokens, drawable
from moezoo.analysis.usage import routed_layers
from moezoo.routing.stats import expert_counts, slot_weight

D = 32
CHOOSING = {method.name: method for method in moezoo.zoo() if routed_layers(method.build(D))}


@pytest.mark.parametrize("name", CHOOSING)
def test_choices_add_up_to_the_load_of_every_layer_of_the_zoo(name):
    torch.manual_seed(0)
    layer = CHOOSING[name].build(D).eval()
    hidden = torch.randn(2, 9, D)
    context = {"token_ids": torch.randint(100, (2, 9)), "mask": torch.ones(2, 9, dtype=torch.bool)}
    context["mask"][1, 6:] = False
    load = layer.slot_load(hidden, **context)
    choices = slot_choices(layer, hidden, context)
    assert choices.num_slots == len(load.counts)
    assert choices.kind == load.kind
    assert torch.equal(expert_counts(choices.indices, choices.num_slots), load.counts)
    mass = slot_weight(choices.indices, choices.weights, choices.num_slots)
    torch.testing.assert_close(mass, load.mass.float(), rtol=1e-5, atol=1e-6)
    assert (choices.indices[15:] == -1).all()
    assert (choices.weights[choices.indices < 0] == 0).all()
    best_T1 = choices.weights[:15].amax(dim=-1, keepdim=True)
    is_best = choices.weights[:15] == best_T1
    assert (is_best & (choices.indices[:15] == choices.heaviest()[:15, None])).any(-1).all()


def test_a_layer_whose_choices_are_not_known_is_named():
    with pytest.raises(moezoo.InputError, match="choices of DenseFFN"):
        slot_choices(moezoo.DenseFFN(D), torch.randn(3, D), {})


def test_pairs_are_counted_one_by_one():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (50,), generator=generator)
    indices = torch.randint(-1, 4, (50, 3), generator=generator)
    counts = torch.zeros(5, 4, dtype=torch.int32)
    count_pairs(counts, tokens, indices)
    wanted = Counter(
        (x, y) for x, row in zip(tokens.tolist(), indices.tolist(), strict=True) for y in row
    )
    assert all(wanted[x, y] == counts[x, y] for x in range(5) for y in range(4))

    by_hand = 0.0
    for row in indices.tolist():
        chosen = [y for y in row if y >= 0]
        times = Counter(chosen).values()
        by_hand -= sum(n * math.log(n / len(chosen)) for n in times)
    assert occurrence_entropy(indices).item() == pytest.approx(by_hand, rel=1e-12)


def test_the_token_that_decides_explains_all_and_a_stranger_nothing():
    # Tokens 0-4 go to slots 0, 1, 2, 0, 1, in twos; the second layer deals out evenly.
    decided = torch.tensor([[6, 0, 0], [0, 4, 0], [0, 0, 9], [8, 0, 0], [0, 2, 0]])
    summary = specialization(decided, 0.0)
    assert summary.information == pytest.approx(summary.entropy, rel=1e-12)
    assert summary.entropy == pytest.approx(entropy(torch.tensor([14, 6, 9])), rel=1e-12)
    assert summary.explained == 1.0

    even = torch.full((5, 3), 40)
    assert mutual_information(even) == 0.0
    assert specialization(even, 0.0).explained < 0.0  # less than chance has

    terms = information_terms(decided)
    assert terms.sum().item() == pytest.approx(summary.information, rel=1e-12)
    # 9 of 29 are (2, 2), in a row and a column of their own.
    assert terms[2, 2].item() == pytest.approx(9 / 29 * math.log(29 / 9), rel=1e-12)


def test_a_token_that_decides_on_several_slots_explains_all():
    indices = torch.tensor([[0, 1], [2, 3], [1, 2], [4, 4]]).repeat(25, 1)
    counts = torch.zeros(4, 5, dtype=torch.int64)
    count_pairs(counts, torch.arange(4).repeat(25), indices)
    summary = specialization(counts, float(occurrence_entropy(indices)))
    assert summary.attainable == pytest.approx(summary.entropy - 0.75 * math.log(2), rel=1e-12)
    assert summary.explained == pytest.approx(1.0, rel=1e-9)


def test_all_slots_always_chosen_leaves_nothing_to_explain():
    indices = torch.arange(3).expand(60, 3)
    counts = torch.zeros(6, 3, dtype=torch.int64)
    count_pairs(counts, torch.arange(60) % 6, indices)
    assert specialization(counts, float(occurrence_entropy(indices))).explained is None


def test_chance_is_what_choices_that_know_nothing_have(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, 301).double()  # as words are
    tokens = frequency.multinomial(4000, replacement=True, generator=generator)
    slots = torch.randint(8, (4000, 1), generator=generator)
    counts = torch.zeros(300, 8, dtype=torch.int32)
    count_pairs(counts, tokens, slots)
    information = mutual_information(counts)
    assert information > 0.1  # which would look like specialisation
    assert chance_information(counts) == pytest.approx(information, rel=0.05)
    assert abs(specialization(counts, 0.0).explained) < 0.005
    assert chance_information(counts) == chance_information(counts)

    many = torch.full((6, 4), 1000)
    sampled = sum(chance_information(many, seed) for seed in range(100)) / 100
    monkeypatch.setattr(module, "_MOST_DEALT", 10)
    assert chance_information(many) == pytest.approx(15 / 48000, rel=1e-12)
    assert sampled == pytest.approx(15 / 48000, rel=0.15)


def test_paths_follow_each_token():
    paths = Paths({"a": 3, "b": 4, "c": 2}, most_paths=4)
    a = torch.tensor([0, 1, 2, 0, -1])
    paths.add({"a": a, "b": a.clamp(min=0) + 1, "c": torch.tensor([0, 0, 0, 1, 1])})
    assert paths.tables["a", "b"].tolist() == [[0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert specialization(paths.tables["a", "b"], 0.0).information == pytest.approx(
        1.0397, abs=1e-4
    )
    assert paths.ways == {(0, 1, 0): 1, (1, 2, 0): 1, (2, 3, 0): 1, (0, 1, 1): 1}
    again = {"a": torch.tensor([1, 1, 2]), "b": torch.tensor([2, 2, 1]), "c": torch.zeros(3).long()}
    paths.add(again)
    assert len(paths.ways) == 2
    assert paths.ways[1, 2, 0] == 3
    assert paths.ways.total() + paths.forgotten == 7
    # Tables of a million slots by a million are left out.
    assert not Paths({"a": 2**12, "b": 2**12}).tables


def test_the_pictures_show_the_planted_diagonal():
    counts = torch.eye(30, dtype=torch.int32).mul(7)[torch.randperm(30)]
    tokens = [f"word {i}" for i in range(30)]
    figure = draw_tokens({"layer 0": counts}, tokens, {"layer 0": "planted"}, "$ test 素")
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (24, 30)
    # Each token has one red cell, and they go down and to the right.
    red = (image > 3).filled(False).argmax(axis=1)
    assert (image > 3).sum() == 24
    assert image.mask.sum() == 24 * 29  # it is never anywhere else
    assert (red[1:] > red[:-1]).all()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == f"'word {int(counts[:, red[0]].argmax())}'"
    figure = draw_paths({("a", "b"): torch.eye(70).long()}, {("a", "b"): "same"}, "paths")
    assert figure.axes[0].images[0].get_array().shape == (64, 64)
    assert drawable("a$素\\n") == r"a\$\u7d20\n"
