"""Greedy replies of a sparsified model, against the dense one here, in transformers and llama.cpp.

The shape is SmolLM2-135M's. Thresholds are quantiles of what the weights make of random tokens: of
inputs and gates a quarter is dropped, of hidden values 60 %.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.bench.case import Case, Setting
from moezoo_train.bench.against_dense import QUICK, SIZES, peers, task_of

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

DROPPED = {"input": 0.25, "up_input": 0.25, "gate": 0.25, "hidden": 0.6}
"""Shares of numbers that thresholds drop."""


@torch.no_grad()
def sparsify(model: MoezooForCausalLM, ids: Tensor) -> MoezooForCausalLM:
    """Return a model of the same weights, whose thresholds are quantiles over some tokens.

    Args:
        model: of gated dense blocks.
        ids: ``(B, S)``, the tokens.
    """
    from moezoo_models import MoezooConfig, MoezooForCausalLM

    fields = model.config.to_dict()
    widths = {"d_ff": model.model.layers[0].mlp.d_ff}
    rule = {"layers": "all", "class_path": "moezoo.SelectiveFFN", "init_args": widths}
    sparse = MoezooForCausalLM(MoezooConfig(**{**fields, "ffn": [rule]}))
    missing, unknown = sparse.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not unknown
    assert all(".selector." in name for name in missing)
    inputs: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for block in model.model.blocks()
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for block, x in zip(sparse.model.blocks(), inputs, strict=True):
        _calibrate(block.mlp, x[:, 1:].flatten(0, 1))  # the first token is computed dense
    return sparse.eval()


def _calibrate(layer: Any, x: Tensor) -> None:
    rule = layer.selector

    def drop(values: Tensor, name: str) -> Tensor:
        sizes = values.abs().flatten()
        rank = max(1, round(DROPPED[name] * sizes.numel()))
        threshold = sizes.kthvalue(rank).values
        getattr(rule, name).fill_(threshold)
        return values.where(values.abs() > threshold, 0.0)

    kept = drop(x, "input")
    rule.up_input.copy_(rule.input)
    gate = drop(F.silu(layer.gate_proj(kept)), "gate")
    drop(gate * layer.up_proj(kept), "hidden")


def _change(model: MoezooForCausalLM, setting: Setting, folder: Path) -> MoezooForCausalLM:
    some = torch.randint(setting["V"] - 1, (1, 8 * setting["P"]))
    return sparsify(model, some)


CASES = [
    Case(
        "decode-selective",
        "end-to-end",
        "greedy reply, sparsified",
        SIZES,
        QUICK,
        partial(task_of, change=_change),
        peers(1.25, 2.2, 1.0),
        threads=1,
        unit="ms/token",
    )
]
