"""A benchmark case: one piece of work, our implementation, and others of the same.

A case is declared once, in :mod:`moezoo.bench.cases`: sizes, how to build ours, a builder per peer,
and the target against each of them. Everything else (gate, timing, memory, pictures) is the same
for all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moezoo_kernels import backends

PLAIN = "plain-torch"  # the peer that is our own fallback
_EXTRA = "pip install 'moezoo[bench]'"
# Names under which ops register plain torch, the better one first.
_PLAIN_BACKENDS = ("torch", "reference")

Gradients = dict[str, Tensor]
"""Gradients by the names of the operands that they are of."""


class Unavailable(Exception):
    """A peer cannot be had here; the message says why and what would bring it."""


@dataclass(frozen=True)
class Package:
    """A public package that a peer needs.

    Attributes:
        module: what is imported.
        install: the command that brings it.
    """

    module: str
    install: str = _EXTRA

    def check(self) -> None:
        """Import the package.

        Raises:
            Unavailable: it is not installed, or is broken.
        """
        if importlib.util.find_spec(self.module) is None:
            raise Unavailable(f"not installed; {self.install}")
        try:
            importlib.import_module(self.module)
        except Exception as error:
            # A broken extension raises whatever its authors chose; the row says it.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise Unavailable(f"cannot be imported: {reason}") from error


@dataclass(frozen=True)
class Work:
    """The least work, whatever the algorithm.

    Attributes:
        flops: of the matrix products; a multiply-add counts two.
        read: bytes read from memory at least once: operands, and of tables the rows that are named.
        written: bytes of fresh memory: the output, and the gradients.
    """

    flops: float
    read: float
    written: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / (self.read + self.written)


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's output.

    Attributes:
        forward: computes the output.
        operands: the tensors that gradients are taken of, under the names that ours uses.
        as_ours: where operands are laid out differently, turns their gradients by name into ours.
        constants: tensors that are given and get no gradient, as indices.
        within: entered around every call.
        note: printed with the row.
    """

    forward: Callable[[], Tensor]
    operands: Mapping[str, Tensor]
    as_ours: Callable[[Gradients], Gradients] | None = None
    constants: tuple[Tensor, ...] = ()
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """A case made concrete.

    Attributes:
        ours: the contender that the others are compared with.
        work: what the forward pass must do.
        step_work: what forward and backward must do.
        parts: what peers are built from: the layer or op whose weights they take over.
        direction: the output's gradient, where it cannot be random.
    """

    ours: Contender
    work: Work
    step_work: Work
    parts: Any
    direction: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """The ratios to be reached; None where there is no target.

    Attributes:
        forward: how many times as fast as the peer, at least.
        step: the same for forward and backward together.
        backward: the same for the difference of the two.
        saved: our bytes saved for the backward, as a multiple of the peer's, at most.
        memory: our temporary memory, as a multiple of the peer's, at most.
        of_limit: forward, as a fraction of what the machine allows, at least.
        step_of_limit: the same for forward and backward.
    """

    forward: float | None = None
    step: float | None = None
    backward: float | None = None
    saved: float | None = None
    memory: float | None = None
    of_limit: float | None = None
    step_of_limit: float | None = None


@dataclass(frozen=True)
class Peer:
    """A baseline implementation of the same computation.

    Attributes:
        build: makes the :class:`Contender` from the problem's parts, with the same weights; in a
            case of kind end-to-end, the :class:`~moezoo.bench.end_to_end.Job` from its task's.
        package: what must be installed, if anything.
        same: whether it computes the same function. If not, its output is not compared: it is there
            for its cost (a dense block of equal FLOPs or width).
        target: what ours is to reach against it.
    """

    build: Callable[[Any], Any]
    package: Package | None = None
    same: bool = True
    target: Target | None = None


@dataclass(frozen=True)
class Setting:
    """The setting that a case is built for.

    Attributes:
        sizes: numbers by name.
        device: where.
        dtype: of tokens and tables.
    """

    sizes: Mapping[str, int]
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, name: str) -> int:
        """Return one of the sizes."""
        return self.sizes[name]

    def normal(self, *shape: int) -> Tensor:
        """Draw from N(0, 1)."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's tables.

    Attributes:
        name: unique, as the command line takes it.
        kind: op, layer or end-to-end.
        title: as the table shows it.
        sizes: numbers by name, in the order in which they are shown.
        quick: the sizes that a quick run replaces.
        build: makes the :class:`Problem` of a setting; in a case of kind end-to-end, the
            :class:`~moezoo.bench.end_to_end.Task` of a setting and an empty folder.
        peers: by name.
        limit: what ours is to reach of the machine's limit.
        dtype: of tokens and tables, unless the command says another.
        device: cpu or cuda.
        step: whether the backward is measured too.
        threads: for this case, whatever the command says: one token alone is no work for two.
        series: cases of one series are drawn as one line, against ``size``.
        size: name of the number on the horizontal axis.
        ops: the ops of :mod:`moezoo_kernels` that ours runs, by which the case can be chosen.
        unit: end-to-end, what times are shown in: ms, ms/token, MB/s or CPU-s.
    """

    name: str
    kind: Literal["op", "layer", "end-to-end"]
    title: str
    sizes: Mapping[str, int]
    quick: Mapping[str, int]
    build: Callable[..., Any]
    peers: Mapping[str, Peer]
    limit: Target | None = None
    dtype: torch.dtype = torch.float32
    device: Literal["cpu", "cuda"] = "cpu"
    step: bool = True
    threads: int | None = None
    series: str = ""
    size: str = ""
    ops: tuple[str, ...] = ()
    unit: str = ""

    def setting(self, quick: bool, dtype: torch.dtype | None) -> Setting:
        """Return the sizes and dtype of a run."""
        sizes = {**self.sizes, **self.quick} if quick else dict(self.sizes)
        return Setting(sizes, torch.device(self.device), dtype or self.dtype)


def plain_torch(contender: Contender, *ops: str) -> Contender:
    """Return the same layer or op, with the first of ``ops`` that can do so run in plain torch.

    Forcing a backend holds for every op that has one of that name, so one op decides for all.

    Raises:
        Unavailable: none of the ops has such a backend.
    """
    registered = {(row.op, row.backend) for row in backends.table()}
    for op in ops:
        for name in _PLAIN_BACKENDS:
            if (op, name) in registered:
                return replace(contender, within=partial(backends.use, name), note=f"'{name}'")
    raise Unavailable(f"no plain-torch backend is registered for {' or '.join(ops)}")
