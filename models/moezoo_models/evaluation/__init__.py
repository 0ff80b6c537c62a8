"""Loss, perplexity, bits per byte, and lm-eval's tasks."""

from typing import TYPE_CHECKING

from moezoo_models.lazy import lazily

if TYPE_CHECKING:
    from moezoo_models.evaluation.perplexity import Evaluation, evaluate_text, evaluate_tokens
    from moezoo_models.evaluation.tasks import Questions, TaskEvaluation, evaluate_questions
else:
    __getattr__ = lazily(
        __name__,
        {
            "perplexity": ("Evaluation", "evaluate_text", "evaluate_tokens"),
            "tasks": ("Questions", "TaskEvaluation", "evaluate_questions"),
        },
    )

__all__ = [
    "Evaluation",
    "Questions",
    "TaskEvaluation",
    "evaluate_questions",
    "evaluate_text",
    "evaluate_tokens",
]
