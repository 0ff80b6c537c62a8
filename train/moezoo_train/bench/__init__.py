"""Cases of `moezoo bench end-to-end`: steps, replies and commands against others that do the same.

:data:`moezoo.bench.registry.FURTHER` names this module. Listing the cases imports nothing heavy.
"""

from moezoo.bench.case import Case
from moezoo_train.bench import (
    carved,
    commands,
    decoding,
    memories,
    muon,
    preparing,
    selective,
    stock,
    token_table,
    training,
)

CASES: list[Case] = [
    *training.CASES,
    *muon.CASES,
    *token_table.CASES,
    *decoding.CASES,
    *memories.CASES,
    *selective.CASES,
    *carved.CASES,
    *stock.CASES,
    *preparing.CASES,
    *commands.CASES,
]
