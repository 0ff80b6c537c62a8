"""Measuring how well a model predicts a text, or answers the tasks of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.locks import check_file
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.devices import pick_device
from moezoo_models.evaluation.perplexity import Evaluation, evaluate_text
from moezoo_models.evaluation.tasks import Questions, TaskEvaluation, evaluate_questions
from moezoo_models.text.reading import read_text


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
    dtype: str = "auto",
    griffin: float | None = None,
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
        dtype: of the weights: float32, bfloat16, float16, or auto: as saved, but float32 on a CPU
            that is slow in that.
        griffin: of a text, share of each dense block's neurons that predict what is new in a
            window, those that the tokens before it used most (GRIFFIN, arXiv:2404.01365); in the
            first window the first half chooses for the second. Default: all of them.

    Returns:
        The figures that are printed.

    Raises:
        InputError: the file is missing, empty or binary; a task does not exist; the checkpoint
            cannot be loaded; an option is out of range; a token id is outside the model's
            vocabulary.
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
            checkpoint, tokenizer, pick_device(device), attention, dtype
        )
        result = evaluate_text(
            model,
            words,
            content,
            sequence_length=sequence_length,
            stride=stride,
            batch_size=batch_size,
            griffin=griffin,
        )
        print(result.table())
        if output is not None:
            what = {"checkpoint": str(checkpoint), "text": str(text)}
            _write_json(Path(output), {**what, **asdict(result)})
        return result

    _refuse("text", stride=stride, griffin=griffin)
    # Before the weights are read, as that takes long and tasks are where users err.
    questions = Questions.find(str(tasks).split(","), task_path, limit, num_fewshot)
    model, words = load_any_with_tokenizer(
        checkpoint, tokenizer, pick_device(device), attention, dtype
    )
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
