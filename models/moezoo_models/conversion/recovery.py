"""`--recover`: a model that was made of a dense one learns the dense model's predictions.

Its checkpoint is complete before this begins and stays as it is until this is done: what is
trained is in ``.NAME.recovery`` beside it, and a new directory takes its place by one rename.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from moezoo.command.messages import size
from moezoo.errors import InputError, check_int, going_on
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.directory import INDEX, read_json, write_model
from moezoo_models.checkpoints.locks import writing
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carving import model_nats
from moezoo_models.conversion.checkpoint import REPORT
from moezoo_models.conversion.distillation import Distillation, RecoveryOptions
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.writer import check_space
from moezoo_models.devices import free_memory
from moezoo_models.progress import progress_bar

_WEIGHTS = "*.safetensors"
_STATES = 4
"""Numbers per trained weight in memory: itself, its gradient and Adam's two moments."""
_BLOCKS = (".mlp.", ".fc1.", ".fc2.")
"""What names of feed-forward weights contain; the last two are OPT's."""


class Report(Protocol):
    """What a recovery wants of the report of a conversion, a frozen dataclass."""

    @property
    def target(self) -> dict[str, Any]:
        """Of what was written; ``sha256`` has the files of weights."""

    def recovered(self, files: dict[str, str], recovery: dict[str, Any]) -> Self:
        """Return the report of the recovered model, whose files have other checksums."""


R = TypeVar("R", bound=Report)


class Recovery(Generic[R]):
    """The recovery of one checkpoint.

    Args:
        source: the dense model.
        target: the checkpoint, which may still have to be made.
        text: has the tokens to train on, and those for perplexities.
        options: of the training.
        command: the one that makes the checkpoint.
    """

    def __init__(
        self,
        source: Source,
        target: Path,
        text: Calibration,
        options: RecoveryOptions,
        command: str,
    ) -> None:
        self._source, self._target, self._text = source, target, text
        self._options, self._command = options, command
        self._scratch = target.with_name(f".{target.name}.recovery")

    def check(self, dtype: torch.dtype, kept: int = 0) -> None:
        """Refuse what has no room: both models and the optimizer in memory, its state on disk.

        Args:
            dtype: of the checkpoint's weights.
            kept: further copies of the blocks, in fp32, on disk until the end.

        Raises:
            InputError: names what is needed.
        """
        shapes = [torch.Size(each.shape).numel() for each in self._source.tensors.values()]
        block = self._source.block(0)
        trained = self._source.num_layers * sum(each.numel() for each in block.values())
        needed = 4 * (2 * sum(shapes) + (_STATES - 1) * trained)
        if needed > (free := free_memory()):
            raise InputError(
                f"recover: the dense model, the one made of it and Adam need about {size(needed)} "
                f"of memory, and {size(free)} are free; leave it out, or take a machine with more"
            )
        # Two files of state, while one replaces the other; twice the checkpoint.
        states = 2 * (_STATES - 1) * 4 * trained
        weights = 2 * sum(shapes) * dtype.itemsize
        check_space(self._target, states + 4 * trained * kept + weights)

    def earlier(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """Return the report of the target, if the same command made it of the same model.

        Args:
            options: of the command.
        """
        file = self._target / REPORT
        if not file.is_file():
            return None
        found = read_json(file)
        same = (
            found.get("method") == self._command
            and found["options"] == json.loads(json.dumps(options))
            and found.get("source", {}).get("sha256") == self._source.fingerprint()
        )
        return found if same else None

    def run(self, made: R, device: torch.device, max_shard_size: str) -> R:
        """Train, and put the result in the place of the checkpoint.

        Args:
            made: the report of what is there.
            device: where to compute.
            max_shard_size: as for the conversion.

        Returns:
            The report, with that of the recovery.

        Raises:
            InputError: the target is no longer what was made, or the training went wrong.
        """
        how = "the same command goes on where this one was"
        with writing(self._scratch, "target"), going_on(how):
            self._scratch.mkdir(exist_ok=True)
            teacher = load_any(self._source.directory).to(device)
            dense_nats = model_nats(teacher, self._text)
            figures = self._beside(teacher, made, dense_nats)
            student = load_as_it_is(self._target, device)[0]
            dtypes = {name: each.dtype for name, each in _tensors(student)}
            losses = self._train("state", teacher, student.float(), made)
            for name, each in _tensors(student):
                each.data = each.data.to(dtypes[name])
            del teacher
            with replacing_directory(self._target, "target") as fresh:
                self._copy(fresh)
                carry_over([], fresh, self._change(), self._target)
                write_model(fresh, self._target, student, max_shard_size=max_shard_size)
                # transformers wrote one of its own; only weights differ.
                shutil.copyfile(self._target / "config.json", fresh / "config.json")
                nats = model_nats(load_any(fresh), self._text)
                figures = {"recovered": figures_of(nats, dense_nats), **figures}
                files = {each.name: _sha256(each) for each in sorted(fresh.glob(_WEIGHTS))}
                recovered = made.recovered(files, self._described(figures, dense_nats, losses))
                report = dataclasses.asdict(recovered)  # type: ignore[call-overload]
                (fresh / REPORT).write_text(
                    json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
            shutil.rmtree(self._scratch, ignore_errors=True)
        return recovered

    def _beside(self, teacher: Any, made: R, dense_nats: Tensor) -> dict[str, dict[str, float]]:
        """Return figures of other models, recovered likewise beforehand."""
        return {}

    def _train(self, name: str, teacher: Any, student: Any, made: R) -> list[float]:
        """Train all feed-forward weights but routers; return the losses."""
        trained = trained_weights(student)
        run = Distillation(
            teacher,
            student,
            trained,
            self._text.recovery,
            self._options,
            self._scratch / f"{name}.safetensors",
            self._identity(made),
        )
        with progress_bar() as bar:
            task = bar.add_task("recovering", total=run.steps)
            return run.run(partial(bar.advance, task))

    def _identity(self, made: R) -> str:
        """Hash what decides the result, so that another run's state is not continued."""
        digest = hashlib.sha256(self._text.recovery.numpy().tobytes())
        decides = [made.target["sha256"], self._source.stamp(), torch.__version__]
        decides.append(dataclasses.asdict(self._options) | {"save_every": None})
        digest.update(json.dumps(decides, sort_keys=True).encode())
        return digest.hexdigest()

    def _change(self) -> str:
        return (
            f"`moezoo {self._command} --recover` trained the feed-forward weights on "
            f"{self._text.recovery.numel():,} tokens, against the dense model."
        )

    def _copy(self, fresh: Path) -> None:
        """Copy what is beside the weights."""
        for path in self._target.iterdir():
            if path.is_dir():
                shutil.copytree(path, fresh / path.name)
            elif not path.match(_WEIGHTS) and path.name not in (INDEX, REPORT):
                shutil.copyfile(path, fresh / path.name)

    def _described(
        self, figures: dict[str, dict[str, float]], dense_nats: Tensor, losses: list[float]
    ) -> dict[str, Any]:
        return {
            "tokens": self._text.recovery.numel(),
            "sha256": hashlib.sha256(self._text.recovery.numpy().tobytes()).hexdigest(),
            **dataclasses.asdict(self._options),
            "losses": losses,
            "dense": math.exp(dense_nats.mean()),
            "figures": figures,
        }


def check_recovery(tokens: int, options: RecoveryOptions) -> None:
    """Refuse options of a recovery that there is not.

    Args:
        tokens: to be trained on; 0 for none.
        options: of the training.

    Raises:
        InputError: names the option.
    """
    check_int("recover", tokens, minimum=0)
    options.check()
    if not tokens and options != RecoveryOptions():
        raise InputError("recovery: nothing is recovered; give recover a number of tokens")


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a recovery trains: those of feed-forward blocks.

    Routers stay: a chosen expert counts fully, so that nothing but a change of choice would
    change anything, which no gradient sees. So do the scales u of :class:`moezoo.CarvedMoE`, of
    which stock formats know nothing.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(each in name for each in _BLOCKS)
        and ".mlp.gate." not in name
        and not name.endswith(".mlp.u")
    }


def figures_of(nats: Tensor, dense: Tensor) -> dict[str, float]:
    """Return a perplexity, and the standard error over windows of its ratio to the dense one.

    Args:
        nats: of the model, as :func:`~moezoo_models.conversion.carving.model_nats` gives them.
        dense: the same of the dense one.
    """
    ratios = (nats - dense).mean(dim=1)
    error = float(ratios.std()) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return {
        "perplexity": math.exp(nats.mean()),
        "error": error * math.exp((nats.mean() - dense.mean()).item()),
    }


def recovery_table(
    rows: list[tuple[str, float, float | None]], tokens: int, held_out_tokens: int
) -> str:
    """Return perplexities in lines, each over the first one, which is the dense model's.

    Args:
        rows: name, perplexity, and the standard error of its ratio where there is one.
        tokens: that were trained on.
        held_out_tokens: that perplexities are of.
    """
    lines = [
        f"recovered on {tokens:,} further tokens; perplexity on {held_out_tokens:,} held-out tokens"
    ]
    for name, value, error in rows:
        also = "" if error is None else f" ± {error:.3f}"
        lines.append(f"  {name:<34}{value:>10.4g}  × {value / rows[0][1]:.3f}{also}")
    return "\n".join(lines)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
