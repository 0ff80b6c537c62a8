"""The feed-forward blocks of a foreign transformer, and what takes their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moezoo.errors import InputError

_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block")
_PART = re.compile(r"mlp|ffn|feed_?forward|moe|expert|^fc\d$|^ff$")
_NO_PART = re.compile(r"norm|^ln|drop|scale|gate$|hc$|connection|conv")
_ATTENTION = re.compile(r"attn|attention")


@dataclass
class Site:
    """The feed-forward block of one layer.

    Attributes:
        number: the layer's, from 0.
        block: the layer.
        names: the children that make up its feed-forward block: one; or several that answer the
            same hidden states and are added up; or, ``inline``, two projections and what is
            between them, which the layer itself runs one after the other.
        inline: whether the layer itself runs them.
    """

    number: int
    block: nn.Module
    names: tuple[str, ...]
    inline: bool = False

    def __post_init__(self) -> None:
        self.original = self.modules()

    def __str__(self) -> str:
        return f"layer {self.number}'s {' and '.join(self.names)}"

    def modules(self) -> list[nn.Module]:
        """Return what stands there now."""
        return [self.block.get_submodule(name) for name in self.names]

    def put(self, modules: list[nn.Module]) -> None:
        """Replace what stands there; the order of the block's children stays."""
        for name, module in zip(self.names, modules, strict=True):
            self.block._modules[name] = module

    def put_whole(self, module: nn.Module) -> None:
        """Replace all parts by one module."""
        rest: Callable[[], nn.Module] = nn.Identity if self.inline else Silent
        self.put([module, *(rest() for _ in self.names[1:])])

    def restore(self) -> None:
        """Put back what stood there first."""
        self.put(self.original)


class Silent(nn.Module):
    """Stands for the second part of a feed-forward block, whose first part runs both."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros."""
        return hidden_states.new_zeros(hidden_states.shape)


def find_sites(model: nn.Module) -> list[Site]:
    """Find the feed-forward block of each layer of a decoder.

    Raises:
        InputError: there is no list of layers that each have one, several in different parts of
            the model, or one that holds a layer twice.
    """
    found: dict[str, list[Site]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            there = [_site(number, block) for number, block in enumerate(module)]
            sites = [site for site in there if site is not None]
            if len(sites) == len(there) and not _inside(path, found):
                found[path] = sites
    if len(found) > 1 and (text := _decoder_path(model)) is not None:
        inner = {path: found[path] for path in found if _inside(path, [text])}
        found = inner or found
    if not found:
        raise InputError(
            f"model: {type(model).__name__} has no list of blocks with one of "
            f"{', '.join(_NAMES)}, fc1 and fc2; replace the blocks by hand"
        )
    if len(found) > 1:
        raise InputError(
            f"model: {type(model).__name__} has several lists of blocks: {', '.join(found)}; "
            "give the part that you mean"
        )
    (sites,) = found.values()
    if len({id(site.block) for site in sites}) < len(sites):
        raise InputError(
            f"model: {type(model).__name__} runs one block at several depths, which layers of one "
            "depth each cannot stand for; replace it by hand"
        )
    return sites


def _inside(path: str, outer: Any) -> bool:
    return any(path == other or path.startswith(f"{other}.") or not other for other in outer)


def _decoder_path(model: nn.Module) -> str | None:
    """Return where a model of several parts has its text decoder, if it says so."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return next((path for path, m in model.named_modules() if m is decoder and path), None)


def _site(number: int, block: nn.Module) -> Site | None:
    children = dict(block.named_children())
    if {"fc1", "fc2"} <= children.keys() and any(map(_ATTENTION.search, children)):
        between = [name for name in ("activation_fn", "activation") if name in children]
        return Site(number, block, ("fc1", *between, "fc2"), inline=True)
    main = next((name for name in _NAMES if name in children), None)
    if main is None:
        return None
    return Site(number, block, (main, *(name for name in _parts(block) if name != main)))


def _parts(block: nn.Module) -> Iterator[str]:
    """List the children of a block that look like feed-forward blocks, by name and weights."""
    for name, child in block.named_children():
        named = _PART.search(name) and not _NO_PART.search(name)
        holds = any(p.ndim > 1 for p in child.parameters()) or isinstance(child, Silent)
        if named and holds:
            yield name


__all__ = ["Silent", "Site", "find_sites"]
