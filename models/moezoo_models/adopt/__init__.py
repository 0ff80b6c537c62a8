"""Mixture blocks of transformers, held by our layers: table, judgement, trial."""

from moezoo_models.adopt.adopting import Adopted, adopt

__all__ = ["Adopted", "adopt"]
