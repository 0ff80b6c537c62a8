"""State that changes in training, but not by the gradient: selection biases, running averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class TrainingState(nn.Module):
    """A module with such state, or with parts that have some.

    What a micro-batch says is set aside by :meth:`observe`, and becomes state in :meth:`step`, when
    the optimizer has stepped, or is forgotten by :meth:`discard`, when it has not. So a step that
    is skipped leaves nothing behind, and a forward pass that is recomputed counts nothing twice.

    By default each method hands on to the parts: the outermost such modules inside this one.
    """

    def observe(self, stats: Mapping[str, Tensor]) -> None:
        """Set aside one micro-batch's statistics, after its backward pass.

        The trainer calls this once per micro-batch, outside any recomputation, with the ``stats``
        that the forward pass returned. Modules without training-time state ignore it.
        """
        for part in _parts(self):
            part.observe(stats)

    def step(self, progress: float | None = None) -> None:
        """Update the state by what was observed; once per optimizer step that is taken.

        Args:
            progress: optimizer steps done, this one included, over those planned, in [0, 1]; None
                where it is not known, which parts with a schedule refuse.
        """
        for part in _parts(self):
            part.step(progress)

    def discard(self) -> None:
        """Forget what was observed since the last step, because no step is taken with it."""
        for part in _parts(self):
            part.discard()

    def defer_state(self) -> None:
        """Defer all changes of state to :meth:`observe` and :meth:`step` from now on.

        Without it a training forward pass moves the running averages of a batch norm at once, as
        torch's own does, for loops that call neither.
        """
        for part in _parts(self):
            part.defer_state()


def _parts(module: nn.Module) -> Iterator[TrainingState]:
    for child in module.children():
        if isinstance(child, TrainingState):
            yield child
        else:
            yield from _parts(child)
