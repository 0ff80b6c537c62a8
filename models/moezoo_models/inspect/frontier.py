"""`moezoo inspect frontier`: what each way of computing less of a dense model costs it."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moezoo.analysis.curves import draw_frontier
from moezoo.command.tables import markdown_lines, print_table
from moezoo.convert import Block
from moezoo.convert.select import METHODS, work_share
from moezoo.convert.select.guess import GUESSES, GuessMethod, GuessOptions
from moezoo.convert.select.prompt import kept_count as prompt_count
from moezoo.convert.select.prompt import prompt_neurons
from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo_kernels.linear import linear
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import writing
from moezoo_models.conversion.carve import calibrate, default_parts
from moezoo_models.conversion.guessing import Guessing
from moezoo_models.conversion.own_rules import carved_variant, pruned_variant
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.selecting import (
    Selecting,
    Sensitivity,
    budgets_of,
    check_gated,
    measure,
    needs_gate,
    sparsifiable,
    trial_tokens,
)
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.stage import Answer
from moezoo_models.devices import pick_device
from moezoo_models.inspect.inspection import writing as writable
from moezoo_models.progress import progress_bar

WAYS = (*METHODS, "predictor", "low_rank_gate", "r_sparse", "griffin", "carve", "prune")
"""Thresholds of each method; guesses of neurons; weak inputs at low rank; neurons chosen by the
first half of a window; experts of `moezoo carve`; fewer neurons, the same for all tokens."""


@dataclass(frozen=True)
class Point:
    """One way at one share of the work.

    Attributes:
        method: the way.
        asked: share of the feed-forward products that was asked for.
        work: share that is left, routers aside: experts are cut in whole parts.
        perplexity: on the held-out tokens.
        ratio: the same over the dense model's.
        error: standard error of the ratio, over windows.
    """

    method: str
    asked: float
    work: float
    perplexity: float
    ratio: float
    error: float


@dataclass(frozen=True)
class Frontier:
    """What each way costs a model.

    Attributes:
        checkpoint: the dense model.
        calibration: the text, as its hash and sizes.
        dense: perplexity of the dense model.
        points: every way at every share that it can do with.
    """

    checkpoint: str
    calibration: dict[str, Any]
    dense: float
    points: list[Point]

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Return title, columns and rows: a way in each row, a share of the work in each column."""
        works = sorted({point.asked for point in self.points}, reverse=True)
        rows = []
        for method in dict.fromkeys(point.method for point in self.points):
            found = {p.asked: p for p in self.points if p.method == method}
            cells = (_cell(found.get(work)) for work in works)
            rows.append([method, *cells])
        title = f"{self.checkpoint}: perplexity over the dense model's {self.dense:.4g}"
        return title, ["method", *(f">work {work:g}" for work in works)], rows


def inspect_frontier(
    source: str | Path,
    works: list[float] = [0.75, 0.57, 0.5],  # noqa: B006 - never changed
    methods: list[str] = list(WAYS),  # noqa: B006 - likewise
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 8192,
    held_out_tokens: int = 4096,
    window: int | None = None,
    experts: int | None = None,
    layers: str | int | list[int] = "all",
    seed: int = 0,
    device: str = "cpu",
    output: str | Path = "runs/frontier",
) -> Frontier:
    """Print and draw what computing less of a dense model costs, method by method.

    Each way is applied without training at each share of the feed-forward work, layer by layer in
    the memory of about one, and judged by perplexity on the same held-out tokens. Written to the
    output directory: frontier.json, frontier.csv, frontier.md and frontier.png.

    Args:
        source: directory of a dense model, or a GGUF file. Of blocks without a gate, as GPT-2's,
            the methods that judge by one are left out of the default.
        works: shares of the feed-forward products that are left.
        methods: mix, cats, chess, teal and wina, the thresholds of `moezoo sparsify`; predictor
            and low_rank_gate, its guesses, of rank 128 or for half of the work if that is less;
            r_sparse, its low rank; griffin, neurons that the first half of a window chooses for
            the second, on which it is judged (arXiv:2404.01365); carve, the experts of `moezoo
            carve`; prune, as many neurons for all tokens, refitted.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source.
        calibration_tokens: tokens that everything is fitted to.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once; default: as for `moezoo carve`.
        experts: parts into which carve cuts a block, five sixths of those that a token uses being
            shared; default: as for `moezoo carve`. Layers have equal budgets.
        layers: which blocks to change: all, every 2, a number or a list.
        seed: of everything drawn.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        output: directory that the files are written to.

    Returns:
        The figures that are printed.

    Raises:
        InputError: the source cannot be read, an option is out of range, there is too little
            text, or the output cannot be written.
    """
    for method in methods:
        check_choice("methods", method, WAYS)
    for work in works:
        check_number("works", work, minimum=0.1, maximum=0.99)
    if experts is not None:
        check_int("experts", experts, minimum=2)
    directory = Path(output)
    with (
        writing(directory),
        open_source(source, sparsifiable()) as model,
        tempfile.TemporaryDirectory() as scratch,
    ):
        if tuple(methods) == WAYS and not model.ffn["gated"]:
            methods = [method for method in WAYS if not needs_gate(method)]
        check_gated(model, methods, "methods")
        chosen = model.select(layers)
        text = calibrate(model, calibration, calibration_tokens, held_out_tokens, window, seed)
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
        place = pick_device(device)
        with progress_bar() as bar:
            passes = 2 if "mix" in methods else 1
            task = bar.add_task("computing", total=passes * model.num_layers)
            step = partial(bar.advance, task)
            sensitivity = None
            if "mix" in methods:
                sensitivity = measure(model, trial_tokens(text), chosen, place, step)
            length = text.fitted.shape[1]
            ways = {
                (method, work): variant
                for method in methods
                for work in works
                if (variant := _variant(model, method, work, chosen, sensitivity, length, experts))
            }
            variants = [Variant("dense", None), *(variant for variant, _ in ways.values())]
            run = Propagation(model, text, variants, chosen, Path(scratch), place)
            nats = run.run(step)
    dense = math.exp(nats["dense"].mean())
    points = [
        _point(method, asked, share, *_judged(method, nats[variant.name], nats["dense"], length))
        for (method, asked), (variant, share) in ways.items()
    ]
    found = Frontier(str(source), text.describe(), dense, points)
    print_table(*found.table())
    _write(found, directory)
    return found


def _variant(
    source: Source,
    method: str,
    work: float,
    layers: Sequence[int],
    sensitivity: Sensitivity | None,
    length: int,
    experts: int | None,
) -> tuple[Variant, float] | None:
    """Return a way at a share of the work, and its own share; None if it cannot do with that."""
    name, width = f"{method} {work:g}", source.width
    if method == "griffin":
        kept_share = prompt_count(width, work) / width
        return Variant(name, partial(_griffin, work, length)), kept_share
    if method in GUESSES:
        d_model = source.config.hidden_size
        rank = max(min(128, int(work / 2 * d_model * width / (d_model + width))), 1)
        options = GuessOptions(rank=min(rank, d_model, width))
        sizes = (length, d_model, width, source.dtype)
        return Variant(name, Guessing(cast("GuessMethod", method), work, options, *sizes)), work
    if method == "prune":
        keep = max(round(work * width), 1)
        return pruned_variant(name, keep, length), keep / width
    if method == "carve":
        experts = default_parts(width) if experts is None else experts
        parts = max(round(work * experts), 2)
        shared = 5 * parts // 6
        carved = carved_variant(name, shared, parts - shared, experts, width, length)
        return carved, parts / experts
    try:
        budgets = budgets_of(method, work, layers, sensitivity)  # type: ignore[arg-type]
    except InputError:
        return None
    share = sum(work_share(kept) for kept in budgets.values()) / len(budgets)
    selecting = Selecting(method, budgets, length, source.dtype)  # type: ignore[arg-type]
    return Variant(name, selecting), share


def _griffin(share: float, length: int, layer: int, x_TD: Tensor, block: Block) -> Answer:
    """Keep, in the second half of every window, the neurons that its first half uses most."""

    def answer(inputs_TD: Tensor) -> Tensor:
        rows = []
        for window_LD in inputs_TD.split(length):
            hidden_LF = block.hidden(window_LD)
            dropped_F = torch.ones_like(hidden_LF[0], dtype=torch.bool)
            dropped_F[prompt_neurons(hidden_LF[: length // 2], share)] = False
            hidden_LF[length // 2 :].masked_fill_(dropped_F, 0.0)
            rows.append(linear(hidden_LF, block.down, block.bias_out))
        return torch.cat(rows)

    return answer


def _judged(method: str, nats: Tensor, dense: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return what counts of cross-entropies: of griffin, what the second half predicts."""
    if method != "griffin":
        return nats, dense
    later = nats.shape[1] - (length - 1 - length // 2)
    return nats[:, later:], dense[:, later:]


def _point(method: str, asked: float, work: float, nats: Tensor, dense: Tensor) -> Point:
    """Compare cross-entropies ``(windows, tokens)``, window by window."""
    by_window = (nats - dense).double().mean(dim=1)
    ratio = math.exp(by_window.mean())
    error = float(by_window.std()) / len(by_window) ** 0.5 if len(by_window) > 1 else 0.0
    return Point(method, asked, work, math.exp(nats.mean()), ratio, ratio * error)


def _cell(point: Point | None) -> str:
    return "–" if point is None else f"{point.ratio:.3f} ± {point.error:.3f}"


def _write(found: Frontier, directory: Path) -> None:
    title, columns, rows = found.table()
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for point in found.points:
        curves.setdefault(point.method, []).append((point.work, point.ratio, point.error))
    picture = io.BytesIO()
    draw_frontier(curves, f"Frontier: {found.checkpoint}").savefig(picture, format="png")
    with writable(directory):
        with atomic_write(directory / "frontier.png") as file:
            file.write(picture.getvalue())
        with atomic_write(directory / "frontier.csv", "w") as file:
            points = [asdict(point) for point in found.points]
            writer = csv.DictWriter(file, list(Point.__annotations__), lineterminator="\n")
            writer.writeheader()
            writer.writerows(points)
        with atomic_write(directory / "frontier.json", "w") as file:
            json.dump(asdict(found), file, indent=2, ensure_ascii=False)
            file.write("\n")
        with atomic_write(directory / "frontier.md", "w") as file:
            file.write("\n".join([title, "", *markdown_lines(columns, rows), ""]))
    print(f"frontier.json, frontier.csv, frontier.md and frontier.png are in {directory}")
