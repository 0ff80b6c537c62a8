"""`moezoo adopt`: what `moezoo.adopt` would do with the model of a directory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

from moezoo.bench.timing import interleave
from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_choice, check_int, nearest
from moezoo.layers.sparse_moe import SparseMoE
from moezoo_models.adapters.transformers import experts_backend
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.holding import Held
from moezoo_models.adopt.reading import entry_of, hold, mixtures_of
from moezoo_models.adopt.trial import Difference, fingerprint, small_copy, try_out
from moezoo_models.devices import pick_device
from moezoo_models.files.gate import told
from moezoo_models.files.model_files import existing, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = 64 << 20
_RUNS, _BUDGET = 7, 5.0
_FLAGS = (
    "bias",
    "shared_bias",
    "shared_gate",
    "interleaved",
    "d_latent",
    "num_identity_experts",
    "num_skip_experts",
)


class Row(NamedTuple):
    """The blocks of a model that are alike.

    Attributes:
        names: of the blocks.
        convention: of their router.
        options: of the layer, those that are not its defaults.
        difference: between both computations on random tokens.
        seconds: of a forward pass: the layer's, and the block's own.
        width: hidden neurons per expert that were timed, where the model's own are too many.
    """

    names: list[str]
    convention: str
    options: str
    difference: Difference
    seconds: tuple[float, float]
    width: int | None


def report_adoption(
    directory: str | Path,
    report: bool = True,
    tokens: int = 256,
    device: str = "auto",
    dtype: str = "float32",
) -> list[Row]:
    """Print which layers would compute a model's mixture blocks, how exactly and how fast.

    Adoption itself is a line of Python, `moezoo.adopt(model)`: the model's weights and files stay
    what they are, so there is nothing that a command could write. This command reads config.json
    alone. For each kind of block it prints the convention of the router, the options of the
    SparseMoE, the largest difference of output and gradients on random tokens at random weights,
    and how many times as fast a forward pass is as transformers' own. A model that cannot be
    adopted is refused here with the same line.

    Args:
        directory: of a model of transformers; weights are not read and need not be there.
        report: print the report, which is all that this command does.
        tokens: of the forward passes that are timed.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.
        dtype: of the forward passes that are timed: float32, bfloat16 or float16.

    Returns:
        The kinds of blocks, as they are printed.

    Raises:
        InputError: the directory has no configuration that transformers knows; the model has no
            mixture block, or one that cannot be held exactly; an option is out of range.
    """
    check_int("tokens", tokens)
    check_choice("dtype", dtype, tuple(DTYPES))
    if not report:
        raise InputError("report: it is all that this command does; leave the option out")
    place = pick_device(device)
    model = _on_meta(Path(directory))
    kinds: dict[str, tuple[Held, list[str]]] = {}
    for name, block in mixtures_of(model).items():
        key = fingerprint(block)
        if key not in kinds:
            kinds[key] = (hold(block, entry_of(block, name), name), [])
        kinds[key][1].append(name)
    rows = [_row(held, names, tokens, place, DTYPES[dtype]) for held, names in kinds.values()]
    _print(str(directory), rows, f"{tokens:,} tokens on {place}, {dtype}")
    return rows


def _on_meta(directory: Path) -> nn.Module:
    """Build the model of a directory without its weights."""
    file = existing(directory) / "config.json"
    raw = read_json(file)
    kind = str(raw.get("model_type"))
    with told(file):
        if kind not in CONFIG_MAPPING:
            raise InputError(
                f"model_type: '{kind}' is not one of transformers {transformers.__version__}"
                f"{nearest(kind, list(CONFIG_MAPPING))}"
            )
        config = CONFIG_MAPPING[kind].from_dict(raw)
        with torch.device("meta"):
            model = _model_of(config)
    return model.eval()


def _model_of(config: Any) -> nn.Module:
    """Build the model of a configuration, or what the configuration names where there is no base.

    Models of several parts, such as Qwen3-Omni, have none: transformers has them whole only.
    """
    if type(config) in MODEL_MAPPING:
        base: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
        return base
    named = [name for name in config.architectures or () if hasattr(transformers, name)]
    if not named:
        raise InputError(
            f"architectures: transformers {transformers.__version__} has no base model of "
            f"{type(config).__name__}, and none of {config.architectures or []}; name its class"
        )
    whole: nn.Module = getattr(transformers, named[0])(config)
    return whole


def _row(
    held: Held, names: list[str], tokens: int, device: torch.device, dtype: torch.dtype
) -> Row:
    difference = try_out(held, names[0])
    layer = held.layer
    most = max(16, _WEIGHTS // (3 * layer.num_experts * layer.d_model) // 16 * 16)
    width = most if most < layer.d_expert else None
    backend = experts_backend(held.block)
    copy = small_copy(held, dtype, most, backend).to(device)
    seconds = _seconds(hold(copy, held.entry, names[0]), tokens)
    title = CONVENTIONS[held.entry.convention].title
    return Row(names, title, _options(layer), difference, seconds, width)


@torch.no_grad()
def _seconds(held: Held, tokens: int) -> tuple[float, float]:
    """Time a forward pass of a layer and of the block that it is bound to."""
    like = next(held.block.parameters())
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, tokens, held.layer.d_model, generator=generator).to(like)
    calls = {"ours": lambda: held.try_out(hidden), "theirs": lambda: held.theirs(hidden)}
    times = interleave(calls, like.device, _RUNS, _BUDGET, "ours")
    return times["ours"].median, times["theirs"].median


def _options(layer: SparseMoE) -> str:
    """Write the options of a layer that are not its defaults."""
    shared = f" + {layer.d_shared} shared" if layer.d_shared else ""
    parts = [f"{layer.num_experts} experts of {layer.d_expert}{shared}, top {layer.top_k}"]
    parts.append(layer.activation)
    for name in _FLAGS:
        if value := getattr(layer, name):
            parts.append(name if value is True else f"{name} {value}")
    for name in ("glu", "shared_glu", "expert_norms"):
        if (bounds := getattr(layer, name)) is not None:
            parts += _told(name, bounds)
    if layer.needs_token_ids:
        rows = len(layer.gate.get_buffer("table"))
        parts.append(f"chosen by a table of {rows} token ids")
    if layer.capacity is not None:
        parts += _told("capacity", layer.capacity)
    for field in dataclasses.fields(layer.router):
        value = getattr(layer.router, field.name)
        if value != field.default:
            parts += _told(field.name, value)
    return ", ".join(parts)


def _told(name: str, value: Any) -> list[str]:
    """Write an option, or those of a group that are not its defaults."""
    if not dataclasses.is_dataclass(value):
        return [f"{name} {str(value).lower()}"]
    fields = dataclasses.fields(value)
    found = {field.name: getattr(value, field.name) for field in fields}
    changed = {field.name for field in fields if found[field.name] != field.default}
    return [f"{name}.{key} {str(found[key]).lower()}" for key in found if key in changed]


def _print(title: str, rows: Sequence[Row], how: str) -> None:
    columns = ["blocks", "convention", "options of SparseMoE", ">output", ">gradient", ">ms"]
    columns += [">theirs, ms", ">speed"]
    cells = []
    for row in rows:
        ours, theirs = row.seconds
        narrow = "" if row.width is None else f" (timed with {row.width} hidden neurons)"
        cells.append(
            [
                in_short(row.names),
                row.convention,
                row.options + narrow,
                f"{row.difference.output:.0e}",
                f"{row.difference.gradient:.0e}",
                f"{1e3 * ours:.3g}",
                f"{1e3 * theirs:.3g}",
                f"{theirs / ours:.2f}x",
            ]
        )
    print_table(f"{title}: transformers {transformers.__version__}, {how}", columns, cells)


def in_short(names: Sequence[str]) -> str:
    """Write names that differ in a number as one: ``layers.0-3.mlp``, ``layers.1+3.mlp``."""
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [i for i, found in enumerate(zip(*parts, strict=False)) if len(set(found)) > 1]
    if len({len(part) for part in parts}) > 1 or len(varying) != 1:
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    (place,) = varying
    numbers = sorted(int(part[place]) for part in parts)
    runs = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        runs.append(f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0]))
    return "".join([*parts[0][:place], "+".join(runs), *parts[0][place + 1 :]])
