"""Rows that n-grams are hashed to: of a batch, and of a million tokens."""

from __future__ import annotations

import torch

from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo.routing.ngram import NGramHash


def _build(setting: Setting) -> Problem:
    tokens, vocabulary, heads, rows = (setting[name] for name in ("T", "V", "H", "R"))
    hashed = NGramHash(vocabulary, num_heads=heads, num_rows=rows).to(setting.device)
    ids = torch.randint(vocabulary, (1, tokens), device=setting.device)
    ours = Contender(lambda: hashed(ids, None, tokens), {}, constants=(ids,))
    # Whole numbers of 64 bits; no products of floats.
    work = Work(0, ids.nbytes, ids.nbytes * len(hashed.sizes))
    return Problem(ours, work, work, ours)


def _plain(ours: Contender) -> Contender:
    return plain_torch(ours, "ngram_rows")


CASES = [
    Case(
        f"ngram-rows-{name}",
        "op",
        "rows of bigrams and trigrams",
        {"T": tokens, "V": 131072, "H": 8, "R": 2_000_000},
        {"T": 50, "V": 40, "H": 2, "R": 100},
        _build,
        {PLAIN: Peer(_plain, target=Target(forward=2.0))},
        step=False,
        threads=1,
        ops=("ngram_rows",),
    )
    for name, tokens in (("8192", 8192), ("1m", 1_000_000))
]
