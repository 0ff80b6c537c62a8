"""Methods side by side: same text, same tokens, same seeds, equal active FLOPs per token.

``settings`` says what is compared, ``width`` makes the FLOPs equal, ``plan`` lists the runs,
``run`` trains one, ``results`` averages over seeds, ``report`` writes the table and ``figure``
draws it.
"""

from moezoo_train.experiments.compare.command import compare

__all__ = ["compare"]
