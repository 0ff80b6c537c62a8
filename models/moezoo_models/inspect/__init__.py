"""Inspecting a trained model: load and specialization of experts, sparsity, spectra, triggers, and
what blocks do to the residual stream."""

from typing import TYPE_CHECKING

from moezoo_models.lazy import lazily

if TYPE_CHECKING:
    from moezoo_models.inspect.blocks import ModelBlocks, measure_blocks
    from moezoo_models.inspect.sparsity import ModelSparsity, measure_sparsity
    from moezoo_models.inspect.specialization import ModelSpecialization, count_choices
    from moezoo_models.inspect.spectrum import Spectra, measure_spectra
    from moezoo_models.inspect.triggers import NeuronTriggers, find_triggers
    from moezoo_models.inspect.usage import ModelUsage, count_usage
else:
    __getattr__ = lazily(
        __name__,
        {
            "blocks": ("ModelBlocks", "measure_blocks"),
            "sparsity": ("ModelSparsity", "measure_sparsity"),
            "specialization": ("ModelSpecialization", "count_choices"),
            "spectrum": ("Spectra", "measure_spectra"),
            "triggers": ("NeuronTriggers", "find_triggers"),
            "usage": ("ModelUsage", "count_usage"),
        },
    )

__all__ = [
    "ModelBlocks",
    "ModelSparsity",
    "ModelSpecialization",
    "ModelUsage",
    "NeuronTriggers",
    "Spectra",
    "count_choices",
    "count_usage",
    "find_triggers",
    "measure_blocks",
    "measure_sparsity",
    "measure_spectra",
]
