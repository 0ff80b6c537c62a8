"""The calibration of one carve: budgets, plans of all layers, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from moezoo.convert import Block, Carved, CarveOptions, LayerPlan, carve_block, prune_block
from moezoo.convert.carve.prune import PruneMethod
from moezoo.convert.select import can_leave
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.conversion.budgets import TOKENS, layer_costs, share_out
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.plans import Plans, writable
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.selecting import selected_nats
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Answer, next_token_nats
from moezoo_models.conversion.targets import Mixture
from moezoo_models.progress import progress_bar

_BUDGETS = "budgets.json"
_BLOCK = ("gate", "up", "down", "bias_in", "bias_out")
_TOKENS = 4096
"""Tokens that are computed at once."""


class Carving:
    """The calibration of one carve, and its figures.

    Args:
        source: the dense model.
        calibration: the text. The first token of each window is kept exact, and apart from every
            statistic: all others attend to it, and some layers put out a thousand times more at it.
        options: what to carve.
        mixture: the shapes.
        flat: whether unit weights are written as sigmoids of small logits.
        measured: share the experts per token out among layers by what saving costs in each.
        follow: let refits make up for what earlier layers are off by.
        device: where to compute.
        control: directory for a refitted pruned model of as much work, routers included, which
            then stands in the place of the one of as many neurons; None leaves it out.
        sparsified: measure beside it what :func:`~moezoo_models.conversion.sparsify.sparsify`
            would leave at as much work, where it can.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        options: CarveOptions,
        mixture: Mixture,
        flat: bool,
        measured: bool,
        follow: bool,
        device: torch.device,
        control: Path | None = None,
        sparsified: bool = True,
    ) -> None:
        self._source, self._calibration = source, calibration
        self._options, self._mixture = options, mixture
        self._flat, self._device, self._control = flat, device, control
        self._nats: dict[str, Tensor] = {}
        self._plans = Plans(Path())
        self._drops = options.active < options.routed
        self._measured = measured and self._drops
        self._sparsified = sparsified and self._drops and source.ffn["gated"]
        self._follow = "dense" if follow and options.refit and self._drops else None
        self._costs: dict[int, float] = {}
        self._active = dict.fromkeys(mixture.layers, options.active)
        first = torch.zeros(calibration.fitted.shape, dtype=torch.bool)
        first[:, 0] = True
        self._apart = first.flatten()

    @property
    def scratch_bytes(self) -> int:
        """Room for hidden states and refitted projections until the checkpoint is complete."""
        refits = len(self._mixture.layers) if self._options.refit else 0
        per_refit = self._source.width * self._mixture.d_model * self._mixture.dtype.itemsize
        return self._propagation(Path()).bytes + refits * per_refit

    def prepare(self, directory: Path) -> None:
        """Plan all layers, going on from what an earlier run left in ``directory``."""
        self._plans = Plans(directory)
        with progress_bar() as bar:
            passes = 1 + self._measured
            task = bar.add_task("carving", total=passes * self._source.num_layers)
            if self._measured:
                self._share_out(directory, partial(bar.advance, task))
            run = self._propagation(directory)
            self._nats = run.run(partial(bar.advance, task))
        work = self.settled().work(self._source.width)
        if self._sparsified and can_leave(work):
            self._nats["sparsified"] = selected_nats(
                self._source,
                self._calibration,
                "mix",
                [work],
                directory / "sparsified",
                self._mixture.layers,
                self._device,
            )[0]

    def settled(self) -> Mixture:
        """Return the shapes with each layer's own number of experts per token."""
        if len(set(self._active.values())) == 1 and not self._measured:
            return self._mixture
        top_ks = tuple(self._active[layer] for layer in self._mixture.layers)
        return dataclasses.replace(self._mixture, top_ks=top_ks)

    def plan(self, layer: int) -> LayerPlan:
        """Return a layer's plan."""
        return self._plans.read(layer)

    def report(self, written: Path, loads: bool) -> dict[str, Any]:
        """Return the measurements.

        Args:
            written: the checkpoint, which this process has written.
            loads: whether it fits into memory.
        """
        perplexity = {name: math.exp(nats.mean()) for name, nats in self._nats.items()}
        if loads:
            perplexity["loaded"] = loaded_perplexity(written, self._calibration)
        rival = self._refitted if self._options.refit else "static"
        mixture = self.settled()
        return {
            "calibration": self._calibration.describe(),
            "perplexity": perplexity,
            # With all parts active there is nothing to prune: both are the dense model.
            "beats": {rival: perplexity["carved"] < perplexity[rival]} if self._drops else {},
            "work": mixture.work(self._source.width),
            "costs": {str(layer): cost for layer, cost in self._costs.items()},
            "plan": dataclasses.asdict(mixture) | {"dtype": str(mixture.dtype)},
            "layers": {str(layer): self._plans.figures(layer) for layer in mixture.layers},
        }

    def _share_out(self, directory: Path, progress: Callable[[], None]) -> None:
        """Measure the layers' costs, unless an earlier run has, and share out what is saved."""
        file = directory / _BUDGETS
        if file.is_file():
            costs = {int(each): cost for each, cost in json.loads(file.read_text()).items()}
        else:
            windows = -(-TOKENS // self._calibration.fitted.shape[1])
            tokens = self._calibration.fitted[:windows]
            keep = self._kept(self._mixture.layers[0])
            costs = layer_costs(
                self._source, tokens, self._mixture.layers, keep, self._device, progress
            )
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, "w") as opened:
                json.dump(costs, opened)
        self._costs = costs
        self._active = share_out(costs, self._options.active, self._options.routed)

    def _kept(self, layer: int) -> int:
        """Return how many neurons a token uses."""
        return self._mixture.d_shared + self._active[layer] * self._mixture.d_expert

    @property
    def _refitted(self) -> str:
        """The name of the pruned model that is refitted."""
        return "static_refit" if self._control is None else "control"

    def _propagation(self, directory: Path) -> Propagation:
        elimination = self._options.shared_by == "elimination"
        rival: PruneMethod = "eliminated" if elimination else "static_ls"
        variants = (
            Variant("dense", None),
            Variant("static", partial(self._pruned, "static")),
            Variant(self._refitted, partial(self._pruned, rival), self._follow),
            Variant("carved", self._carved, self._follow),
        )
        layers = self._mixture.layers
        return Propagation(
            self._source, self._calibration, variants, layers, directory, self._device
        )

    def _pruned(
        self,
        method: PruneMethod,
        layer: int,
        x: Tensor,
        block: Block,
        target: Tensor | None = None,
    ) -> Answer:
        """Prune with the same means: strength of the ridge, target, first tokens apart."""
        keep, control = self._kept(layer), None if method == "static" else self._control
        if control is not None:
            keep = min(keep + round(self._mixture.router_neurons), block.width)
        small = prune_block(
            x,
            block.gate,
            block.up,
            block.down,
            keep,
            method,
            block.act,
            block.bias_in,
            block.bias_out,
            refit_ridge=self._options.refit_ridge,
            target=target,
            apart=self._apart,
        )
        if control is not None:
            save_block(control, layer, small)
        return small.run

    def _carved(self, layer: int, x: Tensor, block: Block, target: Tensor | None = None) -> Answer:
        if layer not in self._plans:
            own = dataclasses.replace(self._options, active=self._active[layer])
            carved = carve_layer(layer, x, block, own, target, self._apart)
            plan = writable(carved.plan, x, self._mixture.dtype, self._flat)
            self._plans.save(layer, plan, carved.figures)
        return answer_of(self._plans.read(layer, self._device), block)


def save_block(directory: Path, layer: int, block: Block) -> None:
    """Keep a pruned block; atomically."""
    named = {name: getattr(block, name) for name in _BLOCK}
    tensors = {name: t.cpu().contiguous() for name, t in named.items() if t is not None}
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory / f"block-{layer:05d}.safetensors") as file:
        file.write(save(tensors))


def read_block(directory: Path, layer: int) -> dict[str, Tensor]:
    """Read what :func:`save_block` kept, by the names of :class:`moezoo.convert.Block`."""
    return load_file(directory / f"block-{layer:05d}.safetensors")


def carve_layer(
    layer: int,
    x: Tensor,
    block: Block,
    options: CarveOptions,
    target: Tensor | None = None,
    apart: Tensor | None = None,
) -> Carved:
    """Carve one block; every layer has draws of its own.

    Args:
        layer: its number.
        x: ``(T, D)``, its inputs on the calibration tokens.
        block: the dense block.
        options: what to carve.
        target: as of :func:`moezoo.convert.carve_block`.
        apart: as there.
    """
    own = dataclasses.replace(options, seed=options.seed * 1_000_003 + layer)
    biases = (block.bias_in, block.bias_out)
    matrices = (block.gate, block.up, block.down)
    return carve_block(x, *matrices, own, block.act, *biases, target=target, apart=apart)


def answer_of(plan: LayerPlan, block: Block) -> Answer:
    """Return the function that computes a plan's output in the place of a block's.

    What :meth:`~moezoo.convert.LayerPlan.run` computes expert by expert, with unit weights: all
    neurons in one product each, times zero where their expert is not chosen. Fine experts are so
    small that going from one to the next would take most of the time.
    """
    experts = plan.experts if plan.shared is None else (plan.shared, *plan.experts)
    order = torch.cat([expert.neurons for expert in experts])
    cut = block.take(order)
    down = (block.down if plan.down is None else plan.down.float())[:, order]
    size, offset = plan.d_expert, block.bias_out if plan.bias is None else plan.bias

    def answer(x: Tensor) -> Tensor:
        outputs = []
        for part in x.split(_TOKENS):
            seen = plan.router_input(part, block.gate, block.up, block.act, block.bias_in)
            scale_TN = plan.weights(seen, block.act).to(part.dtype) * plan.experts[0].out_scale
            hidden = cut.hidden(part)
            hidden[:, plan.d_shared :] *= scale_TN.repeat_interleave(size, dim=1)
            output = hidden @ down.t()
            outputs.append(output if offset is None else output + offset)
        return torch.cat(outputs)

    return answer


def pruned(keep: int, method: PruneMethod, layer: int, x: Tensor, block: Block) -> Answer:
    """Keep some of a block's neurons for all tokens; arguments as of :func:`carve_layer`."""
    biases = (block.bias_in, block.bias_out)
    made = prune_block(x, block.gate, block.up, block.down, keep, method, block.act, *biases)
    return made.run


@torch.no_grad()
def model_nats(model: Any, calibration: Calibration) -> Tensor:
    """Measure a model of transformers or ours, in its dtype, on the held-out tokens.

    Returns:
        As :meth:`~moezoo_models.conversion.propagate.Propagation.run` gives for one variant.
    """
    tokens, skipped = calibration.held_out, calibration.skipped
    rows = (model(input_ids=row[None], use_cache=False).logits[0] for row in tokens)
    return torch.stack([next_token_nats(*each, skipped) for each in zip(rows, tokens, strict=True)])


def loaded_perplexity(directory: Path, calibration: Calibration, sound: bool = True) -> float:
    """Load a checkpoint, and return its perplexity on the held-out tokens.

    Args:
        directory: of a model of transformers or ours.
        calibration: the text.
        sound: as of :func:`~moezoo_models.conversion.drift.load_any`.
    """
    return math.exp(model_nats(load_any(directory, sound=sound), calibration).mean())
