"""``moezoo compare runs/* --law all``: scaling laws fitted to runs of moezoo fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moezoo.command.tables import count
from moezoo.errors import InputError, check_choice
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import our_config
from moezoo_train.plan.counting import count_weights
from moezoo_train.plan.law_fit import Fit, Observation, check, fit
from moezoo_train.plan.laws import LAWS, PUBLISHED, SparseLaw, as_json


class Ended(NamedTuple):
    """What a law needs of a run.

    Attributes:
        name: its directory.
        finished: whether it has ended as planned.
        tokens: trained on.
        loss: at its last validation, in nats per token.
    """

    name: str
    finished: bool
    tokens: int
    loss: float | None


def fit_laws(which: str, runs: Sequence[Ended]) -> tuple[list[Observation], list[Fit]]:
    """Fit scaling laws to runs.

    Args:
        which: ``average``, ``sparse`` or ``all``, which is as many of both as the runs allow.
        runs: what they came to.

    Raises:
        InputError: a run cannot be part of it, or there are too few or too much alike.
    """
    check_choice("law", which, [*LAWS, "all"])
    found = [_observe(run) for run in runs]
    if which != "all":
        return found, [fit(found, which)]
    check(found, "average")  # of the two it asks for less
    fits = [fit(found, "average")]
    try:
        check(found, "sparse")
    except InputError:
        return found, fits
    return found, [*fits, fit(found, "sparse")]


def _observe(run: Ended) -> Observation:
    if not run.finished or run.loss is None:
        raise InputError(
            f"runs: {run.name} has not ended with a validation, which laws are fitted to; leave it "
            "out, or finish it"
        )
    path = Path(run.name) / "model" / "config.json"
    try:
        config = our_config(json.loads(path.read_text(encoding="utf-8")))
        with torch.device("meta"):
            model = MoezooForCausalLM(config)
    except (OSError, ValueError) as error:
        raise InputError(
            f"runs: {path} is no model of this library, whose parameters laws count; leave the run "
            "out"
        ) from error
    mean, final = count_weights(f"runs: {run.name}", model)
    return Observation(run.name, mean, final, float(run.tokens), run.loss)


def tables(
    observations: Sequence[Observation], fits: Sequence[Fit]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, head and rows: what the runs are to the laws, then each law."""
    head = ["run", "N, mean", "N, final", "S", "D", "loss"]
    head += [f"{one.law.name}, left out" for one in fits]
    rows = [
        [
            run.name,
            count(round(run.mean.value)),
            count(round(run.final.value)),
            f"{run.final.sparsity:.3f}",
            count(round(run.tokens)),
            f"{run.loss:.3f}",
            *(f"{100 * one.left_out[place]:+.2f} %" for one in fits),
        ]
        for place, run in enumerate(observations)
    ]
    yield "Laws: losses as predicted by a law fitted to all other runs", head, rows
    for one in fits:
        published = [each for each in PUBLISHED if type(each.law) is type(one.law)]
        names = list(asdict(one.law))
        head = ["", "fitted here", *(f"published ({each.source})" for each in published)]
        columns = [asdict(law) for law in (one.law, *(each.law for each in published))]
        rows = [[name, *(f"{column[name]:.4g}" for column in columns)] for name in names]
        yield one.law.form, head, rows


def results(observations: Sequence[Observation], fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """Return the laws as JSON has them, each with the runs that it was fitted to."""
    found = []
    for one in fits:
        sparse = isinstance(one.law, SparseLaw)
        runs = [
            {
                "name": run.name,
                "parameters": run.final.value if sparse else run.mean.value,
                "sparsity": run.final.sparsity,
                "tokens": run.tokens,
                "loss": run.loss,
                "error": one.errors[place],
                "error_left_out": one.left_out[place],
            }
            for place, run in enumerate(observations)
        ]
        found.append({**as_json(one.law, one.reach), "runs": runs})
    return found
