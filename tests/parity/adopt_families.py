"""Every mixture block of transformers that is adopted, alone, from a tiny configuration.

``python tests/parity/adopt_families.py`` writes ``docs/parity.md``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moezoo
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.layouts import LAYOUTS
from moezoo_models.adopt.table import BLOCKS, REASONS, Block

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
D, E, K = 32, 8, 3
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_topk": K,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "route_scale": 2.5,
    "router_scaling_factor": 2.5,
    "moe_router_scaling_factor": 2.5,
    "moe_routed_scaling_factor": 2.5,
}
"""Given to a configuration where it has a field of the name."""

CONFIGS = {
    "AriaTextMoELayer": "AriaTextConfig",
    "InklingMoE": "InklingTextConfig",
    "Llama4TextMoe": "Llama4TextConfig",
    "DeepseekOcr2TextMoe": "DeepseekOcr2TextConfig",
    "Dots3NoteTextMoE": "Dots3NoteTextConfig",
    "Dots3NoteVisionMoE": "Dots3NoteVisionConfig",
    "Glm4vMoeTextMoE": "Glm4vMoeTextConfig",
    "MistralLarge4TextMoE": "MistralLarge4TextConfig",
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": "Qwen3OmniMoeTalkerTextConfig",
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": "Qwen3OmniMoeTextConfig",
    "Qwen3VLMoeTextSparseMoeBlock": "Qwen3VLMoeTextConfig",
    "Qwen3_5MoeSparseMoeBlock": "Qwen3_5MoeTextConfig",
    "Qwen4ExpTextSparseMoeBlock": "Qwen4ExpTextConfig",
    "UnlimitedOcrTextMoe": "UnlimitedOcrTextConfig",
}
"""Configurations that are not the only one of their family."""

CHANGES: dict[str, list[dict[str, Any]]] = {
    "Cohere2MoeSparseMoeBlock": [
        {"expert_selection_fn": "softmax"},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
        {"shared_expert_combination_strategy": "average"},
        {"num_shared_experts": 0},
    ],
    "DeepseekOcr2TextMoe": [{"topk_method": "greedy"}, {"topk_method": "group_limited_greedy"}],
    "DeepseekV2Moe": [{"topk_method": "greedy"}, {"topk_method": "group_limited_greedy"}],
    "Dots3NoteTextMoE": [{"num_key_value_heads": 4, "norm_topk_prob": n} for n in (True, False)],
    "Dots3NoteVisionMoE": [{"adapter_in_dim": D, "mlp_layer_types": ["sparse"] * 4}],
    "LagunaSparseMoeBlock": [
        {"moe_router_logit_softcapping": 0.0},
        {"moe_router_logit_softcapping": 1.5},
    ],
    "Lfm2MoeSparseMoeBlock": [
        {"use_expert_bias": bias, "norm_topk_prob": norm}
        for bias in (True, False)
        for norm in (True, False)
    ],
    "AXK2MoE": [
        {"n_group": None, "topk_group": None},
        {"n_group": 4},
        {"n_group": 1, "topk_group": 1},
    ],
    "Ernie4_5_MoeSparseMoeBlock": [{}, {"moe_num_shared_experts": 0}],
    "PhimoeSparseMoeBlock": [{"num_experts_per_tok": 2}],
    "GraniteMoeHybridMoE": [{"mamba_n_heads": 4, "mamba_d_head": 16}],
    "UnlimitedOcrTextMoe": [{"topk_method": "greedy"}, {"topk_method": "group_limited_greedy"}],
}
"""Fields that choose among what a class can do, or without which no configuration can be made."""

LATER = {"Qwen3OmniMoeTalkerTextSparseMoeBlock": {"shared_expert_intermediate_size": 40}}
"""What the configuration has no field for, and the block reads all the same."""


def module_of(block: Block) -> Any:
    """Import the file of a block."""
    return importlib.import_module(f"transformers.models.{block.family}.modeling_{block.family}")


def config_class(block: Block) -> Any:
    """Return the class of configurations that a block is built from."""
    module = module_of(block)
    if block.name in CONFIGS:
        return getattr(module, CONFIGS[block.name])
    found = {
        name: member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if name.endswith("Config") and name != "PreTrainedConfig"
    }
    (config,) = found.values()
    return config


def fields_of(config: Any) -> set[str]:
    """Return the names that a class of configurations takes."""
    return {field.name for field in dataclasses.fields(config)}


def cases() -> Iterator[tuple[str, Block, dict[str, Any]]]:
    """List the blocks with every setting of what their routers can be told."""
    for block in BLOCKS:
        changes = CHANGES.get(block.name)
        if changes is None:
            flag = "norm_topk_prob" in fields_of(config_class(block))
            changes = [{"norm_topk_prob": value} for value in (True, False)] if flag else [{}]
        for change in changes:
            told = ", ".join(f"{name}={value}" for name, value in change.items())
            yield f"{block.name} ({told})" if told else block.name, block, change


def build(block: Block, change: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a block with random weights, biases and buffers, in evaluation mode."""
    kind = config_class(block)
    known, renamed = fields_of(kind), kind.attribute_map or {}
    names = {name: name if name in known else renamed.get(name) for name in SIZES}
    sizes = {name: SIZES[key] for key, name in names.items() if name in known}
    logging.disable(logging.WARNING)  # token ids outside of the tiny vocabulary
    try:
        config = kind(**(sizes | change))
    finally:
        logging.disable(logging.NOTSET)
    for name, value in LATER.get(block.name, {}).items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    make = getattr(module_of(block), block.name)
    names = list(inspect.signature(make.__init__).parameters)[2:]
    made: nn.Module = make(config, *([1] if "layer_idx" in names else []))
    torch.manual_seed(0)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        is_bias = name.endswith("bias") or tensor.ndim < 2
        std = 0.3 if is_bias else tensor.shape[-1] ** -0.5
        nn.init.normal_(tensor, mean=-0.1 if is_bias else 0.0, std=std)
    return made.to(dtype).eval()


class Model(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's hidden states."""
        output = self.mlp(hidden)
        return (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape)


def compute(model: Model, hidden: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of the input and of every parameter."""
    x = hidden.clone().requires_grad_()
    output = model(x)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (output * direction.to(hidden)).sum().backward()
    found = {"output": output.detach(), "input": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            found[name] = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = None
    return found


def difference(block: Block, change: dict[str, Any], dtype: torch.dtype) -> float:
    """Return the largest difference, relative to the largest element of what is compared."""
    model = Model(build(block, change, dtype))
    hidden = torch.randn(3, 43, D, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.7
    theirs = compute(model, hidden)
    adopted = moezoo.adopt(model)
    ours = compute(model, hidden)
    assert theirs.keys() == ours.keys()
    load = adopted.layers["mlp"].slot_load(hidden).counts
    assert load.max() > 1.5 * load.float().mean(), "the load is even; skewed logits find more"
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs
    )


def page() -> str:
    """Write the table of families, conventions and differences."""
    largest: dict[str, list[float]] = {}
    for _, block, change in cases():
        found = [difference(block, change, dtype) for dtype in (torch.float32, torch.float64)]
        before = largest.setdefault(block.path, [0.0, 0.0])
        largest[block.path] = [max(pair) for pair in zip(before, found, strict=True)]
    lines = [
        "# Parity with transformers",
        "",
        f"The mixture blocks of transformers {transformers.__version__} that `moezoo.adopt` holds, "
        "and how far output and all gradients of a SparseMoE with the same weights are from "
        "theirs: the largest difference, relative to the largest element, on random tokens at "
        "random weights and biases, over every setting of the router. Some routers compute in "
        "fp32 whatever their input is, which the last column shows. Written by "
        "`python tests/parity/adopt_families.py`; "
        "[the conventions](routers.md) are explained elsewhere.",
        "",
        "| family | block | convention | experts | fp32 | fp64 |",
        "|---|---|---|---|--:|--:|",
    ]
    for block in BLOCKS:
        fp32, fp64 = largest[block.path]
        cells = [block.family, f"`{block.name}`", CONVENTIONS[block.convention].title]
        cells += [LAYOUTS[block.layout].title, f"{fp32:.0e}", f"{fp64:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Not held, and left as they are by a refusal:", "", "| block | reason |"]
    lines += ["|---|---|"]
    lines += [f"| `{path.split('.', 2)[2]}` | {reason} |" for path, reason in REASONS.items()]
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[str]:
    """Return the lines of a page without its figures, which rounding changes."""
    return [re.sub(r"\d+e[-+]\d+", "x", line) for line in text.splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
