"""`moezoo fuse-layers`: dense blocks of consecutive layers as one, without attention between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_choice, check_int
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.checkpoints.directory import CONFIG
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.carving import loaded_perplexity
from moezoo_models.conversion.convert import REPORT, copy_files
from moezoo_models.conversion.drop import config_without, kept_layers
from moezoo_models.conversion.fusing import (
    check_fusible,
    dependencies,
    fused_projection,
    norm_name,
)
from moezoo_models.conversion.source import Source, layer_of, open_source
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


@dataclass(frozen=True)
class Fused:
    """What was fused, and what that costs.

    Attributes:
        method: ``fuse-layers``.
        options: what was asked for.
        calibration: the text.
        dependencies: for each layer, how much what each other adds changes without it.
        perplexity: on held-out text, ``dense`` and ``fused``; of the files as they load.
    """

    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    dependencies: list[list[float]]
    perplexity: dict[str, float]


def fuse_layers(
    source: str | Path,
    target: str | Path,
    first: int,
    last: int,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 1024,
    held_out_tokens: int = 4096,
    window: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Fused:
    """Make one wide block of the dense blocks of consecutive layers, untrained (FFN Fusion).

    Of layers first to last, attention is left out but for the first's and the last's, and the
    blocks of all but the last become one, in the layer of the first (arXiv:2503.18908). The last
    stays as it is. How much layers depend on each other is measured and printed beforehand.

    Args:
        source: directory of a dense model, or a GGUF file.
        target: directory to make, in this library's format, as widths differ.
        first: the first layer of the run, from 0.
        last: the last one, which stays.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens on which dependencies are measured.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once; default: what it was trained on, or if its
            config.json does not say, what it is made for; at most 2048.
        seed: of the choice of passages.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        max_shard_size: start another file when one exceeds this.
        check: load the result and measure its perplexity, or not.
        force: replace a checkpoint that target holds.

    Returns:
        What is printed, and all dependencies.

    Raises:
        InputError: the source cannot be read or its blocks not fused, the run is too short, there
            is too little text, or the target cannot hold the result.
    """
    check_choice("check", check, ("loaded", "none"))
    check_int("first", first, minimum=0)
    check_target(Path(target), force)
    with open_source(source) as dense:
        if not first + 2 <= check_int("last", last, minimum=0) < dense.num_layers:
            raise InputError(
                f"last: {last} does not end a run of three or more of {dense.num_layers} layers; "
                f"give one from {first + 2} to {dense.num_layers - 1}, or a smaller first"
            )
        check_fusible(dense)
        fused_config(dense, first, last)  # refuses what cannot be renumbered
        check_int("seed", seed, minimum=0)
        text = calibrate(dense, calibration, calibration_tokens, held_out_tokens, window, seed)
        run = _Run(dense, text, first, last, pick_device(device))
        return run.write(Path(target), max_shard_size, check == "loaded", force)


def fused_config(source: Source, first: int, last: int) -> dict[str, Any]:
    """Return the ``config.json`` of ours with one wide block; layers as of :func:`fuse_layers`."""
    config = dense_config(config_without(source, first + 1, last - first - 1))
    wide = {**config.ffn[0]["init_args"], "d_ff": (last - first) * source.width}
    rule = {"layers": [first], "class_path": "moezoo.DenseFFN", "init_args": wide}
    config.ffn = [*config.ffn, rule]
    config.check()
    config.architectures = ["MoezooForCausalLM"]
    return config.to_diff_dict()


class _Run:
    """One call of :func:`fuse_layers`; arguments as there."""

    def __init__(
        self, source: Source, calibration: Calibration, first: int, last: int, device: torch.device
    ) -> None:
        self._source, self._calibration, self._device = source, calibration, device
        self._first, self._last = first, last

    def write(self, target: Path, max_shard_size: str, loads: bool, force: bool) -> Fused:
        """Measure, write the checkpoint atomically, and print what it is."""
        shards = plan_shards(self._outputs(), parse_size(max_shard_size))
        total = sum(shard.bytes for shard in shards)
        check_space(target, total)
        found = self._measure()
        with workspace(target, self._identity(max_shard_size), force) as work:
            with progress_bar() as bar:
                task = bar.add_task("writing", total=total)
                for shard in shards:
                    work.write(shard, partial(bar.advance, task))
            work.write_index(shards)
            work.write_json(CONFIG, fused_config(self._source, self._first, self._last))
            said = (
                f"`moezoo fuse-layers` made one block of those of layers {self._first} to "
                f"{self._last - 1}. `{REPORT}` has the options."
            )
            copy_files([self._source.directory], work.directory, said, target)
            perplexity = {}
            if loads:
                text = self._calibration
                perplexity["dense"] = loaded_perplexity(self._source.directory, text, sound=False)
                perplexity["fused"] = loaded_perplexity(work.directory, text)
            made = Fused(
                "fuse-layers",
                {"first": self._first, "last": self._last},
                self._calibration.describe(),
                found.tolist(),
                perplexity,
            )
            work.write_json(REPORT, asdict(made))
        _say(made, target)
        return made

    def _measure(self) -> Tensor:
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=self._source.num_layers)
            tokens = self._calibration.fitted
            return dependencies(self._source, tokens, self._device, lambda: bar.advance(task))

    def _outputs(self) -> Iterator[Output]:
        """List the tensors: those of layers that stay, and the wide block."""
        source, first, last = self._source, self._first, self._last
        fused = range(first, last)
        kept = kept_layers(source, first + 1, last - first - 1)
        places = {old: new for new, old in enumerate(kept)}
        for name, info in source.tensors.items():
            layer, shape = layer_of(name), list(info.shape)
            if layer is not None and layer not in places:
                continue
            pieces = partial(self._copied, name)
            if name == norm_name(first):
                pieces = partial(self._ones, name)
            elif layer == first and ".mlp." in name:
                projection = name.split(".")[-2].removesuffix("_proj")
                shape[1 if projection == "down" else 0] *= len(fused)
                pieces = partial(fused_projection, source, fused, projection)
            if layer is not None:
                start = f"model.layers.{layer}."
                name = f"model.layers.{places[layer]}." + name.removeprefix(start)
            yield Output(name, tuple(shape), info.dtype, pieces)

    def _copied(self, name: str) -> Iterator[Tensor]:
        yield self._source.read(name)

    def _ones(self, name: str) -> Iterator[Tensor]:
        """Yield the norm's weight: the wide block's columns have those of all norms."""
        yield torch.ones_like(self._source.read(name))

    def _identity(self, max_shard_size: str) -> str:
        """Hash what decides the contents, so that an interrupted run can be told from another."""
        source = self._source
        decides = [_FORMAT, torch.__version__, source.raw, source.stamp(), self._first, self._last]
        text = json.dumps(["fuse-layers", *decides, max_shard_size], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _say(made: Fused, target: Path) -> None:
    """Print how layers depend on those of the run, and what fusing costs."""
    first, last = made.options["first"], made.options["last"]
    run = range(first, last + 1)
    rows = []
    for number, row in enumerate(made.dependencies):
        own = [f"{row[other]:.3f}" if other > number else "" for other in run]
        later = row[number + 1 :]
        mean = f"{sum(later) / len(later):.3f}" if later else ""
        rows.append([str(number), mean, *own])
    title = "How much what a layer adds changes (1 - cosine) without an earlier one"
    print_table(title, [">without", ">all later", *(f">in {n}" for n in run)], rows)
    print(f"fused the blocks of layers {first} to {last - 1}, {target}")
    if made.perplexity:
        dense, fused = made.perplexity["dense"], made.perplexity["fused"]
        print(f"perplexity on {made.calibration['held_out_tokens']:,} held-out tokens")
        print(f"  dense       {dense:>10.4g}")
        print(f"  fused       {fused:>10.4g}  × {fused / dense:.3f}")
