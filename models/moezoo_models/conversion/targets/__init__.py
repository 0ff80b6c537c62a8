"""The formats a mixture can be written in: stock architectures of transformers, and ours."""

from moezoo_models.conversion.targets.base import TARGETS, Output, Target
from moezoo_models.conversion.targets.glm4_moe import Glm4Moe
from moezoo_models.conversion.targets.mixture import Mixture
from moezoo_models.conversion.targets.ours import Moezoo
from moezoo_models.conversion.targets.stock import (
    FlexOlmo,
    GraniteMoe,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
)

TARGETS |= {
    target.name: target
    for target in (
        Mixtral(),
        Qwen2Moe(),
        Qwen3Moe(),
        Glm4Moe(),
        GraniteMoe(),
        FlexOlmo(),
        Moezoo(),
    )
}

CLOSEST = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "granite": "granitemoe",
    "phi3": "mixtral",
}
"""Dense families' closest relatives among the stock ones; of the others it is ours."""

__all__ = ["CLOSEST", "TARGETS", "Mixture", "Output", "Target"]
