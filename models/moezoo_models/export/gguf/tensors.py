"""From the tensors of a directory to those of a GGUF file: names, order of rows, stacks of experts.

A tensor of the file is made of consecutive pieces along its first axis, each read when it is
written, so that of a stack of experts one is in memory beside what is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moezoo.errors import InputError
from moezoo_models.export.gguf.architectures import Architecture, head_dim_of, num_experts_of
from moezoo_models.files.gate import EMBEDDINGS, HEAD, Admitted

Opened = Mapping[str, Any]
"""The tensors of a directory by name, each read where it is indexed."""

Piece = Callable[[Opened], Tensor]

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MIXTURE = re.compile(r"(?:mlp|block_sparse_moe)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.weight")
_PLAIN = {"model.norm.weight": "output_norm.weight", EMBEDDINGS: "token_embd.weight"}
_ATTENTION = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_HALVES = {"gate": "gate", "up": "up", "down": "down", "w1": "gate", "w3": "up", "w2": "down"}
_FUSED = ("experts.gate_up_proj", "input_linear.weight")
_DOWN = ("experts.down_proj", "output_linear.weight")
_ROUTER = ("gate.weight", "router.layer.weight", "router.weight")
_BIAS = "gate.e_score_correction_bias"
_ROUTERS = ("ffn_gate_inp.", "exp_probs_b.")


@dataclass
class Stored:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: as torch has it, rows last but one.
        pieces: give it in consecutive parts along its first axis.
    """

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether it stays in F32 in every file: vectors and routers."""
        return len(self.shape) == 1 or any(part in self.name for part in _ROUTERS)

    def read(self, opened: Opened) -> Iterator[Tensor]:
        """Read the pieces, in fp32, each of as many axes as the whole."""
        for piece in self.pieces:
            part = piece(opened).float()
            yield part if part.ndim == len(self.shape) else part[None]


def stored_tensors(admitted: Admitted, architecture: Architecture) -> list[Stored]:
    """List the tensors of the file that holds a model.

    Raises:
        InputError: one of the model's has no place in it, or an expert is missing.
    """
    config = admitted.config
    found: dict[str, Stored] = {}
    experts: dict[str, dict[int, tuple[str, tuple[int, ...]]]] = {}
    for name, info in admitted.tensors.items():
        if not info.numel:
            continue  # a shared expert without neurons
        match = _BLOCK.fullmatch(name)
        if match is None:
            plain = _PLAIN | {HEAD: "output.weight"}
            if name not in plain:
                raise _homeless(name)
            _add(found, plain[name], info.shape, _whole(name))
            continue
        start, inner = f"blk.{match[1]}.", match[2]
        mixture = _MIXTURE.match(inner)
        rest = inner[mixture.end() :] if mixture else inner
        if mixture and (expert := _EXPERT.fullmatch(rest)):
            half = _HALVES.get(expert[2].removesuffix("_proj"))
            if half is None:
                raise _homeless(name)
            stack = experts.setdefault(f"{start}ffn_{half}_exps.weight", {})
            stack[int(expert[1])] = (name, info.shape)
        elif mixture and rest in _FUSED:
            _add_fused(found, start, name, info.shape)
        elif mixture and rest in _DOWN:
            _add(found, f"{start}ffn_down_exps.weight", info.shape, *_each(name, info.shape))
        else:
            theirs = _block_name(inner, rest if mixture else None, architecture)
            if theirs is None:
                raise _homeless(name)
            order = _order(inner, architecture, config)
            _add(found, f"{start}{theirs}", info.shape, _whole(name, order))
    for name, stack in experts.items():
        _add_stack(found, name, stack, num_experts_of(config))
    if architecture.needs_head and "output.weight" not in found:
        embeddings = found["token_embd.weight"]
        _add(found, "output.weight", embeddings.shape, *embeddings.pieces)
    if architecture.needs_shared:
        _add_shared(found, config)
    if config.rope_parameters.get("rope_type") == "llama3":
        _add_frequencies(found, config)
    return list(found.values())


def _homeless(name: str) -> InputError:
    return InputError(
        f"checkpoint: '{name}' has no place in a GGUF file of this architecture; serve the model "
        "with transformers"
    )


def _add(found: dict[str, Stored], name: str, shape: tuple[int, ...], *pieces: Piece) -> None:
    found[name] = Stored(name, shape, list(pieces))


def _block_name(inner: str, in_mixture: str | None, architecture: Architecture) -> str | None:
    """Return the name in the file of a tensor of a block; None if it has none."""
    stem, _, kind = inner.rpartition(".")
    if kind in ("weight", "bias") and stem in _ATTENTION:
        return f"{_ATTENTION[stem]}.{kind}"
    if kind == "weight" and (norm := architecture.norm(stem)) is not None:
        return f"{norm}.weight"
    if in_mixture is None:
        return None
    if in_mixture in _ROUTER:
        return "ffn_gate_inp.weight"
    if in_mixture == _BIAS:
        return "exp_probs_b.bias"
    stem, _, kind = in_mixture.rpartition(".")
    shared, _, projection = stem.rpartition(".")
    half = _HALVES.get(projection.removesuffix("_proj"))
    if half is None or kind not in ("weight", "bias"):
        return None
    if not shared:
        return f"ffn_{half}.{kind}"
    return f"ffn_{half}_shexp.{kind}" if shared == "shared_experts" else None


def _order(inner: str, architecture: Architecture, config: Any) -> Callable[[Tensor], Tensor]:
    """Return how the rows of a tensor of attention are ordered in the file."""
    projection = inner.removeprefix("self_attn.").partition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if not architecture.permuted or projection not in heads:
        return _as_it_is
    return partial(interleave, heads=heads[projection])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows such that those of its two halves take turns.

    Args:
        tensor: ``(heads * width, ...)``.
        heads: how many there are.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _whole(name: str, order: Callable[[Tensor], Tensor] = _as_it_is) -> Piece:
    return lambda opened: order(opened[name][:])


def _one(name: str, index: int, rows: slice = slice(None)) -> Piece:
    return lambda opened: opened[name][index, rows]


def _each(name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> list[Piece]:
    return [_one(name, index, rows) for index in range(shape[0])]


def _add_fused(found: dict[str, Stored], start: str, name: str, shape: tuple[int, ...]) -> None:
    """Part a stack whose experts hold the gate's rows above the linear ones."""
    experts, both, width = shape
    half = both // 2
    for each, rows in (("gate", slice(0, half)), ("up", slice(half, both))):
        pieces = _each(name, shape, rows)
        _add(found, f"{start}ffn_{each}_exps.weight", (experts, half, width), *pieces)


def _add_stack(
    found: dict[str, Stored],
    name: str,
    stack: dict[int, tuple[str, tuple[int, ...]]],
    num_experts: int,
) -> None:
    """Stack experts that the directory holds one by one."""
    if sorted(stack) != list(range(num_experts)):
        missing = next((n for n in range(num_experts) if n not in stack), num_experts)
        raise InputError(
            f"checkpoint: {name} is of {num_experts} experts, and number {missing} is missing or "
            "one too many; copy the model again"
        )
    pieces = [_whole(stack[number][0]) for number in range(num_experts)]
    _add(found, name, (num_experts, *stack[0][1]), *pieces)


def _add_shared(found: dict[str, Stored], config: Any) -> None:
    """Add a shared expert of zeros where there is none: llama.cpp adds something else without one.

    It has the width of a routed expert.
    """
    width, d_model = config.moe_intermediate_size, config.hidden_size
    shapes = {"gate": (width, d_model), "up": (width, d_model), "down": (d_model, width)}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for half, shape in shapes.items():
            name = f"blk.{layer}.ffn_{half}_shexp.weight"
            if name not in found:
                _add(found, name, shape, _zeros(shape))


def _add_frequencies(found: dict[str, Stored], config: Any) -> None:
    """Add what the frequencies of rotation are divided by, where that is not the same for all."""
    rope, width = config.rope_parameters, head_dim_of(config)
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, width, 2) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    divisors = plain / scaled.cpu()
    _add(found, "rope_freqs.weight", tuple(divisors.shape), lambda opened: divisors)


def _zeros(shape: tuple[int, ...]) -> Piece:
    return lambda opened: torch.zeros(shape)
