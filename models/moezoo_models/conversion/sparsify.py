"""`moezoo sparsify`: a dense checkpoint whose tokens skip what counts for little, untrained."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moezoo.convert.select import METHODS, SelectMethod, read_share, work_share
from moezoo.convert.select.budget import Count
from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.selection import Shares
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.checkpoints.directory import CONFIG
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carve import calibrate, model_nats
from moezoo_models.conversion.convert import REPORT, copy_files
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.selecting import (
    Selecting,
    Sensitivity,
    budgets_of,
    measure,
    read_thresholds,
    sparsifiable,
    thresholds_file,
    trial_tokens,
)
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import (
    check_space,
    check_target,
    parse_size,
    plan_shards,
    workspace,
)
from moezoo_models.devices import pick_device
from moezoo_models.progress import progress_bar

_FORMAT = 1
_SCRATCH = "calibration"
_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Sparsified:
    """A checkpoint that was made selective, as its report in the directory describes it.

    Attributes:
        method: sparsify.
        options: as they were given.
        calibration: the text.
        perplexity: on held-out tokens: ``dense``, ``sparse`` as calibrated in fp32, and
            ``loaded``, of the checkpoint as it was written.
        work: share of the feed-forward products that tokens need, in all.
        read: share of the feed-forward weights that tokens read, in whole rows and columns.
        layers: of each layer, what tokens keep, and its cost to the model if it was measured.
    """

    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    perplexity: dict[str, float]
    work: float
    read: float
    layers: dict[str, dict[str, float]]


def sparsify(
    source: str | Path,
    target: str | Path,
    method: SelectMethod = "mix",
    work: float | None = None,
    read: float | None = None,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 8192,
    held_out_tokens: int = 4096,
    sensitivity_tokens: int = 1024,
    window: int | None = None,
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
        source: directory of a Llama, Mistral, Qwen2 or Qwen3.
        target: directory to make, in this library's format.
        method: mix, all thresholds with budgets by each layer's measured cost (ours); cats
            (arXiv:2404.08763), chess (arXiv:2409.01366), teal (arXiv:2408.14690), wina
            (arXiv:2505.19427), the same for all layers.
        work: share of the feed-forward products that is left; default 0.57.
        read: in place of work, share of the weights that are read, in whole rows and columns.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens whose values decide thresholds.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        sensitivity_tokens: tokens on which the cost of each layer is measured, by mix.
        window: tokens that the model sees at once; default: what it was trained on, or
            if its config.json does not say, what it is made for; at most 2048.
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
    check_choice("method", method, METHODS)
    check_choice("check", check, ("loaded", "none"))
    check_int("sensitivity_tokens", sensitivity_tokens)
    count, share = _budget(work, read)
    if method != "mix":
        budgets_of(method, share, (0,), None)  # refuses too little before anything is read
    check_target(Path(target), force)
    with open_source(source, sparsifiable()) as dense:
        chosen = dense.select(layers)
        text = calibrate(
            dense,
            calibration,
            calibration_tokens,
            held_out_tokens,
            window,
            check_int("seed", seed, minimum=0),
        )
        run = _Run(
            dense, text, method, count, share, chosen, sensitivity_tokens, pick_device(device)
        )
        return run.write(Path(target), max_shard_size, check == "loaded", force)


def _budget(work: float | None, read: float | None) -> tuple[Count, float]:
    """Return what is counted, and the share of it that is left."""
    if work is not None and read is not None:
        raise InputError("read: work is given too, and one of them decides; leave out the other")
    count: Count = "work" if read is None else "read"
    share = read if read is not None else 0.57 if work is None else work
    share = check_number(count, share, maximum=1.0)
    if not 0.05 <= share < 1:
        raise InputError(f"{count}: {share:g} is out of range; give a number from 0.05 to below 1")
    return count, share


class _Run:
    """One call of :func:`sparsify`; arguments as there."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        method: SelectMethod,
        count: Count,
        share: float,
        layers: tuple[int, ...],
        sensitivity_tokens: int,
        device: torch.device,
    ) -> None:
        self._source, self._calibration, self._device = source, calibration, device
        self._method, self._count, self._share, self._layers = method, count, share, layers
        self._trial = trial_tokens(calibration, sensitivity_tokens)
        self._scratch = Path()
        self._sensitivity: Sensitivity | None = None

    def write(self, target: Path, max_shard_size: str, loads: bool, force: bool) -> Sparsified:
        """Calibrate, write the checkpoint atomically, and print what it is."""
        shards = plan_shards(self._outputs(), parse_size(max_shard_size))
        total = sum(shard.bytes for shard in shards)
        check_space(target, total + self._propagation(None).bytes)
        with workspace(target, self._identity(max_shard_size), force) as work:
            self._scratch = work.directory / _SCRATCH
            nats = self._calibrate()
            with progress_bar() as bar:
                task = bar.add_task("writing", total=total)
                for shard in shards:
                    work.write(shard, partial(bar.advance, task))
            work.write_index(shards)
            work.write_json(CONFIG, self._config())
            copy_files(self._source.directory, work.directory)
            perplexity = {name: math.exp(each.mean()) for name, each in nats.items()}
            if loads:
                model = load_any(work.directory, sound=True)
                perplexity["loaded"] = math.exp(model_nats(model, self._calibration).mean())
            made = self._describe(perplexity)
            work.write_json(REPORT, asdict(made))
            shutil.rmtree(self._scratch, ignore_errors=True)
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
            budgets = budgets_of(
                self._method, self._share, self._layers, self._sensitivity, self._count
            )
            return self._propagation(budgets).run(lambda: bar.advance(task))

    def _propagation(self, budgets: dict[int, Shares] | None) -> Propagation:
        selecting = Selecting(
            self._method,
            budgets or {},
            self._calibration.fitted.shape[1],
            self._source.dtype,
            self._scratch,
        )
        return Propagation(
            self._source,
            self._calibration,
            (Variant("dense", None), Variant("sparse", selecting)),
            self._layers,
            self._scratch,
            self._device,
        )

    def _identity(self, max_shard_size: str) -> str:
        """Hash what decides the contents, so that an interrupted run can be told from another."""
        decides = [
            _FORMAT,
            torch.__version__,
            self._source.raw,
            self._source.stamp(),
            self._options(),
            self._calibration.describe(),
            max_shard_size,
        ]
        text = json.dumps(["sparsify", *decides], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _options(self) -> dict[str, Any]:
        return {
            "method": self._method,
            self._count: self._share,
            "layers": list(self._layers),
            "sensitivity_tokens": self._trial.numel(),
        }

    def _config(self) -> dict[str, Any]:
        """Add a rule for the selective blocks to what the dense model is as ours."""
        config = dense_config(self._source.raw)
        dense = dict(config.ffn[0]["init_args"])
        rule = {
            "layers": list(self._layers),
            "class_path": "moezoo.SelectiveFFN",
            "init_args": {**dense, "selection": {"kind": "threshold"}},
        }
        config.ffn = [*config.ffn, rule]
        config.check()
        config.architectures = ["MoezooForCausalLM"]
        return config.to_diff_dict()

    def _outputs(self) -> Iterator[Output]:
        """List all tensors: the dense model's own, and thresholds."""
        for name, info in self._source.tensors.items():
            yield Output(name, info.shape, info.dtype, partial(self._copied, name))
        width, d_model = self._source.width, self._source.config.hidden_size
        sizes = {"input": d_model, "gate": width, "up_input": d_model, "hidden": width}
        for layer in self._layers:
            for name, size in {**sizes, "shares": len(Shares._fields)}.items():
                yield Output(
                    f"model.layers.{layer}.mlp.selector.{name}",
                    (size,),
                    torch.float32,
                    partial(self._found, layer, name),
                )

    def _copied(self, name: str) -> Iterator[Tensor]:
        yield self._source.read(name)

    def _found(self, layer: int, name: str) -> Iterator[Tensor]:
        value = getattr(read_thresholds(thresholds_file(self._scratch, layer)), name)
        yield value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)

    def _describe(self, perplexity: dict[str, float]) -> Sparsified:
        kept = {
            layer: read_thresholds(thresholds_file(self._scratch, layer)).shares
            for layer in self._layers
        }
        layers: dict[str, dict[str, float]] = {}
        for place, (layer, shares) in enumerate(kept.items()):
            layers[str(layer)] = {
                **shares._asdict(),
                "work": work_share(shares),
                "read": read_share(shares),
            }
            if self._sensitivity is not None:
                layers[str(layer)]["trial_nats"] = self._sensitivity.nats[place]
        dense = self._source.num_layers - len(kept)
        return Sparsified(
            "sparsify",
            self._options(),
            self._calibration.describe(),
            perplexity,
            _mean([work_share(each) for each in kept.values()], dense),
            _mean([read_share(each) for each in kept.values()], dense),
            layers,
        )


def _mean(shares: Sequence[float], dense: int) -> float:
    return (sum(shares) + dense) / (len(shares) + dense)


def summary(made: Sparsified, target: Path) -> str:
    """Return a few lines: shares of each matrix, and perplexities."""
    kept = [Shares(*(each[name] for name in Shares._fields)) for each in made.layers.values()]
    work = {
        "gate": [each.input for each in kept],
        "up": [each.gate * each.up_input for each in kept],
        "down": [each.hidden for each in kept],
    }
    read = {**work, "up": [each.gate if each.gate < 1 else each.up_input for each in kept]}
    lines = [
        f"to        {target}, {len(kept)} selective blocks",
        f"{'share of':<10}{'gate':>8}{'up':>8}{'down':>8}{'all':>8}",
    ]
    for name, found, total in (("work", work, made.work), ("read", read, made.read)):
        cells = "".join(f"{sum(found[m]) / len(kept):>8.3f}" for m in _MATRICES)
        lines.append(f"{name:<10}{cells}{total:>8.3f}")
    lines.append(f"perplexity on {made.calibration['held_out_tokens']:,} held-out tokens")
    names = {"dense": "dense", "sparse": "selective", "loaded": "selective, as loaded"}
    dense = made.perplexity["dense"]
    for name, text in names.items():
        if name in made.perplexity:
            value = made.perplexity[name]
            lines.append(f"  {text:<28}{value:>10.4g}  × {value / dense:.3f}")
    return "\n".join(lines)


__all__ = ["Sparsified", "sparsify", "summary"]
