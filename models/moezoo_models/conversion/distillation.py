"""Training blocks of a model to predict what another model predicts, resumable bit for bit.

The loss is the divergence ``KL(teacher || student)`` of next tokens' distributions (Hinton et al.
2015, arXiv:1503.02531, at temperature 1). A full distribution says more per token than the token
that came: where there is little text, that is what counts.

Shapes: W windows, L tokens each, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moezoo.errors import InputError, check_int, check_number
from moezoo_models.checkpoints.atomic import replacing_file
from moezoo_models.files.checksums import seal
from moezoo_models.files.model_files import check_weights
from moezoo_models.model.head import shaped_logits

POSITIONS = 128
"""Positions whose logits are in memory at once."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"


@dataclass(frozen=True)
class RecoveryOptions:
    """Options of the training by ``--recover``.

    Attributes:
        lr: of Adam; it rises over the first tenth of the steps and falls to zero along a cosine.
        windows: of text in a step.
        save_every: steps between two files of its state, from which a run that was killed goes on.
    """

    lr: float = 2e-4
    windows: int = 1
    save_every: int = 25

    def check(self) -> None:
        """Raise :class:`InputError` for a value that is out of range."""
        if check_number("recovery.lr", self.lr) <= 0:
            raise InputError("recovery.lr: it is 0; give a number above that, such as 2e-4")
        check_int("recovery.windows", self.windows)
        check_int("recovery.save_every", self.save_every)


def backward_divergence(
    hidden_TD: Tensor,
    wanted_TD: Tensor,
    head: Callable[[Tensor], Tensor],
    wanted_head: Callable[[Tensor], Tensor],
    positions: int = POSITIONS,
    weight: float = 1.0,
) -> float:
    """Backpropagate the mean of ``KL(wanted || found)``, some positions' logits at a time.

    Both models' logits of all positions would be the largest tensors of a step: ``(T, V)`` twice,
    and as many again for gradients. Of each piece only the gradient of its states is kept.

    Args:
        hidden_TD: what goes into the student's head; its graph is run backwards once, at the end.
        wanted_TD: what goes into the teacher's.
        head: logits ``(t, V)`` of the student's states ``(t, D)``.
        wanted_head: the same of the teacher's.
        positions: in a piece.
        weight: factor on the mean.

    Returns:
        The weighted mean, in nats.
    """
    leaf_TD = hidden_TD.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(leaf_TD), positions):
        piece = slice(start, start + positions)
        with torch.no_grad():
            wanted_tV = wanted_head(wanted_TD[piece]).float().log_softmax(dim=-1)
        found_tV = head(leaf_TD[piece]).float().log_softmax(dim=-1)
        nats = F.kl_div(found_tV, wanted_tV, reduction="sum", log_target=True)
        nats = nats * (weight / len(leaf_TD))
        nats.backward()
        total += nats.item()
    hidden_TD.backward(leaf_TD.grad)
    return total


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, over the largest."""
    rising = -(-steps // 10)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@dataclass(frozen=True, eq=False)
class Distillation:
    """One training.

    Attributes:
        teacher: the model that is right.
        student: the model that learns; in evaluation mode, so that nothing is drawn.
        trained: those of its parameters that are changed; in fp32.
        tokens: ``(W, L)`` int64, each window once, in this order.
        options: of the training.
        file: of its state.
        identity: hash of what decides the result; another run's state is not continued.
    """

    teacher: Any
    student: Any
    trained: Mapping[str, nn.Parameter]
    tokens: Tensor
    options: RecoveryOptions
    file: Path
    identity: str

    @property
    def steps(self) -> int:
        """How many there are."""
        return -(-len(self.tokens) // self.options.windows)

    def run(self, progress: Callable[[], None] = lambda: None) -> list[float]:
        """Train, going on from the state that is there; return the loss of each step, in nats.

        Args:
            progress: called after each step, also those of an earlier run.

        Raises:
            InputError: the loss is no number any more, or the state is damaged.
        """
        self.student.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(self.trained.values(), lr=self.options.lr)
        losses = self._resume(optimizer)
        for _ in losses:
            progress()
        for step in range(len(losses), self.steps):
            first = step * self.options.windows
            batch_wL = self.tokens[first : first + self.options.windows]
            loss = sum(self._backward(row, len(batch_wL)) for row in batch_wL)
            if not math.isfinite(loss):
                raise InputError(
                    f"recovery.lr: the loss of step {step + 1} is {loss}; give less than "
                    f"{self.options.lr:g}"
                )
            losses.append(loss)
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * rate(step, self.steps)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % self.options.save_every == 0 or step + 1 == self.steps:
                self._save(optimizer, losses)
            progress()
        return losses

    def _backward(self, row_L: Tensor, rows: int) -> float:
        """Add a window's gradient, one of so many; return its share of the loss."""
        row_1L = row_L[None].to(self.student.device)
        with torch.no_grad():
            wanted_TD = self._states(self.teacher, row_1L)
        hidden_TD = self._states(self.student, row_1L)
        heads = _head_of(self.student), _head_of(self.teacher)
        return backward_divergence(hidden_TD, wanted_TD, *heads, weight=1 / rows)

    @staticmethod
    def _states(model: Any, row_1L: Tensor) -> Tensor:
        """Return what goes into the head, but at the first token, which is apart everywhere."""
        hidden: Tensor = model.base_model(input_ids=row_1L, use_cache=False).last_hidden_state
        return hidden[0, 1:]

    def _save(self, optimizer: torch.optim.Adam, losses: list[float]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            kept = {_WEIGHT: parameter.detach(), **optimizer.state[parameter]}
            tensors |= {f"{each}.{name}": kept[each].cpu() for each in (_WEIGHT, *_MOMENTS)}
        said = {"identity": self.identity, "losses": json.dumps(losses)}
        with replacing_file(self.file, "target") as fresh:
            save_file(tensors, fresh, said)
            seal(fresh)

    def _resume(self, optimizer: torch.optim.Adam) -> list[float]:
        """Take over the state of an earlier run; return its losses."""
        if not self.file.is_file():
            return []
        try:
            check_weights([self.file])
        except InputError as error:
            raise InputError(
                f"recover: {self.file} is damaged; remove it, and the training begins anew"
            ) from error
        with safe_open(self.file, framework="pt") as file:
            said = file.metadata()
            if said["identity"] != self.identity:
                return []
            losses: list[float] = json.loads(said["losses"])
            for name, parameter in self.trained.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"{_WEIGHT}.{name}"))
                moments = {
                    each: file.get_tensor(f"{each}.{name}").to(parameter.device)
                    for each in _MOMENTS
                }
                step = torch.tensor(float(len(losses)))
                optimizer.state[parameter] = {"step": step, **moments}
        return losses


def _head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Return what makes logits of a model's last states."""
    head = model.get_output_embeddings()
    return lambda states: shaped_logits(head(states), model.config)
