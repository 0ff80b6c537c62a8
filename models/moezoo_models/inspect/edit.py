"""Editing what a model knows: the rows of one subject overwritten by those of another.

A row of a token table says all that its layer knows of a token, or an n-gram, whatever the context
(Sadhukhan et al. 2026, arXiv:2601.10639, section 4). So a fact about a subject can be changed
without training, by as many numbers as the rows have; what is said of others should stay.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_int
from moezoo.experts.values import ValueTable
from moezoo.feed_forward import FeedForward
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.directory import load_with_tokenizer, save_checkpoint
from moezoo_models.devices import pick_device
from moezoo_models.evaluation.answers import score_answers
from moezoo_models.inspect.facts import (
    Facts,
    Question,
    alike,
    pairs_of_subjects,
    question_tokens,
    read_facts,
)
from moezoo_models.inspect.inspection import writing
from moezoo_models.mode import evaluating
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Edit:
    """One edit, and the share of questions that are answered in some way before and after it.

    Attributes:
        subject: whose rows are overwritten.
        by: whose rows they become.
        rows: how many are overwritten, in all layers.
        own_before: of the subject's questions, with its own answers.
        own_after: the same.
        others_before: of the subject's questions, with the answers of ``by``.
        others_after: the same.
        by_before: of the questions about ``by``, with their answers.
        by_after: the same.
        unrelated_before: of questions about third subjects, with their answers.
        unrelated_after: the same.
    """

    subject: str
    by: str
    rows: int
    own_before: float
    own_after: float
    others_before: float
    others_after: float
    by_before: float
    by_after: float
    unrelated_before: float
    unrelated_after: float


_SHARES = {
    "of the subject, its own answer": "own",
    "of the subject, the other's answer": "others",
    "of the other, its answer": "by",
    "of third subjects, their answers": "unrelated",
}


def inspect_edit(
    checkpoint: str | Path,
    facts: str | Path,
    output: str | Path = "runs/edit",
    edits: int = 24,
    layers: list[int] | None = None,
    with_embeddings: bool = False,
    unrelated: int = 64,
    subject: str | None = None,
    by: str | None = None,
    save_to: str | Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    attention: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
) -> list[Edit]:
    """Overwrite the token rows of subjects by those of others, and ask the model about all.

    The rows are those that questions about the two read where they differ, in tables that token
    ids or n-grams address. Each edit is undone before the next. Written to the output directory:
    edit.json and edit.csv. The checkpoint stays as it is.

    Args:
        checkpoint: directory of a model with e.g. STEM, MoLE or Engram.
        facts: JSON lines with ``subject``, ``question``, which holds the subject once, and
            ``answer``, which continues it and begins with a space. A subject may have several.
        output: directory that the files are written to.
        edits: subjects that are edited, one at a time, the first of the facts; each gets the rows
            of the next that is asked in the same words and has as many tokens.
        layers: whose tables are edited; default: all that have one.
        with_embeddings: overwrite the rows of the input embedding, too; of tied embeddings these
            are the head's.
        unrelated: questions about third subjects that are asked with each edit.
        subject: edit this one only.
        by: by the rows of this one.
        save_to: directory that the model is written to, edited; with subject and by.
        batch_size: questions computed at once.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers.
        tokenizer: directory of the tokenizer; default: the checkpoint's own.
        dtype: of the weights: float32, bfloat16, float16, or auto: as saved, but float32 on a CPU
            that is slow in that.

    Returns:
        The edits, in the order of the facts.

    Raises:
        InputError: the checkpoint cannot be loaded, or has no such table; the facts cannot be
            read, or no two subjects are alike; an option is out of range; or the output cannot be
            written.
    """
    check_int("edits", edits)
    check_int("unrelated", unrelated)
    check_int("batch_size", batch_size)
    if (subject is None) != (by is None):
        raise InputError("by: subject and by name the two of one edit; give both or neither")
    if save_to is not None:
        if subject is None:
            raise InputError("save_to: one edit is saved; name it by subject and by")
        if Path(save_to).resolve() == Path(checkpoint).resolve():
            raise InputError(f"save_to: {save_to} is the checkpoint; give another directory")
    known = read_facts(facts)
    model, words = load_with_tokenizer(checkpoint, tokenizer, pick_device(device), attention, dtype)
    places = editable_tables(model, layers, with_embeddings)
    if subject is not None and by is not None:
        _check_pair(words, known, subject, by)
        pairs = [(subject, by)]
    else:
        pairs = pairs_of_subjects(words, known, edits)
    directory = Path(output)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    found = try_edits(model, words, known, pairs, places, unrelated, batch_size)
    title = f"{checkpoint}: rows of {len(found)} subjects overwritten by those of others"
    _print(found, title)
    _write(found, directory, str(checkpoint), str(facts), list(places))
    if save_to is not None:
        overwrite(_moves(model, words, known[pairs[0][0]], known[pairs[0][1]], places))
        save_checkpoint(save_to, model, words)
        print(f"the edited model is in {save_to}")
    return found


def editable_tables(
    model: MoezooForCausalLM, layers: Sequence[int] | None = None, with_embeddings: bool = False
) -> dict[str, nn.Module]:
    """Find the tables of a model that tokens address, by name.

    Args:
        model: the model.
        layers: numbers of the layers whose tables are wanted; None: all.
        with_embeddings: add the model's input embedding.

    Raises:
        InputError: there is no such table, or no such layer.
    """
    blocks = list(model.model.blocks())
    for number in layers or ():
        check_int("layers", number, minimum=0, maximum=len(blocks) - 1)
    found: dict[str, nn.Module] = {}
    for number, block in enumerate(blocks):
        if layers is not None and number not in layers:
            continue
        for part in block.modules():
            if isinstance(part, FeedForward) and part.needs_token_ids:
                for name, table in part.named_modules():
                    if isinstance(table, ValueTable) and table not in found.values():
                        found[f"layer {number}.{name}"] = table
    if not found:
        kinds = sorted({type(block.mlp).__name__ for block in blocks})
        raise InputError(
            f"checkpoint: it has no table of token rows in these layers, only {', '.join(kinds)}; "
            "give a model with e.g. STEM"
        )
    if with_embeddings:
        found["embedding"] = model.get_input_embeddings()
    return found


Moves = list[tuple[nn.Module, Tensor, Tensor]]
"""Tables, rows that are overwritten, and the rows of the same table that they become."""


def try_edits(
    model: MoezooForCausalLM,
    tokenizer: Tokenizer,
    facts: Facts,
    pairs: Sequence[tuple[str, str]],
    tables: Mapping[str, nn.Module],
    unrelated: int,
    batch_size: int = 64,
) -> list[Edit]:
    """Overwrite rows for each pair in turn, ask, and put them back; see :func:`inspect_edit`."""

    def share(asked: Sequence[tuple[str, str]]) -> float:
        answers = score_answers(model, tokenizer, asked, batch_size)
        return sum(answer.right for answer in answers) / max(len(answers), 1)

    found = []
    for subject, by in pairs:
        own, others = facts[subject], facts[by]
        third = [q for name in facts if name not in (subject, by) for q in facts[name].values()]
        asked = {
            "own": [question.answered() for question in own.values()],
            "others": [own[wording].answered(others[wording].answer) for wording in own],
            "by": [question.answered() for question in others.values()],
            "unrelated": [question.answered() for question in third[:unrelated]],
        }
        moves = _moves(model, tokenizer, own, others, tables)
        shares = {f"{name}_before": share(questions) for name, questions in asked.items()}
        kept = overwrite(moves)
        try:
            shares |= {f"{name}_after": share(questions) for name, questions in asked.items()}
        finally:
            for (table, rows, _), values in zip(moves, kept, strict=True):
                _set(table, rows, values)
        found.append(Edit(subject, by, sum(len(rows) for _, rows, _ in moves), **shares))
    return found


def overwrite(moves: Moves) -> list[Tensor]:
    """Overwrite rows, and return what they were."""
    kept = [_weight(table)[rows].clone() for table, rows, _ in moves]
    new = [_weight(table)[sources].clone() for table, _, sources in moves]
    for (table, rows, _), values in zip(moves, new, strict=True):
        _set(table, rows, values)
    return kept


def _moves(
    model: MoezooForCausalLM,
    tokenizer: Tokenizer,
    own: Mapping[str, Question],
    others: Mapping[str, Question],
    tables: Mapping[str, nn.Module],
) -> Moves:
    """Find the rows that questions about two subjects read, where those differ."""
    pairs: dict[str, dict[int, int]] = {name: {} for name in tables}
    for wording, question in own.items():
        read = [
            _rows_read(model, question_tokens(tokenizer, each), tables)
            for each in (question, others[wording])
        ]
        for name, found in pairs.items():
            for target, source in zip(*(rows[name].tolist() for rows in read), strict=True):
                if target != source and target >= 0 and source >= 0:
                    found.setdefault(target, source)
    return [
        (tables[name], torch.tensor(list(found)), torch.tensor(list(found.values())))
        for name, found in pairs.items()
        if found
    ]


@torch.no_grad()
def _rows_read(
    model: MoezooForCausalLM, tokens: list[int], tables: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Return the rows of each table that a text reads, in the order of its tokens."""
    ids = torch.tensor([tokens], device=model.device)
    with evaluating(model), _recording(tables) as seen:
        model.model(input_ids=ids, use_cache=False)
    return {name: torch.cat(rows) for name, rows in seen.items()}


@contextmanager
def _recording(tables: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the rows that tables are asked for inside the block."""
    seen: dict[str, list[Tensor]] = {name: [] for name in tables}

    def record(name: str) -> torch.utils.hooks.RemovableHandle:
        return tables[name].register_forward_pre_hook(
            lambda _, given: seen[name].append(given[0].reshape(-1).cpu())
        )

    hooks = [record(name) for name in tables]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _weight(table: nn.Module) -> Tensor:
    weight = table.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _set(table: nn.Module, rows: Tensor, values: Tensor) -> None:
    weight = _weight(table)
    weight[rows.to(weight.device)] = values


def _check_pair(tokenizer: Tokenizer, facts: Facts, subject: str, by: str) -> None:
    for field, name in (("subject", subject), ("by", by)):
        if name not in facts:
            raise InputError(f"{field}: the facts do not ask for {name!r}; name one of them")
    if not alike(tokenizer, facts[subject], facts[by]):
        raise InputError(
            f"by: {by!r} is not asked for in the same words as {subject!r}, has the same answer, "
            "or another number of tokens; name another"
        )


def _print(found: Sequence[Edit], title: str) -> None:
    columns = ["asked for", ">before", ">after"]
    rows = [
        [what, *(f"{_mean(found, f'{name}_{when}'):.1%}" for when in ("before", "after"))]
        for what, name in _SHARES.items()
    ]
    print_table(title, columns, rows)


def _mean(found: Sequence[Edit], field: str) -> float:
    return sum(getattr(edit, field) for edit in found) / len(found)


def _write(
    found: Sequence[Edit], output: Path, checkpoint: str, facts: str, tables: list[str]
) -> None:
    names = [field.name for field in fields(Edit)]
    means = {name: _mean(found, name) for name in names if name.endswith(("before", "after"))}
    report = {"checkpoint": checkpoint, "facts": facts, "tables": tables, "means": means}
    with writing(output):
        with atomic_write(output / "edit.csv", "w") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(edit) for edit in found)
        with atomic_write(output / "edit.json", "w") as file:
            edits = [asdict(edit) for edit in found]
            json.dump({**report, "edits": edits}, file, indent=2, ensure_ascii=False)
            file.write("\n")
    print(f"edit.json and edit.csv are in {output}")
