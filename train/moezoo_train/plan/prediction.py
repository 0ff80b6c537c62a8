"""The loss that fitted scaling laws expect of a planned run."""

from __future__ import annotations

from dataclasses import dataclass

from moezoo.command.tables import count
from moezoo.errors import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_train.plan.counting import count_weights
from moezoo_train.plan.laws import FinalCount, Law, MeanCount, Reach, SparseLaw


@dataclass(frozen=True)
class Prediction:
    """What a law says of a run.

    Attributes:
        law: which.
        count: the run's N, of the law's own kind.
        tokens: its D.
        loss: in nats per token, as of the runs that the law was fitted to.
        within: whether the run lies within what those span.
    """

    law: Law
    count: MeanCount | FinalCount
    tokens: float
    loss: float
    within: bool

    def __str__(self) -> str:
        """Return it in a line."""
        sparse = f", S {self.count.sparsity:.3g}" if isinstance(self.count, FinalCount) else ""
        which = "left at the end" if sparse else "mean over training"
        line = (
            f"Loss by the {self.law.name} law: {self.loss:.3f} (N {count(round(self.count.value))}"
            f" {which}{sparse}, D {count(round(self.tokens))})"
        )
        return line if self.within else f"{line}; beyond the runs that it was fitted to, a guess"


def predict(
    laws: list[tuple[Law, Reach]], model: MoezooForCausalLM, tokens_per_step: float, steps: int
) -> list[Prediction]:
    """Return what laws say of a run.

    Args:
        laws: with what they were fitted to.
        model: what is trained.
        tokens_per_step: of all GPUs together.
        steps: optimizer steps of the run; -1 if they are not limited.

    Raises:
        InputError: they are not, or the model has other than dense blocks.
    """
    if steps < 1:
        raise InputError(
            "law: a loss is that of so many tokens; give trainer.max_steps, the optimizer steps"
        )
    mean, final = count_weights("law", model)
    tokens = tokens_per_step * steps
    found = []
    for law, reach in laws:
        if isinstance(law, SparseLaw):
            found.append(
                Prediction(law, final, tokens, law.loss(final, tokens), reach.holds(final, tokens))
            )
        else:
            found.append(
                Prediction(law, mean, tokens, law.loss(mean, tokens), reach.holds(mean, tokens))
            )
    return found
