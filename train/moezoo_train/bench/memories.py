"""Greedy replies of a model with memories, against ``generate`` of transformers on the same model.

No other library has these memories. ``generate`` calls the model for each token; what our steps
leave out, and how they keep what memories read of earlier tokens, is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from moezoo.bench.case import Case, Peer, Setting
from moezoo.bench.end_to_end import Job, Task
from moezoo_train.bench.decoding import Reply, generated, replied
from moezoo_train.bench.models import Architecture

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

MEMORIES: Final[dict[str, list[dict[str, Any]]]] = {
    "engram": [{"layers": [0, 2], "class_path": "moezoo.Engram"}],
    "l3": [{"layers": [1], "class_path": "moezoo.L3"}],
    "per-layer": [{"layers": "all", "class_path": "moezoo.PerLayerEmbedding"}],
}
"""Where each kind stands: in two blocks, in one, in all."""


@dataclass(frozen=True)
class Remembering:
    """The model, and what it is told."""

    model: MoezooForCausalLM
    reply: Reply


def _build(setting: Setting, folder: Path, memory: list[dict[str, Any]]) -> Task:
    from moezoo_models import MoezooConfig, MoezooForCausalLM

    model = MoezooForCausalLM(
        MoezooConfig(
            vocab_size=setting["V"],
            hidden_size=setting["d"],
            num_hidden_layers=setting["L"],
            num_attention_heads=setting["H"],
            ffn=[{"layers": "all", "class_path": "moezoo.DenseFFN"}],
            memory=memory,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # taps of a convolution begin so
                parameter.normal_(std=0.3)
        model.lm_head.weight[-1] = 0.0  # the token that ends a text is never the likeliest
    prompts = torch.randint(setting["V"] - 1, (setting["B"], setting["P"]))
    shape = Architecture.of("llama", setting.sizes, tied=False)
    parts = Remembering(model, Reply(shape, {}, prompts, setting["N"]))
    return Task(parts.reply.job(partial(replied, model, parts.reply)), parts, setting["N"])


def _by_generate(parts: Remembering) -> Job:
    """Call the whole model for each token."""
    return parts.reply.job(partial(generated, parts.model, parts.reply))


CASES = [
    Case(
        f"decode-{name}" if batch == 1 else f"decode-{name}-b{batch}",
        "end-to-end",
        f"greedy reply with memories, {name}",
        {"B": batch, "P": 16, "N": 32, "V": 2048, "d": 128, "L": 4, "H": 4},
        {"B": min(batch, 2), "P": 4, "N": 4, "V": 64, "d": 32, "L": 3, "H": 2},
        partial(_build, memory=memory),
        {"generate": Peer(_by_generate)},
        threads=1,
        unit="ms/token",
    )
    for name, memory in MEMORIES.items()
    for batch in (1, 8)
]
