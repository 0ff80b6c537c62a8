"""Blocks that are carved and pruned by the rules of `moezoo carve`, for studies beside other ways.

The first token of each window is apart, ridges are chosen on held-out tokens, and the refit aims at
what makes up for earlier layers' errors: both get the same means. Budgets are equal in all layers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moezoo.convert import Block, CarveOptions, prune_block
from moezoo_models.conversion.carve import own_options
from moezoo_models.conversion.carving import answer_of, carve_layer
from moezoo_models.conversion.propagate import Variant
from moezoo_models.conversion.stage import Answer


def carved_variant(
    name: str, shared: int, active: int, experts: int, width: int, length: int, seed: int = 0
) -> Variant:
    """Return the variant that `moezoo carve --to moezoo --budgets equal` makes of every block.

    Args:
        name: of the variant.
        shared: parts that run on every token.
        active: further parts that a token is routed to.
        experts: parts in all.
        width: neurons of a block.
        length: tokens in a window.
        seed: of everything drawn.

    Raises:
        InputError: the sizes do not fit the width.
    """
    options = own_options(shared, active, experts, seed)
    options.check(width)
    return Variant(name, partial(_carved, options, length), "dense")


def pruned_variant(name: str, keep: int, length: int) -> Variant:
    """Return the variant that keeps as many neurons for all tokens, refitted, which carve prints.

    Args:
        name: of the variant.
        keep: neurons that stay in every block.
        length: tokens in a window.
    """
    return Variant(name, partial(_pruned, keep, length), "dense")


def _carved(
    options: CarveOptions, length: int, layer: int, x_TD: Tensor, block: Block, target: Tensor
) -> Answer:
    carved = carve_layer(layer, x_TD, block, options, target, _first(x_TD, length))
    return answer_of(carved.plan, block)


def _pruned(
    keep: int, length: int, layer: int, x_TD: Tensor, block: Block, target: Tensor
) -> Answer:
    small = prune_block(
        x_TD,
        block.gate,
        block.up,
        block.down,
        keep,
        "eliminated",
        block.act,
        block.bias_in,
        block.bias_out,
        refit_ridge=None,
        target=target,
        apart=_first(x_TD, length),
    )
    return small.run


def _first(x_TD: Tensor, length: int) -> Tensor:
    """Mark the first token of each window, which decides nothing."""
    return torch.arange(len(x_TD), device=x_TD.device) % length == 0
