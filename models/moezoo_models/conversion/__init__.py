"""Dense checkpoints into mixtures of experts, directory to directory, one tensor at a time."""

from typing import TYPE_CHECKING

from moezoo_models.lazy import lazily

if TYPE_CHECKING:
    from moezoo_models.conversion.carve import CMoEOptions
    from moezoo_models.conversion.convert import Conversion
    from moezoo_models.conversion.distillation import RecoveryOptions
    from moezoo_models.conversion.encoders import carve_encoder, prune_encoder
else:
    __getattr__ = lazily(
        __name__,
        {
            "carve": ("CMoEOptions",),
            "convert": ("Conversion",),
            "distillation": ("RecoveryOptions",),
            "encoders": ("carve_encoder", "prune_encoder"),
        },
    )

__all__ = ["CMoEOptions", "Conversion", "RecoveryOptions", "carve_encoder", "prune_encoder"]
