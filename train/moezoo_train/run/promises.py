"""What other parts of a run ask of its module, for the type checker to confirm."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moezoo_train.run.module import LanguageModel
    from moezoo_train.trained import Measured, Parallelized, Savable, TakesHashTables

    def _is_what_others_ask_for(
        module: LanguageModel,
    ) -> tuple[Parallelized, Measured, TakesHashTables, Savable]:
        return module, module, module, module
