"""Whether what a training checkpoint holds is of the kind that it should be.

Checksums find what a disk or a copy has changed. A file that was written anew, by a person or
another program, has right ones; what is of a wrong kind in it would stop a run in the middle of
Lightning, or steps later, or change it without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from moezoo.command.messages import shorten
from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import one_line
from moezoo_train.checkpoint_structure import check_kind, is_whole

_STATES = {
    "muon": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "sparse_adam": {"step", "exp_avg", "exp_avg_sq"},
}
"""State that each algorithm of an optimizer keeps for a parameter."""
_WHERE = "lightning.pytorch.trainer.connectors.checkpoint_connector"


class CheckKinds(Callback):
    """Compare what is restored with what the run itself would have written in its place."""

    def __init__(self) -> None:
        self._groups: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check callbacks, loops and data before they take anything over.

        Raises:
            InputError: names the first value of another kind.
        """
        try:
            saved = checkpoint.get("callbacks", {})
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if callback.state_key in saved:
                    own = callback.state_dict()
                    place = f"callbacks.{type(callback).__name__}"
                    check_kind(place, saved[callback.state_key], own)
                    if isinstance(callback, ModelCheckpoint):
                        _check_scores(place, saved[callback.state_key])
            loops = {
                "fit_loop": trainer.fit_loop,
                "validate_loop": trainer.validate_loop,
                "test_loop": trainer.test_loop,
            }
            saved = checkpoint.get("loops", {})
            for name, loop in loops.items():
                if name in saved:
                    check_kind(f"loops.{name}", saved[name], loop.state_dict(), whole=True)
        except ValueError as error:
            raise _unusable(error) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what fresh optimizers and schedules hold."""
        self._groups = [[dict(group) for group in o.param_groups] for o in trainer.optimizers]
        self._schedules = [dict(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers' and schedules' states, which only they can sort.

        Raises:
            InputError: names the first value of another kind.
        """
        try:
            for number, (optimizer, groups) in enumerate(
                zip(trainer.optimizers, self._groups, strict=True)
            ):
                for group, fresh in zip(optimizer.param_groups, groups, strict=True):
                    place = f"optimizer_states[{number}].param_groups"
                    own, fresh = _without(group, "params"), _without(fresh, "params")
                    check_kind(place, own, fresh, whole=True)
                    _check_states(f"optimizer_states[{number}].state", optimizer.state, group)
            for config, fresh in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
                check_kind("lr_schedulers", config.scheduler.state_dict(), fresh, whole=True)
        except ValueError as error:
            raise _unusable(error) from error


@contextmanager
def restoring_errors() -> Iterator[None]:
    """Raise errors of Lightning's restoring of a checkpoint as one line.

    Raises:
        InputError: instead of any other error from there.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not _in_restoring(error):
            raise
        raise _unusable(error) from error


def _in_restoring(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == _WHERE:
            return True
        traceback = traceback.tb_next
    return False


def _unusable(error: BaseException) -> InputError:
    reason = shorten(f"{type(error).__name__}: {one_line(error)}", 120)
    reason = reason if not isinstance(error, ValueError) else one_line(error)
    return InputError(
        f"ckpt_path: the checkpoint is damaged or not of this run ({reason}); use another, e.g. "
        "best.ckpt beside it"
    )


def _check_scores(place: str, saved: Mapping[str, Any]) -> None:
    """See that scores, which a run begins without, are numbers."""
    models = saved.get("best_k_models", {})
    named = {f"best_k_models.{name}": value for name, value in models.items()}
    for name in ("best_model_score", "current_score"):
        named[name] = saved.get(name)
    for name, value in named.items():
        if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"{place}.{name} is not a number")


def _check_states(place: str, state: Mapping[Any, Any], group: Mapping[str, Any]) -> None:
    """See that each parameter's state is what its algorithm goes on from; an empty one begins."""
    wanted = _STATES.get(group.get("algorithm", "adamw"), set())
    for parameter in group["params"]:
        values = state.get(parameter, {})
        if values and not wanted <= values.keys():
            raise ValueError(f"{place} lacks {', '.join(sorted(wanted - values.keys()))}")
        for name, value in values.items():
            if name == "step":
                if not (isinstance(value, Tensor) and value.numel() == 1) and not is_whole(value):
                    raise ValueError(f"{place}.{name} is not a number of steps")
            elif not isinstance(value, Tensor) or value.shape != parameter.shape:
                raise ValueError(f"{place}.{name} is not a tensor of its parameter's shape")


def _without(group: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}
