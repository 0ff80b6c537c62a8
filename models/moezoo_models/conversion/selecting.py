"""Finding a checkpoint's thresholds: what errors of each layer cost, budgets, calibration.

Shapes: W windows, L tokens each, D d_model; T = W L.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moezoo.convert import Block
from moezoo.convert.select import (
    METHODS,
    Curves,
    LayerThresholds,
    SelectMethod,
    allocate,
    calibrate,
    error_curves,
    keys_of,
    uniform,
)
from moezoo.convert.select.budget import Count
from moezoo.convert.select.curves import output_error
from moezoo.convert.select.guess import GUESSES
from moezoo.convert.select.keys import token_weights
from moezoo.errors import InputError
from moezoo.selection import Shares
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Answer, Head, Stage, embed
from moezoo_models.conversion.targets import TARGETS

CPU = torch.device("cpu")
_CURVE_TOKENS = 512
_TRIAL = Shares(0.8, 0.75, 0.9, 0.5)
"""What a layer keeps while its cost to the model is measured: about half of the work."""


@dataclass(frozen=True)
class Sensitivity:
    """What errors of each layer cost.

    Attributes:
        curves: of each layer, its errors by what is kept.
        nats: of each layer, the divergence of the next tokens' distribution from the dense
            model's while this layer alone is on trial.
        errors: of each layer, the error of its output on trial.
    """

    curves: list[Curves]
    nats: list[float]
    errors: list[float]

    @property
    def weights(self) -> list[float]:
        """Return the cost of one unit of each layer's error, in nats."""
        return [nats / max(e, 1e-30) for nats, e in zip(self.nats, self.errors, strict=True)]


def first_of_windows(tokens: int, length: int) -> Tensor:
    """Mark the first token of each window, ``(T,)``."""
    return torch.arange(tokens) % length == 0


@torch.no_grad()
def measure(
    source: Source,
    tokens: Tensor,
    layers: Sequence[int],
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Measure what errors of each layer cost the model, layer by layer in the memory of one.

    Each layer is put on trial alone, and the states that come of it pass through all later layers
    beside the dense ones: for n layers that is half of n passes of the model, over few tokens.

    Args:
        source: the dense model.
        tokens: ``(W, L)``; a thousand tell layers apart.
        layers: those that may be changed.
        device: where to compute.
        progress: called after each layer.
    """
    dense, on_trial = embed(source, tokens), dict[int, Tensor]()
    curves, errors = [], []
    first = first_of_windows(tokens.numel(), tokens.shape[1]).to(device)
    for layer in range(source.num_layers):
        stage = Stage(source, layer, device)
        on_trial = {
            each: torch.cat(list(stage.outputs(states, stage.block.run)))
            for each, states in on_trial.items()
        }
        attended = torch.cat(list(stage.attended(dense)))
        inputs = stage.inputs(attended)
        output = stage.block.run(inputs)
        if layer in layers:
            x_TD = inputs[~first]
            keys = keys_of("mix", stage.block, x_TD)
            curves.append(error_curves(stage.block, _some(x_TD), keys))
            found = calibrate(stage.block, x_TD, keys, _TRIAL)
            changed = found.run(stage.block, inputs, first)
            weight_T = token_weights(output[~first])
            errors.append(output_error((changed - output)[~first], weight_T))
            on_trial[layer] = stage.added(attended, changed)
        dense = stage.added(attended, output)
        progress()
    nats = torch.zeros(len(layers), dtype=torch.float64)
    head = Head(source, device)
    for row in range(len(tokens)):
        right = head.logits(dense[row]).float()
        probable = right.softmax(dim=-1)
        # Σ p (log p - log q), of which Σ p log p is the same for all.
        own = _cross_entropy(probable, right)
        for place, layer in enumerate(layers):
            other = _cross_entropy(probable, head.logits(on_trial[layer][row]).float())
            nats[place] += (other - own).double().mean().cpu() / len(tokens)
    return Sensitivity(curves, nats.clamp(min=0.0).tolist(), errors)


def _some(x_TD: Tensor) -> Tensor:
    """Take tokens at even distances."""
    return x_TD[:: max(len(x_TD) // _CURVE_TOKENS, 1)]


def _cross_entropy(probable: Tensor, logits: Tensor) -> Tensor:
    """Return ``-Σ p log softmax(logits)`` of each token, ``(L,)``."""
    return logits.logsumexp(dim=-1) - torch.linalg.vecdot(probable, logits)


@dataclass(frozen=True, eq=False)
class Selecting:
    """A method at one budget, as a variant of the dense model.

    Attributes:
        method: the method.
        budgets: what each layer keeps, by its number.
        length: tokens L of a window.
        dtype: in which the model will be computed.
        directory: where thresholds are kept; None keeps none.
    """

    method: SelectMethod
    budgets: dict[int, Shares]
    length: int
    dtype: torch.dtype
    directory: Path | None = None

    def __call__(self, layer: int, x_TD: Tensor, block: Block) -> Answer:
        """Find a layer's thresholds, or read those of an earlier run; return its block."""
        first = first_of_windows(len(x_TD), self.length).to(x_TD.device)
        file = None if self.directory is None else thresholds_file(self.directory, layer)
        if file is not None and file.is_file():
            found = read_thresholds(file, x_TD.device)
        else:
            real = x_TD[~first]
            keys = keys_of(self.method, block, real)
            found = calibrate(block, real, keys, self.budgets[layer], self.dtype)
            if file is not None:
                save_thresholds(file, found)
        return partial(self._run, found, block)

    def _run(self, found: LayerThresholds, block: Block, x_TD: Tensor) -> Tensor:
        first = first_of_windows(len(x_TD), self.length)
        return found.run(block, x_TD, first.to(x_TD.device))


def budgets_of(
    method: SelectMethod,
    share: float,
    layers: Sequence[int],
    sensitivity: Sensitivity | None,
    count: Count = "work",
) -> dict[int, Shares]:
    """Return what each layer keeps.

    Args:
        method: the method.
        share: of the layers' work.
        layers: their numbers.
        sensitivity: of these layers, in their order; only mix reads it.
        count: what the share is of.

    Raises:
        InputError: the method cannot do with so little.
    """
    if method != "mix":
        return dict.fromkeys(layers, uniform(method, share))
    assert sensitivity is not None
    budgets = allocate(sensitivity.curves, sensitivity.weights, share, count)
    return dict(zip(layers, budgets, strict=True))


def selected_nats(
    source: Source,
    calibration: Calibration,
    method: SelectMethod,
    shares: Sequence[float],
    directory: Path,
    layers: Sequence[int] | None = None,
    device: torch.device = CPU,
    sensitivity: Sensitivity | None = None,
) -> list[Tensor]:
    """Return the cross-entropy on held-out tokens that a method leaves at shares of the work.

    ``moezoo carve`` and ``moezoo inspect frontier`` set it beside their own figures.

    Args:
        source: the dense model.
        calibration: text that thresholds are found on, and text that they are judged by.
        method: the method.
        shares: of the FFN's work.
        directory: for hidden states.
        layers: those that are changed; default: all.
        device: where to compute.
        sensitivity: for mix, if it is known already.

    Returns:
        For each share what :meth:`~moezoo_models.conversion.propagate.Propagation.run` gives.
    """
    layers = tuple(range(source.num_layers) if layers is None else layers)
    if method == "mix" and sensitivity is None:
        sensitivity = measure(source, trial_tokens(calibration), layers, device)
    length = calibration.fitted.shape[1]
    variants = [
        Variant(
            f"{share:g}",
            Selecting(
                method,
                budgets_of(method, share, layers, sensitivity),
                length,
                source.dtype,
            ),
        )
        for share in dict.fromkeys(shares)
    ]
    found = Propagation(source, calibration, variants, layers, directory, device).run()
    return [found[f"{share:g}"] for share in shares]


def trial_tokens(calibration: Calibration, tokens: int = 1024) -> Tensor:
    """Return the windows that layers are put on trial with."""
    count = max(tokens // calibration.fitted.shape[1], 1)
    return calibration.fitted[:count]


def sparsifiable() -> tuple[str, ...]:
    """Return the families of dense models whose blocks can be made selective."""
    return TARGETS["moezoo"].families


def needs_gate(method: str) -> bool:
    """Return whether a method is of gated blocks only: thresholds, and R-Sparse."""
    return method in METHODS or method == "r_sparse"


def check_gated(source: Source, methods: Sequence[str], field: str = "method") -> None:
    """Refuse methods that judge by a gate for a model whose blocks have none.

    Args:
        source: the dense model.
        methods: those that are asked for.
        field: the option's name.

    Raises:
        InputError: names the method, and those that such a model can have.
    """
    gateless = [method for method in methods if needs_gate(method)]
    if gateless and not source.ffn["gated"]:
        known = ", ".join(method for method in GUESSES if not needs_gate(method))
        raise InputError(
            f"{field}: {gateless[0]} judges by a gate, and blocks of this {source.family} have "
            f"none; choose from: {known}"
        )


def thresholds_file(directory: Path, layer: int) -> Path:
    """Return where a layer's thresholds are kept."""
    return directory / f"thresholds-{layer:05d}.safetensors"


def save_thresholds(file: Path, found: LayerThresholds) -> None:
    """Keep a layer's thresholds; atomically."""
    tensors = {name: getattr(found, name).cpu().contiguous() for name in _TENSORS}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as handle:
        handle.write(save(tensors, {"shares": json.dumps(found.shares)}))


def read_thresholds(file: Path, device: torch.device = CPU) -> LayerThresholds:
    """Read what :func:`save_thresholds` wrote."""
    with safe_open(file, framework="pt", device=str(device)) as opened:
        tensors: dict[str, Any] = {name: opened.get_tensor(name) for name in _TENSORS}
        return LayerThresholds(**tensors, shares=Shares(*json.loads(opened.metadata()["shares"])))


_TENSORS = ("input", "gate", "up_input", "hidden")
