"""OLMo 2 (arXiv:2501.00656) and OLMo 3 (arXiv:2512.13961): norms after attention and block."""

from __future__ import annotations

from typing import Any

from transformers import Olmo2Config, Olmo3Config

from moezoo_models.families.family import Family, attention_biases, gated_block, windows


def _olmo2(config: Any) -> dict[str, Any]:
    return {
        "norm": "rms_wide",
        "norm_placement": "post",
        "qk_norm": True,
        "qk_norm_over": "projection",
        **attention_biases(config),
    }


def _olmo3(config: Any) -> dict[str, Any]:
    own = {kind: dict(config.rope_parameters[kind]) for kind in dict.fromkeys(config.layer_types)}
    return {**_olmo2(config), **windows(config), "rope_parameters": own}


FAMILIES = {
    "olmo2": Family(Olmo2Config, _olmo2, gated_block),
    "olmo3": Family(Olmo3Config, _olmo3, gated_block),
}
