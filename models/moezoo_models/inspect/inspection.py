"""The frame of `moezoo inspect` commands: load a model and a text, check, and write findings.

A command takes ``checkpoint``, ``text``, ``output`` and its own options by name, and passes all
others on as ``**reading``. Its parser finds those in the signature and the docstring of
:func:`open_inspection`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.adopt import adopt
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.devices import pick_device
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.reading import read_text
from moezoo_models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's model, a text for it, and where the findings are written.

    Attributes:
        checkpoint: the directory that the model was loaded from.
        text: path of the text.
        output: directory of the findings, which exists.
        model: the model, on its device.
        tokenizer: with which the text was encoded.
        tokens: of the text.
        windows: ``sequence_length`` and ``batch_size``, for functions that measure a model.
    """

    checkpoint: str
    text: str
    output: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    tokens: Sequence[int]
    windows: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The end of a figure's title."""
        return f"{self.checkpoint}, {len(self.tokens):,} tokens"

    @property
    def title(self) -> str:
        """The beginning of a table's title."""
        return f"{self.checkpoint}: {len(self.tokens):,} tokens"

    def write(
        self,
        name: str,
        report: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        figures: Mapping[str, Figure],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Write ``name``.json, .csv and .safetensors, and PNGs; print which files are where.

        Args:
            name: of the files.
            report: for the JSON file, after the checkpoint, the text and its number of tokens.
            rows: of the CSV file; one may lack columns that another has.
            figures: by the names of their files, without ending.
            tensors: by name, on the CPU.

        Raises:
            InputError: the files cannot be written.
        """
        head = {"checkpoint": self.checkpoint, "text": self.text, "tokens": len(self.tokens)}
        with writing(self.output):
            for stem, figure in figures.items():
                picture = io.BytesIO()
                figure.savefig(picture, format="png")
                with atomic_write(self.output / f"{stem}.png") as file:
                    file.write(picture.getvalue())
            with atomic_write(self.output / f"{name}.safetensors") as file:
                file.write(safetensors.torch.save(dict(tensors)))
            with atomic_write(self.output / f"{name}.csv", "w") as file:
                columns = dict.fromkeys(column for row in rows for column in row)
                writer = csv.DictWriter(file, list(columns), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            with atomic_write(self.output / f"{name}.json", "w") as file:
                json.dump({**head, **report}, file, indent=2, ensure_ascii=False)
                file.write("\n")
        files = [f"{name}.json", f"{name}.csv", *(f"{stem}.png" for stem in figures)]
        print(f"{', '.join(files)} and {name}.safetensors are in {self.output}")


def open_inspection(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path,
    check: Callable[[Any], object],
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    attention: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
) -> Inspection:
    """Load a model and a text, and make the output directory before anything is computed.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        check: raises :class:`InputError` if the model has nothing to inspect.
        sequence_length: tokens that the model sees at once; default: what it was trained on, or
            if its checkpoint does not say, its max_position_embeddings; at most 2048.
        batch_size: windows computed at once.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers.
        tokenizer: directory of the tokenizer; default: the checkpoint's own.
        dtype: of the weights: float32, bfloat16, float16, or auto: as saved, but float32 on a CPU
            that is slow in that.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or does
            not pass the check; the output cannot be written.
    """
    content = read_text(Path(text))
    place = pick_device(device)
    model, words = load_any_with_tokenizer(checkpoint, tokenizer, place, attention, dtype)
    if not isinstance(model, MoezooForCausalLM):
        adopt(model)
    check(model)
    directory = Path(output)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    windows = {"sequence_length": sequence_length, "batch_size": batch_size}
    tokens = encode_text(words, content)
    return Inspection(str(checkpoint), str(text), directory, model, words, tokens, windows)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an error of the system into one line that names the output directory."""
    try:
        yield
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise InputError(
            f"output: {directory} cannot be written: {(error.strerror or str(error)).lower()}; "
            "free space or give another directory"
        ) from error
