"""`moezoo fuse-layers`: dense blocks of consecutive layers as one, without attention between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_choice, check_int
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.drop import config_without, kept_layers
from moezoo_models.conversion.fusing import (
    check_fusible,
    dependencies,
    fused_projection,
    norm_name,
)
from moezoo_models.conversion.recovery import check_recovery
from moezoo_models.conversion.shortened import Shortened, Shortening, say_perplexity
from moezoo_models.conversion.source import Source, layer_of, open_source
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import check_space, check_target
from moezoo_models.devices import pick_device
from moezoo_models.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Fused(Shortened):
    """What was fused, and what that costs.

    Attributes:
        dependencies: for each layer, how much what each other adds changes without it.
    """

    verb: ClassVar[str] = "fused"
    dependencies: list[list[float]]


def fuse_layers(
    source: str | Path,
    target: str | Path,
    first: int,
    last: int,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 1024,
    held_out_tokens: int = 4096,
    window: int | None = None,
    recover: int = 0,
    recovery: RecoveryOptions = RecoveryOptions(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Fused:
    """Make one wide block of the dense blocks of consecutive layers (FFN Fusion).

    Of layers first to last, attention is left out but for the first's and the last's, and the
    blocks of all but the last become one, in the layer of the first (arXiv:2503.18908). The last
    stays as it is. How much layers depend on each other is measured and printed beforehand. Nothing
    is trained but with ``recover``.

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
        recover: tokens of further calibration text on which all blocks are trained to predict what
            the dense model predicts, once the checkpoint is there; it is replaced when that is
            done. The same command goes on where it was interrupted.
        recovery: options of this training.
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
    check_recovery(recover, recovery)
    if not recover:  # else it may hold what is to be trained
        check_target(Path(target), force)
    with open_source(source) as dense:
        if not first + 2 <= check_int("last", last, minimum=0) < dense.num_layers:
            least, most = first + 2, dense.num_layers - 1
            fix = f"one from {least} to {most}, or a smaller first"
            raise InputError(
                f"last: {last} does not end a run of three or more of {dense.num_layers} layers; "
                f"give {fix if least <= most else 'a smaller first'}"
            )
        check_fusible(dense)
        fused_config(dense, first, last)  # refuses what cannot be renumbered
        check_int("seed", seed, minimum=0)
        text = calibrate(
            dense, calibration, calibration_tokens, held_out_tokens, window, seed, recover
        )
        work = Shortening(
            "fuse-layers",
            dense,
            Path(target),
            text,
            {"first": first, "last": last},
            recovery,
            max_shard_size,
            check == "loaded",
            force,
        )
        place = pick_device(device)
        return work.run(Fused, _Run(work, place).write, partial(_say, Path(target)), place)


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
    """One call of :func:`fuse_layers`."""

    def __init__(self, work: Shortening, device: torch.device) -> None:
        self._work, self._source, self._device = work, work.source, device
        self._first, self._last = work.options["first"], work.options["last"]

    def write(self) -> Fused:
        """Measure, and write the checkpoint."""
        check_space(self._work.target, sum(output.bytes for output in self._outputs()))
        first, last = self._first, self._last
        return self._work.write(
            Fused,
            kept_layers(self._source, first + 1, last - first - 1),
            self._outputs(),
            fused_config(self._source, first, last),
            f"`moezoo fuse-layers` made one block of those of layers {first} to {last - 1}.",
            dependencies=self._measure().tolist(),
        )

    def _measure(self) -> Tensor:
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=self._source.num_layers)
            tokens = self._work.text.fitted
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
            pieces = partial(source.pieces, name)
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

    def _ones(self, name: str) -> Iterator[Tensor]:
        """Yield the norm's weight: the wide block's columns have those of all norms."""
        yield torch.ones_like(self._source.read(name))


def _say(target: Path, made: Fused) -> None:
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
    say_perplexity(made)
