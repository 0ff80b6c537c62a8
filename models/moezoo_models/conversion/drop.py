"""`moezoo drop-layers`: a dense checkpoint without some of its layers, of the same architecture."""

from __future__ import annotations

import hashlib
import json
import re
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
from moezoo_models.conversion.dropping import Start, measure_starts
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
_PER_LAYER = ("layer_types", "no_rope_layers")
"""Fields of stock configurations with an entry for each layer."""
_NUMBER = re.compile(r"(\.(?:layers|h)\.)(\d+)(\.)")


@dataclass(frozen=True)
class Dropped:
    """What was left out, and what that costs.

    Attributes:
        method: ``drop-layers``.
        options: what was asked for.
        calibration: the text.
        first: the first layer that was left out.
        count: so many were.
        dense_nats: the dense model's cross-entropy on the calibration text, per token.
        starts: the same for every block of layers, and its angular distance.
        perplexity: on held-out text, ``dense`` and ``dropped``; of the files as they load.
    """

    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    first: int
    count: int
    dense_nats: float
    starts: list[Start]
    perplexity: dict[str, float]


def drop_layers(
    source: str | Path,
    target: str | Path,
    count: int,
    by: Literal["loss", "angle", "deepest"] = "loss",
    first: int | None = None,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 2048,
    held_out_tokens: int = 4096,
    window: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Dropped:
    """Leave consecutive layers out of a dense Hugging Face checkpoint, untrained.

    For every block of so many layers the angular distance over it and the loss without it are
    measured and printed, layer by layer in the memory of about one (arXiv:2403.17887). The others
    are written under new numbers, as a stock checkpoint of the same architecture; train it on to
    make up for a part of the loss, with moezoo fit and --model.lora.

    Args:
        source: directory of a dense model, or a GGUF file.
        target: directory to make.
        count: layers to leave out.
        by: which: those without which the loss is least; angle: of the least angular distance, as
            the paper; deepest: the last ones but the very last, its simple rule.
        first: the first layer to leave out; by is then ignored.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens on which all blocks are measured.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once, whose last one angles are of; default: what it
            was trained on, or if its config.json does not say, what it is made for; at most 2048.
        seed: of the choice of passages.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        max_shard_size: start another file when one exceeds this.
        check: load the result and measure its perplexity, or not.
        force: replace a checkpoint that target holds.

    Returns:
        What is printed.

    Raises:
        InputError: the source cannot be read or its layers not renumbered, there are too few, there
            is too little text, or the target cannot hold the result.
    """
    check_choice("by", by, ("loss", "angle", "deepest"))
    check_choice("check", check, ("loaded", "none"))
    check_int("count", count)
    check_target(Path(target), force)
    with open_source(source) as dense:
        if count >= dense.num_layers:
            raise InputError(f"count: the model has {dense.num_layers} layers; drop fewer")
        starts = dense.num_layers - count
        if first is not None:
            check_int("first", first, minimum=0, maximum=starts)
        for each in range(starts + 1):
            config_without(dense, each, count)  # refuses what cannot be renumbered
        check_int("seed", seed, minimum=0)
        text = calibrate(dense, calibration, calibration_tokens, held_out_tokens, window, seed)
        options = {"count": count, "by": by, "first": first}
        run = _Run(dense, text, options, pick_device(device))
        return run.write(Path(target), max_shard_size, check == "loaded", force)


def choose(starts: list[Start], by: str) -> int:
    """Return the first of the layers to leave out; of equal ones the deepest.

    Args:
        starts: all blocks, in order.
        by: ``loss``, ``angle`` or ``deepest``.
    """
    if by == "deepest":
        # The last block of layers has the very last one; the simple rule keeps it.
        return starts[max(len(starts) - 2, 0)].first
    key = {"loss": lambda start: start.nats, "angle": lambda start: start.distance}[by]
    return min(reversed(starts), key=key).first


def config_without(source: Source, first: int, count: int) -> dict[str, Any]:
    """Return the ``config.json`` of a dense model without some layers.

    Raises:
        InputError: layers of this architecture differ in more than can be written for fewer.
    """
    stock, kept = source.config, kept_layers(source, first, count)
    raw = dict(source.raw)
    raw[stock.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    for name in _PER_LAYER:
        entries = getattr(stock, name, None)
        if entries is not None and len(entries) == source.num_layers:
            raw[name] = [entries[layer] for layer in kept]
    if isinstance(windows := raw.get("max_window_layers"), int):
        raw["max_window_layers"] = sum(layer < windows for layer in kept)
    ours, fewer = source.ours, dense_config(raw)
    wanted = {
        "num_hidden_layers": len(kept),
        "layer_types": [ours.layer_types[layer] for layer in kept],
        "nope_layers": [place for place, layer in enumerate(kept) if layer in ours.nope_layers],
    }
    for name, value in wanted.items():
        if getattr(fewer, name) != value:
            raise InputError(
                f"source: a {source.family} does not keep its {name} when layers are left out; it "
                "cannot be written as one"
            )
    return raw


def kept_layers(source: Source, first: int, count: int) -> list[int]:
    """Return the old numbers of the layers that stay, in order."""
    return [n for n in range(source.num_layers) if not first <= n < first + count]


class _Run:
    """One call of :func:`drop_layers`; arguments as there."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        options: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._source, self._calibration = source, calibration
        self._options, self._device = options, device

    def write(self, target: Path, max_shard_size: str, loads: bool, force: bool) -> Dropped:
        """Measure, write the checkpoint atomically, and print what it is."""
        largest = parse_size(max_shard_size)
        check_space(target, sum(output.bytes for output in self._outputs(0, 0)))
        dense_nats, starts = self._measure()
        count, by, first = (self._options[name] for name in ("count", "by", "first"))
        first = choose(starts, by) if first is None else first
        shards = plan_shards(self._outputs(first, count), largest)
        with workspace(target, self._identity(first, largest), force) as work:
            with progress_bar() as bar:
                task = bar.add_task("writing", total=sum(shard.bytes for shard in shards))
                for shard in shards:
                    work.write(shard, partial(bar.advance, task))
            work.write_index(shards)
            work.write_json(CONFIG, config_without(self._source, first, count))
            said = (
                f"`moezoo drop-layers` left layers {first} to {first + count - 1} out of "
                f"{self._source.num_layers}. `{REPORT}` has the options."
            )
            copy_files([self._source.directory], work.directory, said, target)
            perplexity = {}
            if loads:
                text = self._calibration
                perplexity["dense"] = loaded_perplexity(self._source.directory, text, sound=False)
                perplexity["dropped"] = loaded_perplexity(work.directory, text)
            made = Dropped(
                "drop-layers",
                self._options,
                self._calibration.describe(),
                first,
                count,
                dense_nats,
                starts,
                perplexity,
            )
            work.write_json(REPORT, asdict(made))
        _say(made, target)
        return made

    def _measure(self) -> tuple[float, list[Start]]:
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=self._source.num_layers)
            return measure_starts(
                self._source,
                self._calibration.fitted,
                self._calibration.skipped,
                self._options["count"],
                self._device,
                lambda: bar.advance(task),
            )

    def _outputs(self, first: int, count: int) -> list[Output]:
        """List the tensors of the files, those of layers that stay under their new numbers."""
        places = {old: new for new, old in enumerate(kept_layers(self._source, first, count))}
        found: dict[str, Output] = {}
        for name in self._source.tensors:
            layer = layer_of(name)
            if layer is not None and layer not in places:
                continue
            stored, tensor = self._source.stored(name)
            if layer is not None:
                stored = _NUMBER.sub(rf"\g<1>{places[layer]}\g<3>", stored, count=1)
            if stored not in found:  # several of ours may be parts of one
                pieces = partial(self._stored, name)
                found[stored] = Output(stored, tuple(tensor.shape), tensor.dtype, pieces)
        return list(found.values())

    def _stored(self, name: str) -> Iterator[Tensor]:
        yield self._source.stored(name)[1]

    def _identity(self, first: int, largest: int) -> str:
        """Hash what decides the contents, so that an interrupted run can be told from another."""
        decides = [_FORMAT, self._source.raw, self._source.stamp(), first, self._options, largest]
        text = json.dumps(["drop-layers", *decides], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _say(made: Dropped, target: Path) -> None:
    """Print all blocks, and what the one that is left out costs."""
    rows = [
        [
            f"{start.first} … {start.first + made.count - 1}",
            f"{start.distance:.4f}",
            f"{start.nats:.4f}",
            f"{start.nats - made.dense_nats:+.4f}",
            "left out" if start.first == made.first else "",
        ]
        for start in made.starts
    ]
    title = f"Without {made.count} layers; loss with all of them {made.dense_nats:.4f}"
    print_table(title, ["layers", ">angular distance", ">loss", ">more", ""], rows)
    last = made.first + made.count - 1
    print(f"left out layers {made.first} to {last}, {target}")
    if made.perplexity:
        dense, dropped = made.perplexity["dense"], made.perplexity["dropped"]
        tokens = made.calibration["held_out_tokens"]
        print(f"perplexity on {tokens:,} held-out tokens")
        print(f"  dense       {dense:>10.4g}")
        print(f"  left out    {dropped:>10.4g}  × {dropped / dense:.3f}")
