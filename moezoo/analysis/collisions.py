"""Collisions of hashes: different n-grams, or tokens, that share a slot without anyone's choice.

What is hashed to a slot are its *owners*. Reads of a slot by others than its most frequent owner
are *foreign*: what the slot learns from one of them, all get. Several hash functions tell most
owners apart that one does not, as few share the slots of all.

Shapes: T tokens, N tokens of an owner, U different owners, H hash functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.analysis.watching import Context, watch
from moezoo.feed_forward import FeedForward
from moezoo.layers.hash import HashLayer
from moezoo.routing import hashing
from moezoo.routing.ngram import NGramHash

_ORDERS = {2: "bigrams", 3: "trigrams"}
_CHANCE_SEED = 0


class Addresses(NamedTuple):
    """The slots of one pass, by hash functions of the same key.

    Attributes:
        owners: ``(T, N)`` int64; rows are equal for the same owner.
        slots: ``(T, H)`` int64, of each hash function from 0.
        sizes: number of slots of each hash function.
    """

    owners: Tensor
    slots: Tensor
    sizes: Sequence[int]


@dataclass(frozen=True)
class Collisions:
    """The collisions of hash functions of one key on a text; a mean over them, where not of all.

    Attributes:
        owners: different ones.
        hashes: hash functions.
        slots: of a hash function.
        foreign: share of the reads of a slot that are not its most frequent owner's.
        by_chance: the same, had every owner drawn its slot; a good hash comes close.
        foreign_of_all: share of the reads by owners that a more frequent one is not told apart
            from by any of the hash functions.
        shared: share of the slots in use that have several owners.
        pairs: pairs of owners that share a slot.
        pairs_of_all: pairs that share the slots of all hash functions.
    """

    owners: int
    hashes: int
    slots: int
    foreign: float
    by_chance: float
    foreign_of_all: float
    shared: float
    pairs: float
    pairs_of_all: int


def addresses_of(layer: FeedForward, hidden: Tensor, context: Context) -> dict[str, Addresses]:
    """Return the addresses that a layer hashes tokens to, by what is hashed: ``bigrams``, ….

    A layer without a hash has none, and neither have tables with a row per token.

    Args:
        layer: in evaluation mode.
        hidden: ``(..., d_model)``.
        context: what the layer is given beside it.

    Raises:
        InputError: token ids are missing or outside the vocabulary, or a shape does not match.
    """
    ngrams = getattr(layer, "hash", None)
    if isinstance(ngrams, NGramHash):
        return _of_ngrams(ngrams, hidden, context)
    if isinstance(layer, HashLayer):
        return {f"{layer.key}s": _of_hash_layer(layer, hidden, context)}
    return {}


def _of_ngrams(ngrams: NGramHash, hidden: Tensor, context: Context) -> dict[str, Addresses]:
    def both(token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        owners = ngrams.owners(token_ids, mask, length)
        rows = ngrams(token_ids, mask, length).movedim(0, -1)
        return torch.cat([owners, rows], dim=-1).flatten(0, -2)

    given = context.get("token_ids"), context.get("mask")
    found, mask_T = hashing.addressed(hidden, *given, ngrams.vocab_size, both, "the layer")
    found = found if mask_T is None else found[mask_T]
    owners_TN, rows_TH = found.split([ngrams.max_ngram, len(ngrams.sizes)], dim=-1)
    slots_TH = rows_TH - rows_TH.new_tensor(ngrams.offsets)
    parts = {}
    for order in range(2, ngrams.max_ngram + 1):
        heads = slice((order - 2) * ngrams.num_heads, (order - 1) * ngrams.num_heads)
        name = _ORDERS.get(order, f"{order}-grams")
        parts[name] = Addresses(owners_TN[:, :order], slots_TH[:, heads], ngrams.sizes[heads])
    return parts


def _of_hash_layer(layer: HashLayer, hidden: Tensor, context: Context) -> Addresses:
    def keys(token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        found = hashing.keys(layer.key, token_ids, mask, layer.vocab_size)
        return found[..., found.shape[-2] - length :, :].flatten(0, -2)

    token_ids, mask = context.get("token_ids"), context.get("mask")
    owners_TN, mask_T = hashing.addressed(hidden, token_ids, mask, layer.vocab_size, keys)
    indices_TC = layer.route(hidden, token_ids, mask).indices
    slots_TC = indices_TC.div(layer.num_hashes, rounding_mode="floor")
    if mask_T is not None:
        owners_TN, slots_TC = owners_TN[mask_T], slots_TC[mask_T]
    return Addresses(owners_TN, slots_TC, [layer.num_experts] * slots_TC.shape[1])


class CollisionCounter:
    """Owners, how often each was read, and its slots, over many passes.

    Args:
        sizes: number of slots of each hash function.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, addresses: Addresses) -> None:
        """Count the tokens of a pass."""
        owners_TN, slots_TH = addresses.owners.cpu(), addresses.slots.cpu()
        ones = torch.ones(len(owners_TN), dtype=torch.int64)
        self._parts.append(_merged(owners_TN, ones, slots_TH))

    def collisions(self) -> Collisions:
        """Summarise what was counted."""
        columns = zip(*self._parts, strict=True)
        owners_UN, reads_U, slots_UH = _merged(*(torch.cat(column) for column in columns))
        heads = [_Shared.of(column, reads_U) for column in slots_UH.unbind(1)]
        every = _Shared.of(slots_UH.unique(dim=0, return_inverse=True)[1], reads_U)
        generator = torch.Generator().manual_seed(_CHANCE_SEED)
        drawn = (torch.randint(n, (len(reads_U),), generator=generator) for n in self.sizes)
        chance = [_Shared.of(slots_U, reads_U) for slots_U in drawn]
        return Collisions(
            owners=len(owners_UN),
            hashes=len(heads),
            slots=round(_mean(self.sizes)),
            foreign=_mean([head.foreign for head in heads]),
            by_chance=_mean([head.foreign for head in chance]),
            foreign_of_all=every.foreign,
            shared=_mean([head.shared for head in heads]),
            pairs=_mean([head.pairs for head in heads]),
            pairs_of_all=every.pairs,
        )


def _merged(owners: Tensor, reads: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the reads of equal owners, which have equal slots."""
    owners_UN, owner_T = owners.unique(dim=0, return_inverse=True)
    reads_U = torch.zeros(len(owners_UN), dtype=torch.int64).index_add_(0, owner_T, reads)
    slots_UH = slots.new_empty(len(owners_UN), slots.shape[1])
    slots_UH[owner_T] = slots
    return owners_UN, reads_U, slots_UH


class _Shared(NamedTuple):
    """How one assignment of slots shares them."""

    foreign: float
    shared: float
    pairs: int

    @classmethod
    def of(cls, slots_U: Tensor, reads_U: Tensor) -> _Shared:
        used, slot_U, owners = slots_U.unique(return_inverse=True, return_counts=True)
        most = torch.zeros_like(used).scatter_reduce_(0, slot_U, reads_U, "amax")
        total = max(int(reads_U.sum()), 1)
        pairs = int((owners * (owners - 1) // 2).sum())
        shared = int((owners > 1).sum()) / max(len(used), 1)
        return cls(1 - int(most.sum()) / total, shared, pairs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


@contextmanager
def collect_collisions(
    layers: Mapping[str, FeedForward],
) -> Iterator[dict[str, dict[str, CollisionCounter]]]:
    """Count what layers hash over the forward passes inside the block.

    Args:
        layers: by name, in evaluation mode.

    Yields:
        The counters so far, by layer and by what is hashed; layers without a hash have none.

    Raises:
        InputError: a layer is in training mode.
    """
    counters: dict[str, dict[str, CollisionCounter]] = {}

    def see(name: str, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        for what, addresses in addresses_of(layer, hidden, context).items():
            own = counters.setdefault(name, {})
            own.setdefault(what, CollisionCounter(addresses.sizes)).add(addresses)

    with watch(layers, see):
        yield counters
