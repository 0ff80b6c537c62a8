"""The options of attention whose values a mixture's experts answer (UMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moezoo.arguments import as_options
from moezoo.errors import check_flag, check_int, check_number


@dataclass(frozen=True)
class AttentionExperts:
    """How attention takes part in the mixtures of a model.

    Attributes:
        top_k: experts that answer what a token attends to, K.
        rank: of what is an expert's own in its query, R.
        normalize: divide the chosen scores by their sum.
        balance: coefficient of the load-balancing loss within each sequence, of attention's router.
    """

    top_k: int = 3
    rank: int = 16
    normalize: bool = False
    balance: float = 1e-3

    def check(self) -> None:
        """Check the options.

        Raises:
            InputError: one is out of range.
        """
        for name in ("top_k", "rank"):
            check_int(f"attention_experts.{name}", getattr(self, name))
        check_flag("attention_experts.normalize", self.normalize)
        check_number("attention_experts.balance", self.balance)


def options_of(given: Any) -> AttentionExperts:
    """Return the options that a configuration's mapping holds.

    Raises:
        InputError: it is none, or an option is unknown or out of range.
    """
    options = as_options("attention_experts", given, AttentionExperts)
    options.check()
    return options
