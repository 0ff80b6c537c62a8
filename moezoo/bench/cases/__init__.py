"""All cases, in the order in which they are run and shown."""

from moezoo.bench.case import Case
from moezoo.bench.cases import (
    experts,
    head,
    matrices,
    memory,
    ngrams,
    peer,
    product_keys,
    selective,
    sparse_linear,
    statistical,
    trees,
)

CASES: list[Case] = [
    *product_keys.CASES,
    *peer.CASES,
    *memory.CASES,
    *ngrams.CASES,
    *experts.CASES,
    *trees.CASES,
    *head.CASES,
    *statistical.CASES,
    *selective.CASES,
    *sparse_linear.CASES,
    *matrices.CASES,
]
