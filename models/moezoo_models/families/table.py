"""All dense architectures that are known, by ``model_type``."""

from __future__ import annotations

from moezoo_models.families import gemma, gpt, llama, olmo
from moezoo_models.families.family import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **olmo.FAMILIES,
    **gpt.FAMILIES,
}
