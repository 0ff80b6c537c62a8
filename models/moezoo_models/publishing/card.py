"""The page of a model on the Hub, of what its directory says: sizes, layers, figures, how to load.

Nothing is measured for it. Figures are those of the report of a run, or of a conversion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moezoo_models.checkpoints.companions import is_license
from moezoo_models.conversion.checkpoint import REPORT
from moezoo_models.files.model_files import CONFIG, TensorInfo, read_json
from moezoo_models.model.config import MoezooConfig

RUN_REPORT = "report.json"
"""What `moezoo fit` writes beside `model/`."""

_LICENSES = {
    "apache-2.0": ("apache license", "version 2.0"),
    "mit": ("mit license",),
}
_FIGURES = {
    "val_loss": ("validation loss", "{:.3f} nats per token"),
    "val_bits_per_byte": ("bits per byte", "{:.3f}"),
    "val_perplexity": ("validation perplexity", "{:.1f}"),
    "train_loss": ("training loss", "{:.3f} nats per token"),
    "tokens": ("training tokens", "{:,}"),
    "active_parameters": ("active parameters per token", "{:,}"),
}


def card(directory: Path, name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """Return a model card, Markdown behind a YAML head.

    Args:
        directory: of the model.
        name: of the model on the Hub, ``ORG/NAME``.
        tensors: what the headers of its weights say.
    """
    raw = read_json(directory / CONFIG)
    ours = raw.get("model_type") == MoezooConfig.model_type
    head = {
        "library_name": "transformers" if not ours or "auto_map" in raw else "moezoo",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["moezoo", str(raw.get("model_type"))])),
        **_license(directory),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {name.rpartition('/')[2]}", "", _what(raw, ours), "", "| | |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in _sizes(raw, tensors)]
    if figures := list(_figures(directory)):
        lines += ["", "## Figures", "", "| | |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in figures]
    return "\n".join([*lines, "", "## Use", "", "```python", *_use(raw, ours, name), "```", ""])


def _license(directory: Path) -> dict[str, str]:
    """Name a licence that is known by its text; ``other`` for another one, nothing for none."""
    files = [each for each in sorted(directory.iterdir()) if is_license(each.name)]
    files = [each for each in files if each.name.lower().startswith(("licen", "copying"))]
    if not files:
        return {}
    text = " ".join(files[0].read_text(encoding="utf-8", errors="replace").lower().split())
    found = (name for name, words in _LICENSES.items() if all(word in text for word in words))
    return {"license": next(found, "other")}


def _what(raw: Mapping[str, Any], ours: bool) -> str:
    if not ours:
        return f"A `{raw.get('model_type')}`, as transformers has it, written by moezoo."
    kinds = [str(rule["class_path"]) for rule in raw.get("ffn", [])]
    blocks = ", ".join(f"`{kind}`" for kind in dict.fromkeys(kinds))
    return f"A decoder of moezoo, whose feed-forward blocks are {blocks or '`moezoo.DenseFFN`'}."


def _sizes(raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{sum(info.numel for info in tensors.values()):,}"
    fields = {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "vocab_size": "tokens in the vocabulary",
        "max_position_embeddings": "longest text in tokens",
    }
    for field, what in fields.items():
        if isinstance(raw.get(field), int):
            yield what, f"{raw[field]:,}"
    yield "dtype", ", ".join(sorted({info.kind for info in tensors.values()}))


def _figures(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield what a run or a conversion has measured, where their reports are there."""
    run = _report(directory.resolve().parent / RUN_REPORT) if directory.name == "model" else {}
    for key, (what, how) in _FIGURES.items():
        if isinstance(run.get(key), int | float):
            yield what, how.format(run[key])
    made = _report(directory / REPORT)
    if not made:
        return
    yield "made by", f"`moezoo {made.get('method')}`"
    extra = made.get("extra")
    within = extra.get("perplexity") if isinstance(extra, Mapping) else None
    found = made.get("perplexity") or within or {}
    for which in ("dense", "carved", "sparse", "loaded"):
        if isinstance(found.get(which), int | float):
            yield f"perplexity on held-out tokens, {which}", f"{found[which]:.4g}"
    drift = made.get("drift")
    if isinstance(drift, Mapping) and isinstance(drift.get("relative"), int | float):
        yield f"difference from the dense model ({drift.get('of')})", f"{drift['relative']:.1e}"


def _report(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _use(raw: Mapping[str, Any], ours: bool, name: str) -> list[str]:
    with_code = ours and "auto_map" in raw
    option = ", trust_remote_code=True" if with_code else ""
    lines = ["from transformers import AutoModelForCausalLM"]
    if ours and not with_code:
        lines += ["", "import moezoo_models  # pip install 'moezoo[train]'"]
    return [*lines, "", f'model = AutoModelForCausalLM.from_pretrained("{name}"{option})']
