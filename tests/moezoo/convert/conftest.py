"""A block whose structure is known: groups of neurons, each awake for one kind of input."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


class Planted(NamedTuple):
    """A dense block, inputs of it, and which group each neuron belongs to."""

    x: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    group: Tensor  # -1: dead, -2: awake for everything

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return what a block is carved from."""
        return self.x, self.gate, self.up, self.down


@pytest.fixture
def planted() -> Callable[..., Planted]:
    """Inputs of 12 kinds (two at a time), 16 neurons for each, 16 dead ones and 32 busy ones."""

    def build(tokens: int = 2000, gated: bool = True, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        d, kinds = 48, 12
        kind_KD = 4 * F.normalize(normal(kinds, d), dim=1)
        away = F.normalize(normal(d), dim=0)
        seen = torch.randint(kinds, (tokens, 2), generator=generator)
        x = 3 * away + kind_KD[seen[:, 0]] + 0.7 * kind_KD[seen[:, 1]] + 0.5 * normal(tokens, d)
        group = torch.arange(kinds).repeat_interleave(16)
        group = torch.cat([group, torch.full((16,), -1), torch.full((32,), -2)])
        grouped = 0.5 * kind_KD[group[:192]] - 0.5 * away + 0.15 * normal(192, d)
        dead = -3 * away + 0.05 * normal(16, d)
        busy = 0.7 * away + 0.15 * normal(32, d)
        first = torch.cat([grouped, dead, busy])
        second = 0.25 * normal(240, d) + 0.1 * torch.cat([grouped, torch.zeros(48, d).double()])
        down = 0.1 * normal(d, 240) * (0.5 * normal(240)).exp()
        order = torch.randperm(240, generator=generator)
        x, first, second, down = (
            t.to(dtype).contiguous() for t in (x, first[order], second[order], down[:, order])
        )
        gate, up = (first, second) if gated else (None, first)
        return Planted(x, gate, up, down, group[order])

    return build
