"""Training by transformers' ``Trainer``: what its loop leaves undone for the layers of the zoo.

Losses of the layers need nothing: :class:`~moezoo_models.MoezooForCausalLM` adds them to the loss
that it returns for ``labels``. State that moves beside the gradient needs to be told of each
micro-batch and of each step, which is what the callback here does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward, FeedForwardOutput


class TrainingStateCallback(TrainerCallback):
    """Move selection biases, thresholds and running averages of layers by the load of each step.

    ``Trainer(..., callbacks=[TrainingStateCallback()])``. The statistics of every micro-batch go to
    :meth:`moezoo.FeedForward.observe` after its backward pass; after an optimizer step that was
    taken the layers :meth:`~moezoo.FeedForward.step`, and after one that was skipped, as fp16's
    gradient scaler does, they :meth:`~moezoo.FeedForward.discard`. So it holds with any number of
    accumulated batches, under activation checkpointing, and for layers that
    :func:`moezoo.swap` has put into another model.
    """

    def __init__(self) -> None:
        self._layers: list[FeedForward] = []
        self._hooks: list[RemovableHandle] = []
        self._stats: dict[FeedForward, Mapping[str, Tensor]] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Listen to the layers.

        Raises:
            InputError: the model has none.
        """
        self._stop()
        self._layers = [] if model is None else _outermost(model)
        if not self._layers:
            raise InputError(
                f"model: {type(model).__name__} has no layer of moezoo; leave the callback out, or "
                "swap() its feed-forward blocks"
            )
        for layer in self._layers:
            layer.defer_state()
            layer.discard()
            self._hooks.append(layer.register_forward_hook(self._note))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on a micro-batch that is not the last of its step."""
        self._observe()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on the last micro-batch of a step."""
        self._observe()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Have the layers follow the step, if it was taken."""
        skipped = getattr(optimizer, "step_was_skipped", False)
        for layer in self._layers:
            layer.discard() if skipped else layer.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no more."""
        self._stop()

    def _note(self, layer: FeedForward, args: Any, output: FeedForwardOutput) -> None:
        """Keep what a training pass has counted; a recomputation counts the same once more."""
        if layer.training:
            self._stats[layer] = output.stats

    def _observe(self) -> None:
        for layer, stats in self._stats.items():
            layer.observe(stats)
        self._stats.clear()

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stats.clear()


def _outermost(model: nn.Module) -> list[FeedForward]:
    """Return the layers of a model, without those that are inside others."""
    found: list[FeedForward] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FeedForward) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found
