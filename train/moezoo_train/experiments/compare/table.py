"""The table of a comparison: its columns, its rows as text, and keys to sort them by."""

from __future__ import annotations

import csv
import io
from typing import Any

from moezoo.command.tables import count, markdown_lines
from moezoo_train.experiments.compare.results import Row

NOTHING = "–"
HELP = {
    "method": "row of the comparison",
    "blocks": "blocks of the model that have the method; the others have the baseline",
    "width": "what was solved for, so that the FLOPs are equal",
    ">val loss": "loss of the held-out documents, in nats per token",
    ">bits/byte": "the same per byte of text",
    ">random routing": "validation loss of the same model when routing ignores the token",
    ">random − own": "that loss less the method's own: the worth of routing by content",
    ">parameters": "of the model",
    ">active": "parameters that one token uses",
    ">FLOPs ÷ baseline": "active FLOPs of the layer over the baseline's",
    ">tokens/s": "speed of training, backward pass and optimizer included",
    ">evenness": "normalized load entropy on the held-out text; 1 is even",
    ">busiest ÷ mean": "largest load of an expert, slot or neuron over the mean: 1 + MaxVio",
    ">used": "share of them that any token of a batch was routed to",
    ">unevenness": "KL divergence of their total gate weights to uniform, in nats",
    ">peak memory": "on a GPU what torch held on it; on a CPU the process, Python included",
}
"""The meaning of each column; a name that starts with ``>`` is aligned to the right."""
COLUMNS = tuple(HELP)


def cells_of(row: Row, num_layers: int) -> list[str]:
    """Write a row's cells as text."""
    every = len(row.layers) == num_layers
    return [
        row.name if row.causal else f"{row.name} (not causal)",
        "all" if every else ", ".join(map(str, row.layers)),
        NOTHING if row.width is None else f"{row.width[0]} {row.width[1]}",
        "failed" if row.loss is None and row.failures else _text(row.loss),
        _text(row.bits_per_byte),
        _text(row.random_loss),
        NOTHING if row.gain is None else _signed(row.gain),
        NOTHING if row.total_parameters is None else count(row.total_parameters),
        NOTHING if row.active_parameters is None else count(row.active_parameters),
        f"{row.flops_ratio:.3f}",
        NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        NOTHING if row.evenness is None else f"{row.evenness:.2f}",
        NOTHING if row.busiest is None else f"{row.busiest:.1f}",
        NOTHING if row.usage is None else f"{100 * row.usage:.1f} %",
        NOTHING if row.unevenness is None else f"{row.unevenness:.2f}",
        NOTHING if row.peak_memory is None else f"{count(row.peak_memory)}B",
    ]


def _text(value: Any) -> str:
    return NOTHING if value is None else str(value)


def _signed(value: Any) -> str:
    text = str(value)
    return text.replace("-", "−") if value.value < 0 else f"+{text}"


def keys_of(row: Row, num_layers: int) -> list[str | float | None]:
    """Return what each of a row's cells is sorted by; None where there is nothing."""
    means = (row.loss, row.bits_per_byte, row.random_loss, row.gain)
    return [
        row.name,
        cells_of(row, num_layers)[1],
        None if row.width is None else f"{row.width[0]} {row.width[1]:09}",
        *(None if value is None else value.value for value in means),
        row.total_parameters,
        row.active_parameters,
        row.flops_ratio,
        row.tokens_per_second,
        row.evenness,
        row.busiest,
        row.usage,
        row.unevenness,
        row.peak_memory,
    ]


def markdown(title: str, cells: list[list[str]], notes: list[str]) -> str:
    """Write the table in Markdown."""
    lines = markdown_lines(COLUMNS, cells)
    return "\n".join([f"# {title}", "", *lines, "", *(f"{note}\n" for note in notes)])


def table_csv(rows: list[Row]) -> str:
    """Write the rows as numbers, one column each."""
    flat = [_flat(row) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "method": row.name,
        "layer": row.layer,
        "blocks": " ".join(map(str, row.layers)),
        "width": row.width[0] if row.width else "",
        "width_value": row.width[1] if row.width else "",
        "causal": row.causal,
    }
    for name in ("loss", "bits_per_byte", "random_loss", "gain"):
        value = getattr(row, name)
        numbers[name] = value.value if value else ""
        numbers[f"{name}_error"] = "" if value is None or value.error is None else value.error
    rest = (
        "total_parameters",
        "active_parameters",
        "flops_ratio",
        "tokens_per_second",
        "evenness",
        "busiest",
        "usage",
        "unevenness",
        "peak_memory",
    )
    numbers |= {name: getattr(row, name) for name in rest}
    return numbers | {"failures": "; ".join(row.failures)}
