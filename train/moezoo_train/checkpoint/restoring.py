"""Whether what a training checkpoint holds is of the kind that it should be.

Checksums find what a disk or a copy has changed. A file that was written anew, by a person or
another program, has right ones; what is of a wrong kind in it would stop a run in the middle of
Lightning, or steps later, or change it without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import InvalidVersion, Version
from torch import Tensor

from moezoo.command.messages import shorten
from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import one_line
from moezoo_train.checkpoint.identity import CONFIG_KEY

VERSION = "pytorch-lightning_version"
_STATES = {
    "muon": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "sparse_adam": {"step", "exp_avg", "exp_avg_sq"},
}
"""State that each algorithm of an optimizer keeps for a parameter."""
_WHERE = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_layout(checkpoint: Any) -> None:
    """See that a checkpoint has the parts that its readers go through.

    Raises:
        ValueError: names the part that is something else.
    """
    _expect("it", checkpoint, dict, "a mapping")
    state = _expect("state_dict", checkpoint.get("state_dict"), Mapping, "a mapping")
    for name, value in state.items():
        _expect("state_dict", name, str, "made of names")
        _expect(name, value, Tensor, "a tensor")
    version = _expect(VERSION, checkpoint.get(VERSION), str, "a version")
    try:
        Version(version)
    except InvalidVersion:
        raise ValueError(f"{VERSION} is {shorten(version)}, not a version") from None
    for name in ("epoch", "global_step"):
        _check_kind(name, checkpoint.get(name, 0), 0)
    for name, callback in _mapping(checkpoint, "callbacks").items():
        _expect(f"callbacks.{name}", callback, dict, "a mapping")
    for name, loop in _mapping(checkpoint, "loops").items():
        _expect(f"loops.{name}", loop, dict, "a mapping")
    for number, schedule in enumerate(_list(checkpoint, "lr_schedulers")):
        _expect(f"lr_schedulers[{number}]", schedule, dict, "a mapping")
    for number, optimizer in enumerate(_list(checkpoint, "optimizer_states")):
        place = f"optimizer_states[{number}]"
        _expect(place, optimizer, dict, "a mapping")
        states = _expect(f"{place}.state", optimizer.get("state"), dict, "a mapping")
        for parameter, values in states.items():
            _expect(f"{place}.state.{parameter}", values, dict, "a mapping")
        for group in _list(optimizer, "param_groups", place):
            _expect(f"{place}.param_groups", group, dict, "a list of mappings")
    if CONFIG_KEY in checkpoint:
        _check_description(_mapping(checkpoint, CONFIG_KEY))


def _check_description(known: dict[str, Any]) -> None:
    """See that what :meth:`LanguageModel.on_save_checkpoint` wrote has its parts."""
    _expect(f"{CONFIG_KEY}.config", known.get("config"), dict, "a mapping")
    for name in ("unrelated", "optimizer", "guard", "lora", "sparse_memory"):
        _expect(f"{CONFIG_KEY}.{name}", known.get(name, {}), dict, "a mapping")
    guard = known.get("guard", {})
    for name in ("skipped", "in_a_row"):
        _check_kind(f"{CONFIG_KEY}.guard.{name}", guard.get(name, 0), 0)
    _check_kind(f"{CONFIG_KEY}.guard.recent", guard.get("recent", ([], [])), ([0.0], [0.0]))


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
                    _check_kind(place, saved[callback.state_key], own)
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
                    _check_kind(f"loops.{name}", saved[name], loop.state_dict(), whole=True)
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
                    _check_kind(place, own, fresh, whole=True)
                    _check_states(f"optimizer_states[{number}].state", optimizer.state, group)
            for config, fresh in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
                _check_kind("lr_schedulers", config.scheduler.state_dict(), fresh, whole=True)
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
                if not (isinstance(value, Tensor) and value.numel() == 1) and not _whole(value):
                    raise ValueError(f"{place}.{name} is not a number of steps")
            elif not isinstance(value, Tensor) or value.shape != parameter.shape:
                raise ValueError(f"{place}.{name} is not a tensor of its parameter's shape")


def _check_kind(place: str, value: Any, like: Any, whole: bool = False) -> None:
    """See that a value is of the kind of another; of what is None there is no telling.

    What is missing is for its reader, who may know earlier versions; ``whole``, it is an error.

    Raises:
        ValueError: names the place, and what is wrong there.
    """
    if like is None:
        return
    if isinstance(like, Mapping):
        _expect(place, value, Mapping, "a mapping")
        for key, inner in like.items():
            if key in value:
                _check_kind(f"{place}.{key}", value[key], inner, whole)
            elif whole:
                raise ValueError(f"{place}.{key} is missing")
    elif isinstance(like, list | tuple):
        _expect(place, value, list | tuple, "a list")
        mixed = isinstance(like, tuple) or len({type(inner) for inner in like}) > 1
        if mixed and len(value) != len(like):
            raise ValueError(f"{place} has {len(value)} members, not {len(like)}")
        for number, inner in enumerate(value if like else ()):
            own = like[number if mixed else 0]
            _check_kind(f"{place}[{number}]", inner, own, whole)
    elif isinstance(like, Tensor):
        _expect(place, value, Tensor, "a tensor")
        if value.dtype != like.dtype or value.shape != like.shape:
            raise ValueError(f"{place} is not a tensor {tuple(like.shape)} of {like.dtype}")
    elif isinstance(like, bool | str):
        _expect(place, value, type(like), _NAMES[type(like)])
    elif isinstance(like, int):
        if not _whole(value):
            raise ValueError(f"{place} is not a whole number ≥ 0")
    elif isinstance(like, float):
        number = isinstance(value, float) or _whole(value)
        if not number or math.isnan(value):
            raise ValueError(f"{place} is not a number")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _expect(place: str, value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{place} is {'missing' if value is None else f'not {name}'}")
    return value


def _mapping(owner: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = _expect(name, owner.get(name, {}), dict, "a mapping")
    return found


def _list(owner: Mapping[str, Any], name: str, place: str = "") -> Iterable[Any]:
    where = f"{place}.{name}" if place else name
    found: list[Any] = _expect(where, owner.get(name, []), list, "a list")
    return found


def _without(group: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}
