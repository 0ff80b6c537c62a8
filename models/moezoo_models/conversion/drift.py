"""How far a mixture is from the dense model it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert import LayerPlan
from moezoo.convert.plan import Expert
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_models.checkpoints.directory import CONFIG, load_checkpoint, read_json
from moezoo_models.checkpoints.stock import load_stock
from moezoo_models.conversion.source import Source, layer_of
from moezoo_models.model.config import MoezooConfig

_TOKENS = 64
_ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.router.weight")
"""How the names of routers' weights end in the models that conversions write."""


@dataclass(frozen=True)
class Drift:
    """The difference between two models on the same random tokens.

    Attributes:
        of: logits, or the outputs of single layers.
        absolute: its largest absolute value.
        relative: the same, over the largest absolute value of the dense one.
        argmax_agreement: fraction of positions where both predict the same token; None for layers.
    """

    of: str
    absolute: float
    relative: float
    argmax_agreement: float | None


@torch.no_grad()
def logits_drift(source: Source, mixture: Path, routers: Mapping[int, Tensor]) -> Drift:
    """Compare the logits of a dense model and of the mixture that was written.

    Each is loaded from its files by the code that its users have, with all layers and experts, one
    after the other. Where experts are alike, logits do not show a wrong router: those are compared
    with what was planned.

    Args:
        source: the dense model.
        mixture: directory that this process has written, and compared with its checksums.
        routers: weights ``(N, D)`` of each converted layer's router, as planned.

    Raises:
        InputError: weights of the mixture are missing, unexpected or of another shape.
        RuntimeError: a router is not the planned one.
    """
    for name in source.tensors:
        source.read(name)  # of which checksum and numbers are looked at, where they were not
    expected = _logits(load_any(source.directory, sound=True))
    model = load_any(mixture, sound=True)
    _check_routers(model, routers)
    found = _logits(model)
    same = expected.argmax(-1) == found.argmax(-1)
    return _drift("logits", found, expected, float(same.float().mean()))


def _check_routers(model: Any, planned: Mapping[int, Tensor]) -> None:
    named = ((layer_of(name), name, p) for name, p in model.named_parameters())
    found = {layer: (name, p) for layer, name, p in named if name.endswith(_ROUTERS)}
    for layer, wanted in planned.items():
        name, weight = found[layer]
        wrong = (weight.to(wanted.dtype) != wanted).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise RuntimeError(
                f"'{name}' is not the planned router: row {wrong[0]} differs; please report this "
                "with the config.json of the source"
            )


@torch.no_grad()
def layer_drift(
    models: Sequence[Source], layers: tuple[int, ...], plan: Callable[[int], LayerPlan]
) -> Drift:
    """Compare each converted block with its plan, on random inputs, one expert in memory.

    Args:
        models: the dense model, and those that experts are of where they are several.
        layers: numbers of the converted blocks.
        plan: plans a layer.
    """
    source = models[0]
    worst, act = Drift("layers", 0.0, 0.0, None), ACTIVATIONS[source.ffn["activation"]]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        block = source.block(layer)  # mapped: only what is being multiplied takes memory in fp32
        x = torch.randn(_TOKENS, source.config.hidden_size, generator=generator)
        gate, biases = block.get("gate"), (block.get("bias_in"), block.get("bias_out"))
        if len(models) > 1:
            found = _of_several(plan(layer), x, [model.block(layer) for model in models], act)
        else:
            found = plan(layer).run(x, gate, block["up"], block["down"], act, *biases)
        drift = _drift("layers", found, _dense(x, block, act), None)
        worst = max(worst, drift, key=lambda each: each.relative)
    return worst


def _dense(x: Tensor, block: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute a dense block in fp32, with one projection of it in memory at a time."""
    wide = {name: tensor.float() for name, tensor in block.items() if name.startswith("bias")}
    inner = F.linear(x, block["up"].float(), wide.get("bias_in"))
    if "gate" in block:
        inner = act(x @ block["gate"].float().t()) * inner
    else:
        inner = act(inner)
    return F.linear(inner, block["down"].float(), wide.get("bias_out"))


def _of_several(
    plan: LayerPlan,
    x: Tensor,
    blocks: Sequence[Mapping[str, Tensor]],
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute a plan whose experts are of several dense blocks, ``(T, D)`` to ``(T, D)``."""

    def answer(expert: Expert) -> Tensor:
        block = blocks[expert.block]
        inner = x @ expert.cut("up", block["up"]).to(x).t()
        if "bias_in" in block:
            inner = inner + expert.cut_bias(block["bias_in"]).to(x)
        if "gate" in block:
            inner = act(x @ expert.cut("gate", block["gate"]).to(x).t()) * inner
        else:
            inner = act(inner)
        output = inner @ expert.cut("down", block["down"]).to(x).t()
        if "bias_out" in block:
            output = output + expert.cut_output_bias(block["bias_out"]).to(x)
        return output

    weights = plan.weights(x, act)
    output = torch.zeros_like(x) if plan.shared is None else answer(plan.shared)
    for number, expert in enumerate(plan.experts):
        output = output + weights[:, number : number + 1] * answer(expert)
    return output


def _drift(of: str, found: Tensor, expected: Tensor, agreement: float | None) -> Drift:
    absolute = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    return Drift(of, absolute, absolute / max(largest, 1e-30), agreement)


def _logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    length = min(_TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    return model(input_ids=tokens, use_cache=False).logits


def load_any(directory: Path, sound: bool = False) -> Any:
    """Load a checkpoint of ours with our code and any other with transformers', for evaluation.

    Where there are no safetensors, transformers unpickles tensors and nothing else, as we do. Where
    this CPU is slow in the dtype it was saved in, it is loaded in fp32.

    Args:
        directory: the checkpoint.
        sound: as of :func:`moezoo_models.checkpoints.stock.load_stock`.

    Raises:
        InputError: weights are missing, unexpected or of another shape.
    """
    if read_json(directory / CONFIG).get("model_type") == MoezooConfig.model_type:
        return load_checkpoint(directory, dtype="auto")[0].eval()
    return load_stock(directory, pickled=True, dtype="auto", sound=sound)
