"""What shares a slot: counts by hand, over passes, against chance, and in a picture."""

import io
from collections import Counter, defaultdict
from itertools import combinations

import pytest
import torch
from torch import nn

import moezoo
from moezoo.analysis.collision_picture import draw_collisions
from moezoo.analysis.collisions import (
    Addresses,
    CollisionCounter,
    addresses_of,
    collect_collisions,
)

D, V = 16, 20


def test_figures_are_those_counted_by_hand():
    """Owners read 3, 2, 1, 1, 1 times have slots 0 0 0 1 1; the second hash parts the first two."""
    owners = torch.tensor([[n] for n in [5, 5, 5, 6, 6, 7, 8, 9]])
    slots = torch.tensor([[0, 0]] * 3 + [[0, 1]] * 2 + [[0, 0], [1, 3], [1, 3]])
    counter = CollisionCounter([2, 4])
    for part in (slice(4), slice(4, 8)):  # an owner may be read in several passes
        counter.add(Addresses(owners[part], slots[part], [2, 4]))
    found = counter.collisions()
    assert (found.owners, found.hashes, found.slots) == (5, 2, 3)
    assert found.foreign == pytest.approx(((2 + 1 + 1) / 8 + (1 + 1) / 8) / 2)
    assert found.shared == pytest.approx((2 / 2 + 2 / 3) / 2)
    assert found.pairs == ((3 + 1) + (1 + 1)) / 2
    # 5 and 7 share both slots, and 8 and 9.
    assert (found.pairs_of_all, found.foreign_of_all) == (2, pytest.approx(2 / 8))
    assert 0 < found.by_chance < 1


def expected(
    layer: moezoo.FeedForward, ids: torch.Tensor, mask: torch.Tensor, order: int, head: int
):
    """Count the n-grams of each row of a head, from tuples of tokens."""
    reads: dict[int, Counter] = defaultdict(Counter)
    for sequence, real in zip(ids.tolist(), mask.tolist(), strict=True):
        begin = real.index(True)
        rows = layer.hash(torch.tensor([sequence]), torch.tensor([real]), len(sequence))[:, 0].t()
        for t in range(begin, len(sequence)):
            gram = tuple(sequence[t - i] if t - i >= begin else None for i in range(order))
            reads[int(rows[t, head])][gram] += 1
    return reads


def test_ngrams_are_told_apart_by_what_they_are():
    layer = moezoo.Engram(D, num_heads=2, num_rows=30, vocab_size=V).eval()
    ids, mask = torch.randint(V, (6, 30)), torch.ones(6, 30, dtype=torch.bool)
    mask[0, :4] = mask[3, :9] = False
    with torch.no_grad(), collect_collisions({"layer 0": layer}) as counters:
        for part in (slice(2), slice(2, 6)):
            layer(torch.randn(len(ids[part]), 30, D), token_ids=ids[part], mask=mask[part])
    assert list(counters["layer 0"]) == ["bigrams", "trigrams"]
    for number, what in enumerate(("bigrams", "trigrams")):
        found = counters["layer 0"][what].collisions()
        heads = [expected(layer, ids, mask, number + 2, 2 * number + h) for h in range(2)]
        total = int(mask.sum())
        foreign = [
            1 - sum(max(count.values()) for count in rows.values()) / total for rows in heads
        ]
        assert found.foreign == pytest.approx(sum(foreign) / 2)
        pairs = [sum(len(list(combinations(c, 2))) for c in rows.values()) for rows in heads]
        assert found.pairs == sum(pairs) / 2
        assert found.owners == len({gram for count in heads[0].values() for gram in count})
        assert found.foreign_of_all < found.foreign
        assert found.by_chance == pytest.approx(found.foreign, rel=0.3)


@pytest.mark.parametrize("key", ["token", "previous", "bigram", "position"])
def test_hash_layers_share_experts_among_what_they_hash(key):
    layer = moezoo.HashLayer(D, num_experts=3, vocab_size=V, key=key).eval()
    ids, mask = torch.randint(V, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    mask[1, 6:] = False
    found = addresses_of(layer, torch.randn(4, 9, D), {"token_ids": ids, "mask": mask})
    (addresses,) = found.values()
    assert list(found) == [f"{key}s"]
    assert len(addresses.owners) == len(addresses.slots) == int(mask.sum())
    kept = ids[mask]
    before = torch.cat([torch.full((4, 1), V), ids[:, :-1]], dim=1)[mask]
    place = torch.arange(9).expand(4, 9)[mask]
    wanted = {
        "token": [kept], "previous": [before], "bigram": [before, kept], "position": [place]
    }[key]  # fmt: skip
    assert torch.equal(addresses.owners, torch.stack(wanted, dim=-1))
    by_owner: dict[tuple, int] = {}
    for owner, slot in zip(addresses.owners.tolist(), addresses.slots.tolist(), strict=True):
        assert by_owner.setdefault(tuple(owner), slot) == slot
    counts = layer.slot_load(torch.randn(4, 9, D), token_ids=ids, mask=mask).counts
    assert torch.equal(addresses.slots.flatten().bincount(minlength=3), counts)


def test_tables_with_a_row_per_token_share_none():
    for layer in (moezoo.STEM(D, vocab_size=V), moezoo.DenseFFN(D)):
        assert addresses_of(layer, torch.randn(2, 3, D), {"token_ids": torch.ones(2, 3)}) == {}
    with collect_collisions(nn.ModuleDict()) as counters:
        assert counters == {}


def test_the_picture_has_a_bar_for_one_hash_and_one_for_all():
    counter = CollisionCounter([4])
    counter.add(Addresses(torch.arange(9)[:, None], torch.arange(9)[:, None] % 4, [4]))
    figure = draw_collisions({"layer 1, bigrams": counter.collisions()}, "title")
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([5 / 9, 5 / 9])
    assert axes.get_yticklabels()[0].get_text() == "layer 1, bigrams\n9 in 4"
