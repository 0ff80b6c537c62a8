"""Tensors under other names and in other layouts than a Llama's: fused, transposed, renamed.

A rule says which of our tensors one tensor of a file holds. Headers are translated first, so that
all checks are of our names; a tensor is cut out where it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.files.model_files import CONFIG, Part, TensorInfo


@dataclass(frozen=True)
class Rule:
    """What a tensor of a file is here.

    Attributes:
        pattern: regular expression that its whole name matches.
        names: our tensors' names, with references to groups of the pattern; none: it is left out.
        rows: how many of its rows belong to each name, in order; none: all of them to one.
        first: rows before those, which are left out.
        transposed: a matrix is stored as ``(in, out)``.
    """

    pattern: str
    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    first: int = 0
    transposed: bool = False


class PartOfFile:
    """A part of a tensor that is read when it is indexed, as the slices of safetensors are.

    Args:
        whole: the file's tensor, or a slice of it.
        info: our tensor.
        part: where it is in there.
    """

    def __init__(self, whole: Any, info: TensorInfo, part: Part) -> None:
        self._whole, self._info, self._part = whole, info, part

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """Return its dtype, as safetensors call it."""
        return self._info.kind

    def __getitem__(self, index: Any) -> Tensor:
        """Read it; it shares its memory with no other part."""
        part = self._part.of(self._whole[...])
        return part.clone(memory_format=torch.contiguous_format)[index]


def arranged(found: Mapping[str, TensorInfo], rules: Sequence[Rule]) -> dict[str, TensorInfo]:
    """Translate headers into ours; names that no rule matches stay.

    Args:
        found: tensors of files, by name.
        rules: the first that matches counts.

    Raises:
        InputError: a tensor has not the rows that it has by the configuration, or two are one.
    """
    ours: dict[str, TensorInfo] = {}
    for name, info in found.items():
        for ours_name, each in _translated(name, info, rules):
            if ours_name in ours:
                other = ours[ours_name].part
                raise InputError(
                    f"checkpoint: '{name}' and '{other.name if other else ours_name}' are the same "
                    "tensor; remove one"
                )
            ours[ours_name] = each
    return ours


def _translated(name: str, info: TensorInfo, rules: Sequence[Rule]) -> list[tuple[str, TensorInfo]]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match is None:
            continue
        shape = info.shape
        if rule.transposed and len(shape) == 2:
            shape = (shape[1], shape[0])
        if not rule.rows:
            part = Part(name, rule.transposed)
            made = replace(info, shape=shape, part=part)
            return [(match.expand(ours), made) for ours in rule.names]
        if not shape or shape[0] != rule.first + sum(rule.rows):
            raise InputError(
                f"checkpoint: '{name}' has shape {info.shape}, by {CONFIG} "
                f"{rule.first + sum(rule.rows)} rows; they are of different models"
            )
        starts = [rule.first + sum(rule.rows[:each]) for each in range(len(rule.rows))]
        return [
            (
                match.expand(ours),
                replace(
                    info,
                    shape=(count, *shape[1:]),
                    part=Part(name, rule.transposed, start, count),
                ),
            )
            for ours, start, count in zip(rule.names, starts, rule.rows, strict=True)
        ]
    return [(name, info)]
