"""Measuring how well a model predicts a text, or answers the tasks of a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import check_file
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.devices import pick_device
from moezoo_models.evaluation.tasks import Questions, TaskEvaluation, evaluate_questions
from moezoo_models.model.config import check_trained_length
from moezoo_models.model.decoder import check_token_ids
from moezoo_models.text.corpus import announced_encoding
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import Tokenizer

_LONGEST_DEFAULT = 2048


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy in nats per token.
        perplexity: ``exp(loss)``.
        bits_per_byte: total cross-entropy in bits over the bytes of the text in UTF-8, which
            compares models with different tokenizers.
        tokens: number of tokens, each of which was predicted once.
        bytes: length of the text in bytes.
        sequence_length: tokens that the model saw at once.
        stride: tokens by which the window moved.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    sequence_length: int
    stride: int

    def table(self) -> str:
        """Lay the figures out for reading."""
        rows = (
            ("loss (nats/token)", f"{self.loss:.4f}"),
            ("perplexity", f"{self.perplexity:,.3f}"),
            ("bits per byte", f"{self.bits_per_byte:.4f}"),
            ("tokens", f"{self.tokens:,}"),
            ("bytes", f"{self.bytes:,}"),
            ("window, stride (tokens)", f"{self.sequence_length:,}, {self.stride:,}"),
        )
        return "\n".join(f"{name:<24}{value:>14}" for name, value in rows)


def evaluate(
    checkpoint: str | Path,
    text: str | Path | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    attention: str | None = None,
    tokenizer: str | Path | None = None,
    tasks: str | None = None,
    task_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    output: str | Path | None = None,
) -> Evaluation | TaskEvaluation:
    """Print how well a checkpoint's model predicts a text file, or answers lm-eval's tasks.

    Of a text: loss, perplexity and bits per byte. A window of ``sequence_length`` tokens moves over
    the text by ``stride``. Each token is predicted once: in the first window all of them, later
    those that are new in the window, so that every one has at least ``sequence_length - stride``
    tokens before it, or all there are. The first token is predicted from the token that begins
    texts, or the one that ends them.

    Of tasks: what lm-evaluation-harness measures, with its prompts and its metrics.

    Args:
        checkpoint: directory of a checkpoint: ours, or one that moezoo upcycle or
            carve read or write.
        text: path of a text file in UTF-8.
        sequence_length: tokens that the model sees at once; default: what it was trained on, or
            if its checkpoint does not say, its max_position_embeddings; at most 2048.
        stride: of a text, tokens by which the window moves; default: half of sequence_length.
            Smaller is slower and gives each token more context.
        batch_size: windows, or a task's questions, computed at once.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers.
        tokenizer: directory of the tokenizer; default: the checkpoint's own.
        tasks: in place of a text, names of lm-eval's tasks, groups or tags, separated by commas.
        task_path: of tasks, a directory of YAML files that define your own.
        limit: of tasks, take that many documents of each, to try things out.
        num_fewshot: of tasks, solved examples before each question; default: as each task says.
        output: JSON file that the figures are written to; default: runs/evaluate/tasks.json for
            tasks, and none for a text.

    Returns:
        The figures that are printed.

    Raises:
        InputError: the file is missing, empty or binary; a task does not exist; the checkpoint can
            not be loaded; an option is out of range; a token id is outside the model's vocabulary.
        ModuleNotFoundError: there are tasks, and lm-eval is not installed.
    """
    if (text is None) == (tasks is None):
        raise InputError("text: give either a file, --text FILE, or tasks, --tasks NAME,NAME")
    if output is None and tasks is not None:
        output = "runs/evaluate/tasks.json"
    if output is not None:
        check_file(output)
    check_int("batch_size", batch_size)
    if text is not None:
        _refuse("tasks", task_path=task_path, limit=limit, num_fewshot=num_fewshot)
        content = read_text(Path(text))
        model, words = load_any_with_tokenizer(
            checkpoint, tokenizer, pick_device(device), attention
        )
        result = evaluate_text(
            model,
            words,
            content,
            sequence_length=sequence_length,
            stride=stride,
            batch_size=batch_size,
        )
        print(result.table())
        if output is not None:
            what = {"checkpoint": str(checkpoint), "text": str(text)}
            _write_json(Path(output), {**what, **asdict(result)})
        return result

    _refuse("text", stride=stride)
    # Before the weights are read, as that takes long and tasks are where users err.
    questions = Questions.find(str(tasks).split(","), task_path, limit, num_fewshot)
    model, words = load_any_with_tokenizer(checkpoint, tokenizer, pick_device(device), attention)
    answered = evaluate_questions(
        model, words, questions, sequence_length=sequence_length, batch_size=batch_size
    )
    print(answered.table())
    assert output is not None
    file = Path(output)
    _write_json(file, {"checkpoint": str(checkpoint), **answered.report})
    print(f"written to {file}")
    return answered


def _refuse(of: str, **options: object) -> None:
    """Refuse options that only the other kind of evaluation has."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}: it is for --{of} only; leave it out, or give --{of}")


def _write_json(file: Path, report: Mapping[str, Any]) -> None:
    try:
        with atomic_write(file, "w") as stream:
            json.dump(report, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"output: {file} cannot be written: {reason}; give another file"
        ) from error


def read_text(file: Path) -> str:
    """Read a file that must be text, all of it but a byte order mark.

    Raises:
        InputError: it is missing, empty, or not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"text: {file} cannot be read: {error.strerror}; give a text file"
        ) from error
    if not content:
        raise InputError(f"text: {file} is empty; give a file with text in it")
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = announced_encoding(content) or f"byte {error.start}"
        raise InputError(
            f"text: {file} is not UTF-8 text ({problem}); give a text file in UTF-8"
        ) from error
    if "\0" in decoded:
        raise InputError(f"text: {file} is binary: it holds zero bytes; give a text file")
    return decoded


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluate a model in memory on a text; see :func:`evaluate`.

    Raises:
        InputError: the text is empty, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return evaluate_tokens(
        model,
        encode_text(tokenizer, text),
        start_token=start,
        num_bytes=len(text.encode("utf-8")),
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
    )


@torch.no_grad()
def evaluate_tokens(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    start_token: int,
    num_bytes: int,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluate a model in memory on tokens; see :func:`evaluate`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: the text's tokens.
        start_token: stands before the first.
        num_bytes: length of the text in UTF-8.
        sequence_length: as for :func:`evaluate`.
        stride: as there.
        batch_size: as there.

    Raises:
        InputError: there are no tokens, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    stream = torch.cat([torch.tensor([start_token]), torch.as_tensor(tokens).long().cpu()])
    num_tokens = len(stream) - 1
    if not num_tokens:
        raise InputError("text: it has no tokens; give a text that is not empty")
    check_token_ids(stream, model.config.vocab_size)
    length = window_length(model, sequence_length)
    step = max(length // 2, 1) if stride is None else check_int("stride", stride, maximum=length)
    check_int("batch_size", batch_size)

    windows = _windows(num_tokens, length, step)
    was_training = model.training
    model.eval()
    try:
        batches = (windows[i : i + batch_size] for i in range(0, len(windows), batch_size))
        nats = math.fsum(loss for batch in batches for loss in _losses(model, stream, batch))
    finally:
        model.train(was_training)
    check_loss(nats)
    loss = nats / num_tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens=num_tokens,
        bytes=num_bytes,
        sequence_length=length,
        stride=step,
    )


def check_loss(nats: float) -> None:
    """Refuse a loss that is no number, which no perplexity follows from.

    Raises:
        InputError: it is NaN or infinite.
    """
    if not math.isfinite(nats):
        raise InputError(
            "checkpoint: the model's loss is not a finite number: its weights are too large for "
            "their dtype, or damaged; give another checkpoint"
        )


def window_length(model: PreTrainedModel, sequence_length: int | None) -> int:
    """Return the tokens that a model sees at once: as asked, or what it was trained on.

    Where that is not known, what it is made for. The default is at most 2048.

    Raises:
        InputError: the length asked for is out of range or more than the model is made for, or
            its configuration's ``trained_length`` is.
    """
    longest = model.config.max_position_embeddings
    if sequence_length is None:
        trained = check_trained_length(getattr(model.config, "trained_length", None), longest)
        return min(trained or longest, _LONGEST_DEFAULT)
    if check_int("sequence_length", sequence_length) > longest:
        raise InputError(
            f"sequence_length: {sequence_length:,} is more than the {longest:,} tokens that the "
            f"model is made for (max_position_embeddings); give at most {longest}"
        )
    return sequence_length


Window = tuple[int, int, int]
"""First position of the input, one past its last, and the first position that counts."""


def _windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Cover the positions 0 … num_tokens - 1, each counting once, by windows of one length."""
    end = min(length, num_tokens)
    windows = [(0, end, 0)]
    while end < num_tokens:
        counted, end = end, min(end + stride, num_tokens)
        windows.append((end - length, end, counted))
    return windows


def _losses(model: PreTrainedModel, stream: Tensor, windows: list[Window]) -> list[float]:
    """Give the nats of each window's positions that count; logits are made for those only."""
    inputs = torch.stack([stream[begin:end] for begin, end, _ in windows]).to(model.device)
    whole: Any = model
    hidden = whole.model(input_ids=inputs, use_cache=False).last_hidden_state
    losses = []
    for row, (begin, end, counted) in zip(hidden, windows, strict=True):
        logits = logits_of(model, row[counted - begin :])
        targets = stream[counted + 1 : end + 1].to(logits.device)
        nats = F.cross_entropy(logits, targets, reduction="none").double().sum()
        losses.append(float(nats))
    return losses


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn last hidden states ``(..., hidden_size)`` into logits ``(..., vocab_size)`` in fp32."""
    whole: Any = model
    scale = getattr(model.config, "logits_scaling", 1.0)  # Granite's
    logits: Tensor = whole.lm_head(hidden).float() / scale
    return logits
