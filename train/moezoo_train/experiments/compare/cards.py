"""Model cards from a finished comparison: one page per method, measured figures only.

Run as ``python -m moezoo_train.experiments.compare.cards COMPARISON DIRECTORY``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo.feed_forward import Method, zoo
from moezoo_train.measure.writing import write_text


def write_cards(comparison: Path, directory: Path) -> list[Path]:
    """Write a card for every method of the zoo that a comparison trained.

    Args:
        comparison: the folder that `moezoo compare` wrote.
        directory: where the cards go.

    Raises:
        InputError: the folder holds no finished comparison.
    """
    try:
        whole = json.loads((comparison / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"comparison: {comparison} holds no results.json: {error}; name the output of moezoo "
            "compare"
        ) from error
    methods = {method.name: method for method in zoo()}
    rows = {row["name"]: row for row in whole["rows"] if row["loss"] is not None}
    baseline = rows.get(whole["experiment"]["baseline"])
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, row in rows.items():
        if name in methods:
            written.append(directory / f"{name}.md")
            write_text(written[-1], card(methods[name], row, baseline, whole))
    return written


def card(
    method: Method, row: Mapping[str, Any], baseline: Mapping[str, Any] | None, whole: Any
) -> str:
    """Write one card."""
    paper, experiment = method.paper, whole["experiment"]
    first = next(run for run in whole["runs"] if run["run"] == f"{method.name}-{run_seed(whole)}")
    blocks = ", ".join(map(str, row["layers"]))
    lines = [
        f"# {method.name}",
        "",
        f"`moezoo.{row['layer']}`, after {paper.authors} {paper.year}, *{paper.title}* "
        f"(arXiv:{paper.arxiv}), in blocks {blocks} of {experiment['model']['num_layers']}; "
        f"the others are those of `{experiment['baseline']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {row['total_parameters']:,} |",
        f"| active per token | {row['active_parameters']:,} |",
        f"| active FLOPs of the layer ÷ {experiment['baseline']} | {row['flops_ratio']:.3f} |",
        f"| validation loss | {_value(row['loss'])} nats per token |",
        f"| bits per byte | {_value(row['bits_per_byte'])} |",
        f"| training loss | {first['train_loss']:.3f} |",
    ]
    optional = {
        "the same with random routing": row["random_loss"] and _value(row["random_loss"]),
        f"{experiment['baseline']}, same tokens": baseline and _value(baseline["loss"]),
        "normalized load entropy (1 is uniform)": _number(first["evenness"]),
        "largest load ÷ mean (1 + MaxVio)": _number(first["busiest"]),
        "slots used in a batch": _number(first["usage"]),
        "KL to uniform (nats)": _number(first["unevenness"]),
    }
    lines += [f"| {what} | {value} |" for what, value in optional.items() if value]
    lines += ["", *whole["notes"][:2], "", "Made again by:", "", "```sh"]
    lines += [
        f'moezoo compare --config configs/experiments/compare/zoo.yaml --only "[{method.name}]"',
        "```",
    ]
    arguments = json.dumps(first["identity"]["ffn"]["init_args"], indent=2)
    lines += ["", "The layer's arguments, its width solved for equal FLOPs:", ""]
    lines += ["```json", arguments, "```"]
    if read := first["identity"].get("router_input"):
        lines += ["", f"Its router reads [`{read}`](../../docs/router_input.md)."]
    if not row["causal"]:
        lines += ["", "Not causal: its loss compares with no other, and it cannot generate."]
    if row["gain"] is not None and row["gain"]["value"] <= 0:
        lines += ["", "At this size it was not better than its own random routing."]
    lines += ["", "One small model after a short training: no more than a first impression."]
    return "\n".join(lines) + "\n"


def run_seed(whole: Any) -> int:
    """Return the first seed of a comparison."""
    return int(whole["experiment"]["seeds"][0])


def _value(mean: Mapping[str, Any]) -> str:
    error = "" if mean["error"] is None else f" ± {mean['error']:.3f}"
    return f"{mean['value']:.3f}{error}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m moezoo_train.experiments.compare.cards COMPARISON DIRECTORY")
    for path in write_cards(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
