"""The options of :class:`moezoo.SelectiveFFN`'s rules, told apart by ``kind``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moezoo.errors import InputError, check_choice, check_number


@dataclass(frozen=True)
class Thresholds:
    """Values that are small are taken for zero, and what would multiply them is not read.

    The numbers below are where thresholds begin, the same for all entries; ``moezoo sparsify``
    calibrates one for each. With zeros the block computes what the dense one does.

    Attributes:
        kind: ``threshold``.
        input: of ``|x_j|`` that the gate's product reads, or that of an MLP (TEAL, WINA).
        gate: of a neuron's ``|act(gate)|`` (CATS, CHESS); gated blocks only.
        up_input: of ``|x_j|`` that the product with W_up reads; gated blocks only.
        hidden: of the hidden values ``|h_i|`` that the product with W_down reads.
    """

    kind: Literal["threshold"] = "threshold"
    input: float = 0.0
    gate: float = 0.0
    up_input: float = 0.0
    hidden: float = 0.0

    def check(self, gated: bool) -> None:
        """Raise :class:`InputError` unless the options are in range and fit the block."""
        check_choice("selection.kind", self.kind, ("threshold",))
        for field in dataclasses.fields(self)[1:]:
            check_number(f"selection.{field.name}", getattr(self, field.name))
        for name in ("gate", "up_input"):
            if getattr(self, name) and not gated:
                raise InputError(
                    f"selection.{name}: an MLP has no gate; set selection.input and "
                    "selection.hidden, or gated: true"
                )


Selection: TypeAlias = Thresholds
"""The options of any rule."""
