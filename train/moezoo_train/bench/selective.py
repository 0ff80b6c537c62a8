"""Greedy replies of a sparsified model, against the dense one here, in transformers and llama.cpp.

The shape is SmolLM2-135M's. Thresholds are quantiles of what the weights make of random tokens: of
inputs and gates a quarter is dropped, of hidden values 60 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.bench.case import PLAIN, Case, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Task
from moezoo_train.bench.decoding import Reply, told, transformers_reply
from moezoo_train.bench.llama_cpp import PACKAGES, LlamaCpp
from moezoo_train.bench.models import Architecture, mapped

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

DROPPED = {"input": 0.25, "up_input": 0.25, "gate": 0.25, "hidden": 0.6}
"""Shares of numbers that thresholds drop."""


@dataclass(frozen=True)
class Sparsified:
    """What all sides are given: the dense model as a task, and the sparsified one."""

    dense: Reply
    model: MoezooForCausalLM


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


def _build(setting: Setting, folder: Path) -> Task:
    architecture = Architecture.of("llama", setting.sizes)
    model = architecture.ours().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # fresh ones are so small that every token is the likeliest
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if "embed" in name:
                parameter[-1] = 0.0  # the token that ends a text is never the likeliest
    some = torch.randint(setting["V"] - 1, (1, 8 * setting["P"]))
    prompts = torch.randint(setting["V"] - 1, (1, setting["P"]))
    weights = mapped(model, folder)
    sparse = sparsify(model, some)
    dense = Reply(architecture, weights, prompts, setting["N"])
    ours = dense.job(partial(told, sparse, dense))
    return Task(ours, Sparsified(dense, sparse), setting["N"])


def _dense(parts: Sparsified) -> Job:
    """The dense model, by the decoder here."""
    model = parts.dense.architecture.ours().eval()
    model.load_state_dict(parts.dense.weights, assign=True)
    return parts.dense.job(partial(told, model, parts.dense))


def _masked(parts: Sparsified) -> Job:
    """The same tokens by torch's operators: products whole, of factors that are zero."""
    from moezoo_kernels import backends

    def reply() -> Tensor:
        with backends.use("torch"):
            return told(parts.model, parts.dense)

    return parts.dense.job(reply)


def _transformers(parts: Sparsified) -> Job:
    return transformers_reply(parts.dense)


def _llama_cpp(parts: Sparsified, kind: str) -> Job:
    for package in PACKAGES:
        package.check()
    dense = parts.dense
    ids = dense.prompts[0].tolist()
    server = LlamaCpp(dense.architecture, dense.weights, len(ids) + dense.new + 1, kind)
    return dense.job(lambda: torch.tensor([server.reply(ids, dense.new)]))


_TRANSFORMERS = Package("transformers", "pip install 'moezoo[train]'")

CASES = [
    Case(
        "decode-selective",
        "end-to-end",
        "greedy reply, sparsified",
        {"B": 1, "P": 16, "N": 32, "V": 49152, "d": 576, "f": 1536, "L": 30, "H": 9, "G": 3},
        {"V": 64, "d": 32, "f": 64, "L": 2, "H": 2, "G": 1, "P": 4, "N": 4},
        _build,
        {
            "dense": Peer(_dense, same=False, target=Target(forward=1.25)),
            PLAIN: Peer(_masked),
            "transformers, dense": Peer(
                _transformers, _TRANSFORMERS, same=False, target=Target(forward=2.2)
            ),
            "llama.cpp F32, dense": Peer(
                partial(_llama_cpp, kind="F32"),
                PACKAGES[0],
                same=False,
                target=Target(forward=1.0),
            ),
            "llama.cpp Q8_0, dense": Peer(
                partial(_llama_cpp, kind="Q8_0"), PACKAGES[0], same=False
            ),
        },
        threads=1,
        unit="ms/token",
    )
]
