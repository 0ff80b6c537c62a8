"""`moezoo drop-layers`: a dense checkpoint without some of its layers, of the same architecture."""

from __future__ import annotations

import re
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
from moezoo_models.conversion.dropping import Start, measure_starts
from moezoo_models.conversion.recovery import check_recovery
from moezoo_models.conversion.shortened import Shortened, Shortening, say_perplexity
from moezoo_models.conversion.source import Source, layer_of, open_source
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import check_space, check_target
from moezoo_models.devices import pick_device
from moezoo_models.progress import progress_bar

_PER_LAYER = ("layer_types", "no_rope_layers")
"""Fields of stock configurations with an entry for each layer."""
_NUMBER = re.compile(r"(\.(?:layers|h)\.)(\d+)(\.)")


@dataclass(frozen=True, kw_only=True)
class Dropped(Shortened):
    """What was left out, and what that costs.

    Attributes:
        first: the first layer that was left out.
        count: so many were.
        dense_nats: the dense model's cross-entropy on the calibration text, per token.
        starts: the same for every block of layers, and its angular distance.
    """

    verb: ClassVar[str] = "dropped"
    first: int
    count: int
    dense_nats: float
    starts: list[Start]

    def __post_init__(self) -> None:
        read = [each if isinstance(each, Start) else Start(**each) for each in self.starts]
        object.__setattr__(self, "starts", read)


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
    recover: int = 0,
    recovery: RecoveryOptions = RecoveryOptions(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Dropped:
    """Leave consecutive layers out of a dense Hugging Face checkpoint.

    For every block of so many layers the angular distance over it and the loss without it are
    measured and printed, layer by layer in the memory of about one (arXiv:2403.17887). The others
    are written under new numbers, as a stock checkpoint of the same architecture. Training makes up
    for a part of the loss: with recover, or moezoo fit and --model.lora.

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
        recover: tokens of further calibration text on which the blocks of the layers that stay are
            trained to predict what the dense model predicts, once the checkpoint is there; it is
            replaced when that is done. The same command goes on where it was interrupted.
        recovery: options of this training.
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
    check_recovery(recover, recovery)
    if not recover:  # else it may hold what is to be trained
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
        text = calibrate(
            dense, calibration, calibration_tokens, held_out_tokens, window, seed, recover
        )
        work = Shortening(
            "drop-layers",
            dense,
            Path(target),
            text,
            {"count": count, "by": by, "first": first},
            recovery,
            max_shard_size,
            check == "loaded",
            force,
        )
        place = pick_device(device)
        return work.run(Dropped, _Run(work, place).write, partial(_say, Path(target)), place)


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
    """One call of :func:`drop_layers`."""

    def __init__(self, work: Shortening, device: torch.device) -> None:
        self._work, self._source, self._device = work, work.source, device

    def write(self) -> Dropped:
        """Measure, choose, and write the checkpoint."""
        largest = sum(output.bytes for output in self._outputs(0, 0))
        check_space(self._work.target, largest)
        dense_nats, starts = self._measure()
        count, by, first = (self._work.options[name] for name in ("count", "by", "first"))
        first = choose(starts, by) if first is None else first
        return self._work.write(
            Dropped,
            kept_layers(self._source, first, count),
            self._outputs(first, count),
            config_without(self._source, first, count),
            f"`moezoo drop-layers` left layers {first} to {first + count - 1} out of "
            f"{self._source.num_layers}.",
            first=first,
            count=count,
            dense_nats=dense_nats,
            starts=starts,
        )

    def _measure(self) -> tuple[float, list[Start]]:
        text = self._work.text
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=self._source.num_layers)
            return measure_starts(
                self._source,
                text.fitted,
                text.skipped,
                self._work.options["count"],
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


def _say(target: Path, made: Dropped) -> None:
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
    print(f"left out layers {made.first} to {made.first + made.count - 1}, {target}")
    say_perplexity(made)
