"""Mixture blocks of transformers, held by our layers: table, judgement, trial."""

from moezoo_models.adopt.adopting import Adopted, adopt, adopted_layers

__all__ = ["Adopted", "adopt", "adopted_layers"]
