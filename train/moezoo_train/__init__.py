"""moezoo_train: training moezoo's language models with Lightning.

``moezoo_train.fit`` is ``moezoo fit`` from Python. Lightning takes seconds to import, so it comes
with the first name that is asked for; what is not named here is imported from its module, such as
``moezoo_train.run.guard``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moezoo_train.data.datamodule import TokenDataModule
    from moezoo_train.run.fitting import FitResult, fit
    from moezoo_train.run.module import LanguageModel
else:
    _HOMES = {
        "FitResult": "run.fitting",
        "LanguageModel": "run.module",
        "TokenDataModule": "data.datamodule",
        "fit": "run.fitting",
    }

    def __getattr__(name: str) -> Any:
        """Load a public name (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        """List what is there and what can be loaded."""
        return sorted({*globals(), *_HOMES})


__all__ = ["FitResult", "LanguageModel", "TokenDataModule", "fit"]
