"""`moezoo sparsify`: a dense checkpoint whose tokens skip what counts for little, untrained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from moezoo.command.messages import size
from moezoo.convert.select import (
    METHODS,
    SelectMethod,
    check_share,
    read_share,
    uniform,
    work_share,
)
from moezoo.convert.select.budget import Count
from moezoo.convert.select.guess import GUESSES, GuessMethod, GuessOptions
from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.selection import Shares
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.carving import loaded_perplexity
from moezoo_models.conversion.checkpoint import NewCheckpoint
from moezoo_models.conversion.guessing import Guessing
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.selecting import (
    Selecting,
    Sensitivity,
    budgets_of,
    check_gated,
    measure,
    read_thresholds,
    sparsifiable,
    thresholds_file,
    trial_tokens,
)
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.sparsified import Sparsified, change, mean_share, summary
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import check_target
from moezoo_models.devices import free_memory, pick_device
from moezoo_models.progress import progress_bar


def sparsify(
    source: str | Path,
    target: str | Path,
    method: str = "mix",  # a Literal would not fit the help's lines
    work: float | None = None,
    read: float | None = None,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 8192,
    held_out_tokens: int = 4096,
    sensitivity_tokens: int = 1024,
    window: int | None = None,
    guess: GuessOptions = GuessOptions(),  # noqa: B008 - frozen
    layers: str | int | list[int] = "all",
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Sparsified:
    """Make a dense Hugging Face checkpoint's blocks skip what counts for little, untrained.

    All weights stay. Every block gets thresholds below which a token's inputs, gates and hidden
    values are taken for zero, and rows and columns that would multiply them are not read. They are
    calibrated on text, layer by layer through the layers already changed, in the memory of about
    one layer. Perplexity on held-out text is printed beside that of the dense model.

    Args:
        source: directory of a dense model, or a GGUF file.
        target: directory to make, in this library's format.
        method: mix, all thresholds with budgets by each layer's measured cost (ours); cats
            (arXiv:2404.08763), chess (arXiv:2409.01366), teal (arXiv:2408.14690), wina
            (arXiv:2505.19427), the same for all layers. Instead of thresholds predictor
            (arXiv:2310.17157) and polar (arXiv:2505.14884) guess which neurons are needed, and
            low_rank_gate does untrained; r_sparse (arXiv:2504.19449) has weak inputs at low rank.
        work: share of the feed-forward products that is left; default 0.57.
        read: in place of work, share of the weights that are read, in whole rows and columns.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens whose values decide thresholds.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        sensitivity_tokens: tokens on which the cost of each layer is measured, by mix.
        window: tokens that the model sees at once; default: what it was trained on, or
            if its config.json does not say, what it is made for; at most 2048.
        guess: options of the methods that guess.
        layers: which blocks to change: all, every 2, a number or a list.
        seed: of the choice of passages.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        max_shard_size: start another file when one exceeds this.
        check: load the result and measure its perplexity, or not.
        force: replace a checkpoint that target holds.

    Returns:
        Perplexities, and the shares of each layer.

    Raises:
        InputError: the source cannot be converted, the method cannot do with so little, there is
            too little text, or the target cannot hold the result.
    """
    if method == "griffin":
        raise InputError(
            "method: griffin chooses neurons anew for each prompt, which no checkpoint holds; use "
            "moezoo generate --griffin 0.5 on the dense one"
        )
    check_choice("method", method, (*METHODS, *GUESSES))
    if method not in GUESSES and guess != GuessOptions():
        raise InputError(f"guess: {method} guesses nothing; leave it out")
    if method in GUESSES and read is not None:
        raise InputError(f"read: {method} has a budget of work only; give work instead")
    check_choice("check", check, ("loaded", "none"))
    check_int("sensitivity_tokens", sensitivity_tokens)
    count, share = _budget(work, read)
    if method == "mix":
        check_share(share, count)
    elif method not in GUESSES:
        uniform(cast("SelectMethod", method), share)  # refuses too little
    check_target(Path(target), force)
    with open_source(source, sparsifiable()) as dense:
        check_gated(dense, [method])
        chosen = dense.select(layers)
        _check_memory(dense, max(calibration_tokens, sensitivity_tokens))
        text = calibrate(
            dense,
            calibration,
            calibration_tokens,
            held_out_tokens,
            window,
            check_int("seed", seed, minimum=0),
        )
        guessing = None
        if method in GUESSES:
            sizes = (text.fitted.shape[1], dense.config.hidden_size, dense.width, dense.dtype)
            guessing = Guessing(cast("GuessMethod", method), share, guess, *sizes, seed)
        run = _Run(
            dense,
            text,
            method,
            count,
            share,
            chosen,
            sensitivity_tokens,
            pick_device(device),
            guessing,
        )
        return run.write(Path(target), max_shard_size, check == "loaded", force)


def _budget(work: float | None, read: float | None) -> tuple[Count, float]:
    """Return what is counted, and the share of it that is left."""
    if work is not None and read is not None:
        raise InputError("read: work is given too, and one of them decides; leave out the other")
    count: Count = "work" if read is None else "read"
    share = read if read is not None else 0.57 if work is None else work
    if not 0.05 <= check_number(count, share) < 1:
        raise InputError(f"{count}: {share:g} is out of range; give a number from 0.05 to below 1")
    return count, share


def _check_memory(source: Source, tokens: int) -> None:
    """Refuse more calibration tokens than memory has room for: inputs, and a block's values."""
    needed = 4 * tokens * (4 * source.config.hidden_size + 7 * source.width)
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: {tokens:,} need about {size(needed)} of memory, and "
            f"{size(free)} are free; lower them"
        )


class _Run:
    """One call of :func:`sparsify`; arguments as there."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        method: str,
        count: Count,
        share: float,
        layers: tuple[int, ...],
        sensitivity_tokens: int,
        device: torch.device,
        guessing: Guessing | None,
    ) -> None:
        self._source, self._calibration, self._device = source, calibration, device
        self._method, self._count, self._share, self._layers = method, count, share, layers
        self._trial = trial_tokens(calibration, sensitivity_tokens)
        self._scratch, self._guessing = Path(), guessing
        self._sensitivity: Sensitivity | None = None

    def write(self, target: Path, max_shard_size: str, loads: bool, force: bool) -> Sparsified:
        """Calibrate, write the checkpoint atomically, and print what it is."""
        new = NewCheckpoint(
            "sparsify", [self._source], target, self._outputs(), max_shard_size, force
        )
        decides = [self._options(), self._calibration.describe()]
        with new.opened(decides, self._propagation(None).bytes):
            self._scratch = new.scratch
            nats = self._calibrate()
            new.write(self._config(), change(self._options(), self._source.num_layers))
            perplexity = {name: math.exp(each.mean()) for name, each in nats.items()}
            if loads:
                perplexity["loaded"] = loaded_perplexity(new.directory, self._calibration)
            made = self._describe(perplexity)
            new.report(made)
        print(summary(made, target))
        return made

    def _calibrate(self) -> dict[str, Tensor]:
        """Find all thresholds, going on from those that an earlier run left."""
        with progress_bar() as bar:
            mixed = self._method == "mix"
            layers = self._source.num_layers
            task = bar.add_task("calibrating", total=layers * (2 if mixed else 1))
            if mixed:
                self._sensitivity = measure(
                    self._source,
                    self._trial,
                    self._layers,
                    self._device,
                    lambda: bar.advance(task),
                )
            budgets: dict[int, Shares] | None = None
            if self._guessing is None:
                method = cast("SelectMethod", self._method)
                budgets = budgets_of(
                    method, self._share, self._layers, self._sensitivity, self._count
                )
            return self._propagation(budgets).run(lambda: bar.advance(task))

    def _propagation(self, budgets: dict[int, Shares] | None) -> Propagation:
        selecting: Selecting | Guessing = Selecting(
            cast("SelectMethod", self._method),
            budgets or {},
            self._calibration.fitted.shape[1],
            self._source.dtype,
            self._scratch,
        )
        if self._guessing is not None:
            selecting = self._guessing.inside(self._scratch)
        return Propagation(
            self._source,
            self._calibration,
            (Variant("dense", None), Variant("sparse", selecting)),
            self._layers,
            self._scratch,
            self._device,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "method": self._method,
            self._count: self._share,
            "layers": list(self._layers),
            "sensitivity_tokens": self._trial.numel(),
            **({} if self._guessing is None else {"guess": asdict(self._guessing.options)}),
        }

    def _config(self) -> dict[str, Any]:
        """Add a rule for the selective blocks to what the dense model is as ours."""
        config = dense_config(self._source.raw)
        dense = dict(config.ffn[0]["init_args"])
        rules = [
            {
                "layers": layers,
                "class_path": "moezoo.SelectiveFFN",
                "init_args": {**dense, "selection": selection},
            }
            for selection, layers in self._selections()
        ]
        config.ffn = [*config.ffn, *rules]
        config.check()
        config.architectures = ["MoezooForCausalLM"]
        return config.to_diff_dict()

    def _selections(self) -> list[tuple[dict[str, Any], list[int]]]:
        """Return the options of each rule, and its layers."""
        if self._guessing is None:
            return [({"kind": "threshold"}, list(self._layers))]
        found: list[tuple[dict[str, Any], list[int]]] = []
        guessing = self._guessing.inside(self._scratch)
        for layer in self._layers:
            selection = guessing.selection(layer)
            same = next((layers for each, layers in found if each == selection), None)
            if same is None:
                found.append((selection, [layer]))
            else:
                same.append(layer)
        return found

    def _outputs(self) -> Iterator[Output]:
        """List all tensors: the dense model's own, and thresholds."""
        for name, info in self._source.tensors.items():
            yield Output(name, info.shape, info.dtype, partial(self._source.pieces, name))
        width, d_model = self._source.width, self._source.config.hidden_size
        sizes = {"input": d_model, "gate": width, "up_input": d_model, "hidden": width}
        sizes["shares"] = len(Shares._fields)
        shapes = {name: ((size,), torch.float32) for name, size in sizes.items()}
        for layer in self._layers:
            for name, (shape, dtype) in (
                shapes if self._guessing is None else self._guessing.shapes()
            ).items():
                yield Output(
                    f"model.layers.{layer}.mlp.selector.{name}",
                    shape,
                    dtype,
                    partial(self._found, layer, name),
                )

    def _found(self, layer: int, name: str) -> Iterator[Tensor]:
        if self._guessing is not None:
            yield self._guessing.inside(self._scratch).tensor(layer, name)
            return
        value = getattr(read_thresholds(thresholds_file(self._scratch, layer)), name)
        yield value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)

    def _describe(self, perplexity: dict[str, float]) -> Sparsified:
        kept = {layer: self._shares(layer) for layer in self._layers}
        own = 0.0 if self._guessing is None else self._guessing.overhead
        layers: dict[str, dict[str, float]] = {}
        for place, (layer, shares) in enumerate(kept.items()):
            layers[str(layer)] = {
                **shares._asdict(),
                "work": work_share(shares) + own,
                "read": read_share(shares) + own,
            }
            if self._guessing is not None:
                figures = self._guessing.inside(self._scratch).figures(layer)
                layers[str(layer)] |= {
                    name: figures[name] for name in ("count", "recall", "energy") if name in figures
                }
            if self._sensitivity is not None:
                layers[str(layer)]["trial_nats"] = self._sensitivity.nats[place]
        dense = self._source.num_layers - len(kept)
        return Sparsified(
            "sparsify",
            self._options(),
            self._calibration.describe(),
            perplexity,
            mean_share([work_share(each) + own for each in kept.values()], dense),
            mean_share([read_share(each) + own for each in kept.values()], dense),
            layers,
        )

    def _shares(self, layer: int) -> Shares:
        if self._guessing is not None:
            return Shares(*self._guessing.inside(self._scratch).figures(layer)["shares"])
        return read_thresholds(thresholds_file(self._scratch, layer)).shares


__all__ = ["Sparsified", "sparsify", "summary"]
