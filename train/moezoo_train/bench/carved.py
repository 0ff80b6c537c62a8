"""Greedy replies of a carved model, against the dense one here, in transformers and llama.cpp.

The shape is SmolLM2-135M's, cut as `moezoo carve` does by default: 60 of 96 parts are shared, and
12 of the other 36 active. Weights are drawn, so that neurons are cut as they lie, and routers are
drawn too: how long a token takes depends on neither.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moezoo.bench.case import Case, Peer, Setting
from moezoo.bench.end_to_end import Job, timed
from moezoo_train.bench.against_dense import QUICK, SIZES, Copy, llama_cpp_reply, peers, task_of
from moezoo_train.bench.llama_cpp import PACKAGES
from moezoo_train.bench.models import mapped

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

_FLATNESS = 1e-3
"""What logits are multiplied with where weights of one are normalized sigmoids."""


@torch.no_grad()
def cut(
    model: MoezooForCausalLM, shared: int, active: int, parts: int, folder: Path
) -> MoezooForCausalLM:
    """Return a model whose dense blocks are cut into parts, as they lie.

    Args:
        model: of gated dense blocks without biases.
        shared: parts that run on every token, the first ones.
        active: of the others, per token.
        parts: in all.
        folder: for a file of its weights.
    """
    from moezoo_models import MoezooConfig, MoezooForCausalLM

    fields, width = model.config.to_dict(), model.model.layers[0].mlp.d_ff
    f, routed = width // parts, parts - shared
    options = {"num_experts": routed, "top_k": active, "d_expert": f, "router": "linear"}
    options |= {"num_shared_experts": shared}
    rule = {"layers": "all", "class_path": "moezoo.CarvedMoE", "init_args": options}
    carved = MoezooForCausalLM(MoezooConfig(**{**fields, "ffn": [rule]})).eval()
    rest = {name: t for name, t in model.state_dict().items() if ".mlp." not in name}
    carved.load_state_dict(rest, strict=False)
    for block, dense in zip(carved.model.blocks(), model.model.blocks(), strict=True):
        layer: Any = block.mlp
        gate, up, down = (
            dense.mlp.get_parameter(f"{name}_proj.weight") for name in ("gate", "up", "down")
        )
        split = shared * f
        layer.shared_expert.gate_proj.weight.copy_(gate[:split])
        layer.shared_expert.up_proj.weight.copy_(up[:split])
        layer.shared_expert.down_proj.weight.copy_(down[:, :split])
        rows = [matrix[split:].unflatten(0, (routed, f)) for matrix in (gate, up)]
        layer.experts.gate_up_proj.copy_(torch.cat(rows, dim=1))
        layer.experts.down_proj.copy_(down[:, split:].unflatten(1, (routed, f)).transpose(0, 1))
        layer.gate.weight.normal_()
    mapped(carved, folder)
    return carved


def _change(model: MoezooForCausalLM, setting: Setting, folder: Path) -> MoezooForCausalLM:
    return cut(model, setting["x"], setting["y"], setting["z"], folder)


def _one_read(parts: Copy) -> Job:
    """Read for each new token the weights that it needs, of experts as many as it has."""
    read: list[Tensor] = [parts.model.lm_head.weight]
    for block in parts.model.model.blocks():
        read += [weight for name, weight in block.named_parameters() if "mlp.experts" not in name]
        top_k, experts = block.mlp.gate.top_k, block.mlp.experts
        chosen = torch.randperm(experts.num_experts)[:top_k].tolist()
        read += [stack[e] for stack in (experts.gate_up_proj, experts.down_proj) for e in chosen]
    read = [tensor.detach() for tensor in read]

    def reply() -> None:
        for _ in range(parts.dense.new):
            for tensor in read:
                tensor.sum()

    size = sum(tensor.nbytes for tensor in read)
    return Job(timed(reply), dict, note=f"{size / 1e6:,.0f} MB per token")


def as_glm4_moe(model: MoezooForCausalLM) -> dict[str, Tensor]:
    """Return a carved model's weights by the names of GLM-4.5's mixture, as llama.cpp knows it.

    Weights of one are normalized sigmoids of logits so small that all are nearly equal.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        start, inside, rest = name.partition(".mlp.")
        if not inside:
            found[name] = tensor
        elif rest == "gate.weight":
            found[name] = tensor * _FLATNESS
        elif rest == "gate.bias":
            found[f"{start}.mlp.gate.e_score_correction_bias"] = tensor * (_FLATNESS / 4)
        elif rest == "experts.gate_up_proj":
            for half, part in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[f"{start}.mlp.experts.{half}_proj"] = part
        elif rest == "experts.down_proj":
            found[name] = tensor
        elif rest.startswith("shared_expert."):
            found[f"{start}.mlp.shared_experts.{rest.removeprefix('shared_expert.')}"] = tensor
    return found


def _llama_cpp(parts: Copy) -> Job:
    """The carved model as GLM-4.5's mixture; other tokens, as its weights are nearly one only."""
    active = parts.model.model.layers[0].mlp.top_k
    return llama_cpp_reply(parts, as_glm4_moe(parts.model), "F32", active)


CASES = [
    Case(
        "decode-carved",
        "end-to-end",
        "greedy reply, carved",
        {**SIZES, "x": 60, "y": 12, "z": 96},
        {**QUICK, "x": 8, "y": 3, "z": 16},
        partial(task_of, change=_change),
        {
            **peers(1.14, 1.9, 1.0),
            "llama.cpp F32, carved": Peer(_llama_cpp, PACKAGES[0], same=False),
            "one read of the weights": Peer(_one_read, same=False),
        },
        threads=1,
        unit="ms/token",
    )
]
