"""Carving BERT-like encoders, in memory: no stock architecture holds the result.

Their feed-forward blocks are plain MLPs with biases, ``intermediate.dense`` and ``output.dense``.

Shapes: B texts, L tokens each, T tokens that are no padding, D d_model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moezoo.convert import Block, CarveOptions, carve_block, carved_layer, prune_block
from moezoo.convert.carve.prune import PruneMethod
from moezoo.errors import InputError, check_choice
from moezoo.feed_forward import FeedForward
from moezoo.layers.dense import Activation, DenseFFN
from moezoo.swap_contract import Adapter
from moezoo_kernels.activations import ACTIVATIONS as FUNCTIONS
from moezoo_models.checkpoints.dense import ACTIVATIONS
from moezoo_models.mode import evaluating

Batch = Mapping[str, Tensor]
"""The encoder's arguments: ``input_ids`` and ``attention_mask``, ``(B, L)`` each."""

_Replace = Callable[[int, Tensor, Block], FeedForward]
"""Given a layer's number, its block's inputs ``(T, D)`` and the block, makes another one."""


def carve_encoder(
    model: nn.Module, batches: Sequence[Batch], options: CarveOptions
) -> list[dict[str, float]]:
    """Carve every block of a BERT-like encoder, in place.

    Each block is carved on the inputs it gets behind the blocks already carved; padding is left
    out.

    Args:
        model: a ``BertModel`` of transformers, or one built alike (RoBERTa, ELECTRA, …).
        batches: calibration inputs, such as a tokenizer returns.
        options: how to carve; ``bias`` is on by default, since these blocks have biases.

    Returns:
        Each layer's figures, as of :class:`moezoo.convert.Carved`.

    Raises:
        InputError: the model is built otherwise, or the options do not fit its blocks.
    """
    figures = []
    activation = _activation(model)

    def replace(layer: int, x: Tensor, block: Block) -> FeedForward:
        own = dataclasses.replace(options, seed=options.seed * 1_000_003 + layer)
        biases = (block.bias_in, block.bias_out)
        carved = carve_block(x, None, block.up, block.down, own, block.act, *biases)
        figures.append(carved.figures)
        return carved_layer(carved.plan, None, block.up, block.down, activation, *biases)

    _replace_blocks(model, batches, replace)
    return figures


def prune_encoder(
    model: nn.Module, batches: Sequence[Batch], keep: int, method: PruneMethod = "static_ls"
) -> None:
    """Prune every block of a BERT-like encoder to ``keep`` neurons, in place: the baseline.

    Args:
        model: as for :func:`carve_encoder`.
        batches: as there.
        keep: neurons to keep.
        method: as for :func:`moezoo.convert.prune_block`.

    Raises:
        InputError: as there.
    """
    activation = _activation(model)

    def replace(_: int, x: Tensor, block: Block) -> FeedForward:
        biases = (block.bias_in, block.bias_out)
        small = prune_block(x, None, block.up, block.down, keep, method, block.act, *biases)
        layer = DenseFFN(small.d_model, small.width, activation=activation, gated=False, bias=True)
        layer.load_state_dict(
            {
                "up_proj.weight": small.up,
                "up_proj.bias": small.bias_in,
                "down_proj.weight": small.down,
                "down_proj.bias": small.bias_out,
            }
        )
        return layer

    _replace_blocks(model, batches, replace)


@torch.no_grad()
def _replace_blocks(model: nn.Module, batches: Sequence[Batch], replace: _Replace) -> None:
    """Go through the layers once, with the states of all batches."""
    act = FUNCTIONS[_activation(model)]
    layers = _layers(model)
    if not batches:
        raise InputError("batches: there are none; give calibration inputs")
    with evaluating(model):
        calls = [_call_of_first(model, layers[0], batch) for batch in batches]
        masks = [batch.get("attention_mask") for batch in batches]
        for number, layer in enumerate(layers):
            x = torch.cat([_inputs(layer, *each) for each in zip(calls, masks, strict=True)])
            inner, outer = layer.intermediate.dense, layer.output.dense
            block = Block(None, inner.weight, outer.weight, act, inner.bias, outer.bias)
            made = replace(number, x, block).to(inner.weight)
            # What follows in `output`, dropout and a norm around the residual, stays as it is.
            layer.intermediate, layer.output.dense = nn.Identity(), Adapter(made).eval()
            for call in calls:
                call.states = call(layer)


def _activation(model: nn.Module) -> Activation:
    name = getattr(getattr(model, "config", None), "hidden_act", None)
    return cast(Activation, ACTIVATIONS[check_choice("hidden_act", name, ACTIVATIONS)])


def _layers(model: nn.Module) -> Sequence[Any]:
    layers = getattr(getattr(getattr(model, "base_model", model), "encoder", None), "layer", ())
    for path in ("intermediate.dense", "output.dense"):
        if not layers or not all(_has_linear(layer, path) for layer in layers):
            raise InputError(
                f"model: {type(model).__name__} has no encoder.layer[…].{path} with a bias; give "
                "a BERT-like encoder that is dense"
            )
    return layers


def _has_linear(module: nn.Module, path: str) -> bool:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(found, nn.Linear) and found.bias is not None


@dataclasses.dataclass
class _Call:
    """The arguments that the model calls its layers with, for one batch."""

    states: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, layer: nn.Module) -> Tensor:
        output = layer(self.states, *self.others, **self.named)
        return output[0] if isinstance(output, tuple) else output


class _FoundError(Exception):
    """Stops a forward pass once the first layer's arguments are known."""


def _call_of_first(model: nn.Module, layer: nn.Module, batch: Batch) -> _Call:
    found: list[_Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_Call(args[0], args[1:], named))
        raise _FoundError

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**batch)
    except _FoundError:
        return found[0]
    finally:
        hook.remove()
    raise AssertionError("the encoder does not use its first layer")


def _inputs(layer: Any, call: _Call, mask: Tensor | None) -> Tensor:
    """Return what a layer's block sees of the tokens that are no padding, ``(T, D)``."""
    seen: list[Tensor] = []
    hook = layer.intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        call(layer)
    finally:
        hook.remove()
    return seen[0].flatten(0, 1) if mask is None else seen[0][mask.bool()]
