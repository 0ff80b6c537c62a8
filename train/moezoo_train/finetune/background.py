"""``moezoo inspect background``: in how many batches of other text each row of a table is read.

Sparse memory finetuning (arXiv:2510.15103) leaves rows alone that much other text reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from rich.progress import MofNCompleteColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import check_file
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.devices import pick_device
from moezoo_models.progress import progress_bar
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.windows import IGNORE_INDEX, TrainBatches
from moezoo_train.finetune.lora import weights_hash
from moezoo_train.finetune.pretrained import check_tokenizer
from moezoo_train.finetune.slot_counts import SlotCounter, memory_tables

FORMAT = "moezoo background 1"


@dataclass(frozen=True)
class Background:
    """The rows of a model's tables that other text reads.

    Attributes:
        frequency: by table, ``(N,)`` int64: in how many batches each row is read.
        batches: number of batches.
        sequence_length: tokens of a window.
        batch_size: windows of a batch.
        weights: hash of the model's weights.
    """

    frequency: dict[str, Tensor]
    batches: int
    sequence_length: int
    batch_size: int
    weights: str

    def save(self, path: Path) -> None:
        """Write a safetensors file: a tensor per table, and the rest as metadata."""
        facts = {
            "format": FORMAT,
            "batches": str(self.batches),
            "sequence_length": str(self.sequence_length),
            "batch_size": str(self.batch_size),
            "weights": self.weights,
        }
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(self.frequency, facts))

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel | None = None) -> Background:
        """Read a file of :meth:`save`.

        Args:
            path: the file.
            model: which it has to be of.

        Raises:
            InputError: there is no such file, or it is another kind of file or of other weights.
        """
        field = "sparse_memory.background"
        if not path.is_file():
            raise InputError(f"{field}: there is no file {path}; run `moezoo inspect background`")
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                # Handles give tensors that go with the file; copies stay.
                frequency = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{field}: {path} is damaged ({error}); make it again") from error
        if facts.get("format") != FORMAT:
            raise InputError(f"{field}: {path} is not by `moezoo inspect background`; name another")
        if model is not None and facts["weights"] != weights_hash(model):
            raise InputError(
                f"{field}: {path} was counted with other weights than the run begins with; run "
                "`moezoo inspect background` on the directory in initialize_from"
            )
        sizes = {name: int(facts[name]) for name in ("batches", "sequence_length", "batch_size")}
        return cls(frequency, weights=facts["weights"], **sizes)


def inspect_background(
    checkpoint: str | Path,
    data_dir: str | Path = "runs/data",
    output: str | Path = "runs/background.safetensors",
    batches: int = 1000,
    sequence_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
) -> Background:
    """Count in how many batches of a text each row of a checkpoint's tables is read.

    For sparse memory finetuning: rows that other text reads in few batches may be trained. The
    batches should be as large as those of the run to come, as larger ones read more rows.

    Args:
        checkpoint: directory of a model with MemoryPlus, ProductKeyMemory or PEER.
        data_dir: text to keep, as `moezoo prepare --tokenizer CHECKPOINT` leaves it.
        output: safetensors file that the counts are written to.
        batches: number of batches, drawn without repetition as long as the text lasts.
        sequence_length: tokens of a window.
        batch_size: windows of a batch.
        seed: chooses the batches.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.

    Returns:
        What is written.

    Raises:
        InputError: the checkpoint has no such layer, the text is too short or prepared with
            another tokenizer, or an option is out of range.
    """
    check_int("batches", batches)
    check_file(output)
    target = pick_device(device)
    model, _ = load_as_it_is(checkpoint)
    prepared = PreparedData.load(data_dir)
    check_tokenizer(str(checkpoint), load_tokenizer(prepared.tokenizer_directory))
    windows = TrainBatches(
        prepared.tokens("train"),
        sequence_length,
        batch_size,
        seed=seed,
        vocab_size=model.config.vocab_size,
    )
    # In fp32, as fit will train it: the weights' hash is of these numbers.
    background = count_background(model.float().to(target), windows, batches)
    background.save(Path(output))
    _print(background, str(checkpoint))
    print(f"written to {output}")
    return background


@torch.no_grad()
def count_background(model: PreTrainedModel, windows: TrainBatches, batches: int) -> Background:
    """Count with a model in memory; see :func:`inspect_background`.

    Args:
        model: in evaluation mode, on any device, in fp32.
        windows: the text.
        batches: how many of them to read.

    Raises:
        InputError: the model has no table.
    """
    tables = memory_tables(model)
    if not tables:
        raise InputError(
            "checkpoint: the model has no table of values; give one with MemoryPlus, "
            "ProductKeyMemory or PEER"
        )
    counter = SlotCounter(tables)
    frequency = {name: torch.zeros_like(counts) for name, counts in counter.counts.items()}
    counter.attach()
    try:
        with progress_bar(MofNCompleteColumn()) as bar:
            for number in bar.track(range(batches), description="reading"):
                batch = windows[number]
                counter.start(batch["labels"].to(model.device) != IGNORE_INDEX)
                model.get_decoder()(input_ids=batch["input_ids"].to(model.device), use_cache=False)
                for name, counts_N in counter.counts.items():
                    frequency[name] += counts_N > 0
                counter.reset()
    finally:
        counter.detach()
    return Background(
        {name: frequency_N.cpu() for name, frequency_N in frequency.items()},
        batches,
        windows.sequence_length,
        windows.batch_size,
        weights_hash(model),
    )


def _print(background: Background, checkpoint: str) -> None:
    columns = ["table", ">rows", ">in no batch", ">in half or more", ">in all"]
    rows = []
    for name, frequency_N in background.frequency.items():
        share_N = frequency_N.double() / background.batches
        shares = [(share_N == 0), (share_N >= 0.5), (share_N == 1)]
        rows.append([name, f"{len(share_N):,}", *(f"{s.double().mean():.2%}" for s in shares)])
    size = f"{background.batch_size} × {background.sequence_length}"
    title = f"{checkpoint}: rows read by {background.batches:,} batches of {size} tokens"
    print_table(title, columns, rows)
