"""What a decoder's block gives to the router of its feed-forward layer."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from moezoo.errors import InputError, check_choice

RouterInput = Literal["ffn_input", "pre_attention", "post_attention"]
"""What the router reads, in a block ``h = x + Attention(norm(x))``, ``y = h + FFN(norm'(h))``.

- ``ffn_input``: ``norm'(h)``, as the experts do.
- ``pre_attention``: ``x``, the residual stream as it enters the block, not normalised
  (SmallThinker, arXiv:2507.20984): the choice is known before attention is computed.
- ``post_attention``: ``h``, the residual stream after attention, not normalised.
"""

FFN_INPUT: RouterInput = "ffn_input"
"""The default: the layer is given no ``router_input`` of its own."""


def check_router_input(value: Any, layer: type) -> RouterInput:
    """Return what a block's router is to read, if it is known and the layer reads it.

    Args:
        value: as a configuration has it.
        layer: class of the block's layer, a :class:`moezoo.FeedForward`.

    Raises:
        InputError: it is unknown, or the layer would ignore it.
    """
    known = check_choice("router_input", value, get_args(RouterInput))
    if known != FFN_INPUT and not getattr(layer, "reads_router_input", False):
        raise InputError(
            f"router_input: {layer.__name__} chooses nothing by a vector, and so has no router to "
            f"give '{known}' to; leave it out"
        )
    return cast(RouterInput, known)
