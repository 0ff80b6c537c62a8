"""Every mixture block of transformers that is adopted, alone, from a tiny configuration.

``python tests/parity/adopt_families.py`` writes ``docs/parity.md`` and the tables of
``docs/routers.md``.
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
from moezoo import CapacityOptions, RouterOptions, SparseMoE
from moezoo_models.adopt.block import Block
from moezoo_models.adopt.carrying import given_state
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.holding import Held
from moezoo_models.adopt.layouts import LAYOUTS
from moezoo_models.adopt.reading import as_block, entry_of, hold
from moezoo_models.adopt.reasons import REASONS
from moezoo_models.adopt.table import BLOCKS
from moezoo_models.adopt.units import UNITS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
ROUTERS = PAGE.with_name("routers.md")
D, E, K = 32, 8, 3
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 40,
    "expert_ffn_hidden_size": 24,
    "shared_intermediate_size": 40,
    "swiglu_limit": 1.0,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_topk": K,
    "top_k_experts": K,
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
    "DbrxFFN": "DbrxConfig",
    "DiffusionGemmaDecoderTextLayer": "DiffusionGemmaTextConfig",
    "DiffusionGemmaEncoderTextLayer": "DiffusionGemmaTextConfig",
    "Ernie4_5_VLMoeSparseMoeBlock": "Ernie4_5_VLMoeTextConfig",
    "Gemma4TextDecoderLayer": "Gemma4TextConfig",
    "Glm5NextTextMoE": "Glm5NextTextConfig",
    "Inkling2SparseMoeBlock": "Inkling2TextConfig",
    "InklingMoE": "InklingTextConfig",
    "MiniMaxM3VLSparseMoeBlock": "MiniMaxM3VLTextConfig",
    "Llama4TextMoe": "Llama4TextConfig",
    "DeepseekOcr2TextMoe": "DeepseekOcr2TextConfig",
    "Dots3NoteTextMoE": "Dots3NoteTextConfig",
    "Dots3NoteVisionMoE": "Dots3NoteVisionConfig",
    "Glm4vMoeTextMoE": "Glm4vMoeTextConfig",
    "MistralLarge4TextMoE": "MistralLarge4TextConfig",
    "MuseSparkMoE": "MuseSparkTextConfig",
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": "Qwen3OmniMoeTalkerTextConfig",
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": "Qwen3OmniMoeTextConfig",
    "Qwen3VLMoeTextSparseMoeBlock": "Qwen3VLMoeTextConfig",
    "Qwen3_5MoeSparseMoeBlock": "Qwen3_5MoeTextConfig",
    "Qwen4ExpTextSparseMoeBlock": "Qwen4ExpTextConfig",
    "Step3p7SparseMoeBlock": "Step3p7TextConfig",
    "UnlimitedOcrTextMoe": "UnlimitedOcrTextConfig",
}
"""Configurations that are not the only one of their family."""

DBRX = {"hidden_size": D, "ffn_hidden_size": 24, "moe_num_experts": E, "moe_top_k": K}
SWITCH = {"d_model": D, "d_ff": 24, "expert_capacity": 6, "dropout_rate": 0.0}
AT = "number of the layer"

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
    "DbrxFFN": [
        {"ffn_config": {**DBRX, "moe_normalize_expert_weights": p}} for p in (1.0, 2.5, None)
    ],
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
        {"n_group": 4, "norm_topk_prob": False},
        {"n_group": 1, "topk_group": 1},
    ],
    "Ernie4_5_MoeSparseMoeBlock": [{}, {"use_bias": True}, {"moe_num_shared_experts": 0}],
    "Ernie4_5_VLMoeSparseMoeBlock": [{"moe_intermediate_size": [24, 24]}],
    "Glm5NextTextMoE": [{"num_key_value_heads": 4, "norm_topk_prob": n} for n in (True, False)],
    "Step3p7SparseMoeBlock": [
        {},
        {"swiglu_limits": [0, 2.0, 0, 0], "swiglu_limits_shared": [0, 3.0, 0, 0]},
        {"swiglu_limits": [0, 2.0, 0, 0]},
        {"swiglu_limits_shared": [0, 3.0, 0, 0]},
    ],
    "DeepseekV4SparseMoeBlock": [
        {"scoring_func": score, "mlp_layer_types": ["moe"] * 4}
        for score in ("sqrtsoftplus", "sigmoid")
    ]
    + [{"mlp_layer_types": ["hash_moe"] * 4, "vocab_size": 41}],
    "MuseSparkMoE": [{"moe_hidden_size": 20, "post_norm_eps": 0.01, "rms_norm_eps": 0.1}],
    "NemotronHMoE": [{}, {"moe_latent_size": 16}],
    "SwitchTransformersSparseMLP": [
        {**SWITCH, "router_bias": True},
        {**SWITCH, "expert_capacity": 64, "dense_act_fn": "gelu"},
    ],
    "ZayaSparseMoeBlock": [
        {"num_experts_per_tok": 1, "router_hidden_size": 12, "rms_norm_eps": 0.1, AT: number}
        for number in (0, 1)
    ],
    "LongcatFlashMoE": [
        {"zero_expert_num": 4},
        {"zero_expert_num": 0},
        {"zero_expert_num": 4, "router_bias": True},
    ],
    "PhimoeSparseMoeBlock": [{"num_experts_per_tok": 2}],
    "Gemma4TextDecoderLayer": [{"enable_moe_block": True}],
    "GraniteMoeHybridMoE": [{"mamba_n_heads": 4, "mamba_d_head": 16}],
    "UnlimitedOcrTextMoe": [{"topk_method": "greedy"}, {"topk_method": "group_limited_greedy"}],
}
"""Fields that choose among what a class can do, or without which no configuration can be made."""

LATER = {"Qwen3OmniMoeTalkerTextSparseMoeBlock": {"shared_expert_intermediate_size": 40}}
"""What the configuration has no field for, and the block reads all the same."""


IN_FP32 = {"Inkling2SparseMoeBlock": ("gate",)}
"""Modules that are in fp32 whatever the model is in, and cannot be anything else."""


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
    change = dict(change)
    number = change.pop(AT, 1)
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
    more = {"layer_idx": number, "intermediate_size": 24}
    made: nn.Module = make(config, **{name: more[name] for name in names if name in more})
    torch.manual_seed(0)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith("tid2eid"):  # the first experts are in more rows than the last
            chances = torch.rand(len(tensor), E) + torch.linspace(1, 0, E)
            tensor.copy_(chances.topk(tensor.shape[1]).indices)
            continue
        is_bias = name.endswith("bias") or tensor.ndim < 2
        std = 0.3 if is_bias else tensor.shape[-1] ** -0.5
        mean = 1.0 if "scale" in name else -0.1 if is_bias else 0.0
        nn.init.normal_(tensor, mean=mean, std=std)
    made = made.to(dtype).eval()
    for name in IN_FP32.get(block.name, ()):
        made.get_submodule(name).float()
    return made


class Model(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's hidden states."""
        layer = self.mlp
        if hasattr(layer, "pre_feedforward_layernorm_2"):  # the layer of Gemma 4 does as much
            read = hidden.flatten(0, -2)
            _, weights, indices = layer.router(read)
            read = layer.pre_feedforward_layernorm_2(read)
            return layer.experts(read, indices, weights).reshape(hidden.shape)
        if hasattr(layer, "gate") and hasattr(layer.gate, "router_mlp"):  # it carries a state
            output, handed = layer(hidden, given_state(hidden, layer.gate.router_hidden_size))
            return output + handed.sin().mean(dim=-1, keepdim=True)
        output = layer(hidden, **given_beside(layer, hidden))
        return (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape)


def given_beside(layer: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Return the token ids that a block is called with, if a table of them chooses experts."""
    table = getattr(getattr(layer, "gate", None), "tid2eid", None)
    if table is None:
        return {}
    generator = torch.Generator().manual_seed(6)
    return {"input_ids": torch.randint(len(table), hidden.shape[:-1], generator=generator)}


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
    ids = given_beside(model.mlp, hidden).get("input_ids")
    load = adopted.layers["mlp"].slot_load(hidden, token_ids=ids).counts[:E]
    assert load.max() > 1.25 * load.float().mean(), "the load is even; skewed logits find more"
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


def options_of(name: str) -> str:
    """List the options of RouterOptions that a convention sets, over all of its cases."""
    found = [
        options_told(held_of(build(block, change), case).layer)
        for case, block, change in cases()
        if block.convention == name
    ]
    assert found, f"{name} is no block's"
    defaults = dict(told(RouterOptions(), everything=True))
    defaults |= told(CapacityOptions(), "capacity.", everything=True)
    texts = []
    for key in dict.fromkeys(key for options in found for key in options):
        values = sorted({options.get(key, defaults[key]) for options in found})
        if any(value[-1].isdigit() for value in values):
            texts.append(f"`{key}`")
        else:
            texts.append(f"`{key}: {'` or `'.join(values)}`")
    return ", ".join(texts) or "the defaults"


def held_of(made: nn.Module, case: str) -> Held:
    """Return the layer that computes what a block does."""
    block = as_block(made)
    return hold(block, entry_of(block, case), case)


def options_told(layer: SparseMoE) -> dict[str, str]:
    """Return the options of a layer's router, and of its capacity, that are not their defaults."""
    limit = () if layer.capacity is None else told(layer.capacity, "capacity.")
    return dict([*told(layer.router), *limit])


def told(options: Any, prefix: str = "", everything: bool = False) -> Iterator[tuple[str, str]]:
    """List the options that are not their defaults, or all."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from told(value, f"{field.name}.", everything)
        elif everything or value != field.default:
            yield prefix + field.name, str(value).lower()


def conventions() -> str:
    """Write the table of conventions."""
    lines = ["| convention | from logits l to weights w | options | blocks | easily taken wrong |"]
    lines.append("|---|---|---|---|---|")
    for name, convention in CONVENTIONS.items():
        blocks = ", ".join(f"`{b.name}`" for b in BLOCKS if b.convention == name)
        cells = [convention.title, convention.formula, options_of(name), blocks, convention.trap]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layouts() -> str:
    """Write the table of layouts."""
    lines = ["| stored as | blocks | easily taken wrong |", "|---|---|---|"]
    for name, layout in LAYOUTS.items():
        lines.append(f"| {layout.title} | {named('layout', name)} | {layout.trap} |")
    return "\n".join(lines)


def units() -> str:
    """Write the table of hidden neurons."""
    lines = ["| value of a hidden neuron | blocks | easily taken wrong |", "|---|---|---|"]
    for name, unit in UNITS.items():
        lines.append(f"| {unit.formula} | {named('unit', name)} | {unit.trap} |")
    return "\n".join(lines)


def named(what: str, key: str) -> str:
    """Name the blocks that have something, unless most do."""
    found = [block.name for block in BLOCKS if getattr(block, what) == key]
    return ", ".join(f"`{name}`" for name in found) if len(found) < 20 else "all others"


def with_tables(text: str) -> str:
    """Return the page of routers with its tables written anew."""
    tables = {"conventions": conventions, "layouts": layouts, "units": units}
    for name, write in tables.items():
        begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        assert found
        assert ended, f"there is no table of {name} on the page"
        text = f"{before}{begin}{write()}{end}{after}"
    return text


def rows(text: str) -> list[str]:
    """Return the lines of a page without its figures, which rounding changes."""
    return [re.sub(r"\d+e[-+]\d+", "x", line) for line in text.splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    ROUTERS.write_text(with_tables(ROUTERS.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n{ROUTERS}\n")
