"""The tasks of lm-evaluation-harness, which makes the prompts and the metrics, run on a model.

The harness, the package lm-eval, is imported by what needs it only: it is an extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int, nearest
from moezoo_models.text.tokenizer import Tokenizer

_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
)


@dataclass(frozen=True)
class Questions:
    """Which of the harness's tasks to run, and how.

    Attributes:
        names: tasks, groups or tags.
        manager: the harness's index, which knows them.
        limit: documents of each task; None for all.
        num_fewshot: solved examples before each question; None for what the task says.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None = None
    num_fewshot: int | None = None

    @classmethod
    def find(
        cls,
        names: Iterable[str],
        task_path: str | Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> Questions:
        """Look tasks up, in a directory of YAML files first and then among the harness's own.

        Raises:
            InputError: there is no such task or directory, or an option is out of range.
            ModuleNotFoundError: lm-eval is not installed.
        """
        wanted = tuple(dict.fromkeys(stripped for name in names if (stripped := name.strip())))
        if not wanted:
            raise InputError("tasks: none is named; give --tasks NAME,NAME")
        if limit is not None:
            check_int("limit", limit)
        if num_fewshot is not None:
            check_int("num_fewshot", num_fewshot, minimum=0)
        return cls(wanted, _index(wanted, task_path), limit, num_fewshot)


@dataclass(frozen=True)
class TaskEvaluation:
    """The harness's measurements.

    Attributes:
        report: its dictionary as it can be written to JSON: ``results`` holds, by task, each metric
            under ``"name,filter"`` and its standard error under ``"name_stderr,filter"``;
            ``configs``, ``versions``, ``n-shot`` and ``n-samples`` say how it was measured.
    """

    report: dict[str, Any]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Metrics by task."""
        return cast("dict[str, dict[str, Any]]", self.report["results"])

    def table(self) -> str:
        """Return the harness's table of the figures."""
        from lm_eval.utils import make_table

        tables = [make_table(self.report)]
        if self.report.get("groups"):
            tables.append(make_table(self.report, "groups"))
        return "\n".join(table.rstrip() for table in tables)


def evaluate_questions(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: Questions,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> TaskEvaluation:
    """Evaluate a model in memory on lm-eval's tasks (Gao et al. 2024, doi:10.5281/zenodo.12608602).

    The harness seeds Python's, NumPy's and torch's random numbers, so that the same model gives the
    same figures.

    Args:
        model: the model, on any device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        questions: the tasks.
        sequence_length: tokens that the model sees at once; default: as for
            :func:`moezoo_models.evaluation.evaluate.evaluate`.
        batch_size: questions computed at once.

    Raises:
        InputError: a task needs something that the model cannot do, or an option is out of range.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from moezoo_models.evaluation.harness import HarnessModel

    answering = HarnessModel(
        model, tokenizer, sequence_length=sequence_length, batch_size=batch_size
    )
    found = simple_evaluate(
        model=answering,
        tasks=list(questions.names),
        task_manager=questions.manager,
        num_fewshot=questions.num_fewshot,
        limit=questions.limit,
        log_samples=False,
    )
    report = {key: found[key] for key in _KEPT if key in found}
    report["lm_eval_version"] = found["lm_eval_version"]
    report["limit"] = questions.limit
    report["sequence_length"] = answering.length
    report["batch_size"] = answering.batch_size
    text = json.dumps(report, default=handle_non_serializable)
    return TaskEvaluation(json.loads(text))


def _index(names: Sequence[str], task_path: str | Path | None) -> Any:
    """Index the tasks of a directory, and the harness's thousands only where they are needed."""
    from lm_eval.tasks import TaskManager

    folder = None if task_path is None else Path(task_path)
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"task_path: {folder} is no directory; give one with YAML files")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            where = "" if folder is None else f" in {folder} or among the harness's"
            raise InputError(f"tasks: there is no '{name}'{where}{_like(name, manager.all_tasks)}")
    return manager


def _like(name: str, known: Sequence[str]) -> str:
    """Suggest a task, but never list the thousands that there are."""
    hint = nearest(name, known)
    return hint if hint.startswith("; did you mean") else "; see `lm-eval ls tasks`"
