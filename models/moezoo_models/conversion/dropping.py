"""What it costs to leave out a block of layers: measured for every start, beside a guess of it.

Gromov et al. 2024 (arXiv:2403.17887) guess by the angular distance, eq. 7,

    d(l, n) = arccos(x_l · x_{l+n} / |x_l| |x_{l+n}|) / π

of the residual stream that enters layer l and layer l + n, on the last token of each window. It
does not see what later layers make of the change, so the loss is measured, too: hidden states of
all starts pass through the layers together, and of the weights one layer is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.command.messages import size
from moezoo.errors import InputError
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Head, Stage, embed
from moezoo_models.devices import free_memory


@dataclass(frozen=True)
class Start:
    """The model without layers ``first … first + n - 1``.

    Attributes:
        first: the first layer that is left out.
        distance: the angular distance over them, 0 … 1.
        nats: cross-entropy per token without them.
    """

    first: int
    distance: float
    nats: float


def angular_distance(before_WD: Tensor, after_WD: Tensor) -> float:
    """Return the mean angle between rows, in fp32 and over π."""
    before, after = before_WD.float(), after_WD.float()
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    # Rounding may bring it past one, where arccos is no number.
    return float((cosine.clamp(-1.0, 1.0).arccos() / math.pi).mean())


@torch.no_grad()
def measure_starts(
    source: Source,
    tokens_WL: Tensor,
    skipped: int,
    count: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> tuple[float, list[Start]]:
    """Measure the loss without ``count`` layers, for every first one.

    Args:
        source: the dense model.
        tokens_WL: windows of text, without padding.
        skipped: tokens at the start of a window that need not be predicted.
        count: n, layers that are left out.
        device: where to compute.
        progress: called after each layer.

    Returns:
        The dense model's cross-entropy per token, and all starts.

    Raises:
        InputError: the hidden states need more memory than there is.
    """
    starts = source.num_layers - count + 1
    needed = 4 * tokens_WL.numel() * source.config.hidden_size * (starts + 3)
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: hidden states of {starts} starts need {size(needed)} of memory, "
            f"and {size(free)} are free; lower it"
        )
    last: list[Tensor] = []  # of the dense model, before each layer and after all
    states = embed(source, tokens_WL)
    without: dict[int, Tensor] = {}
    for layer in range(source.num_layers):
        last.append(states[:, -1].clone())
        if layer < starts:
            without[layer] = states
        stage = Stage(source, layer, device)
        states = torch.cat(list(stage.outputs(states, stage.block.run)))
        for first in [each for each in without if each + count <= layer]:
            without[first] = torch.cat(list(stage.outputs(without[first], stage.block.run)))
        progress()
    last.append(states[:, -1])
    head = Head(source, device)
    found = [
        Start(
            first,
            angular_distance(last[first], last[first + count]),
            float(head.nats(without[first], tokens_WL, skipped).mean()),
        )
        for first in range(starts)
    ]
    return float(head.nats(states, tokens_WL, skipped).mean()), found
