"""`moezoo carve --recover`: the carved blocks learn the dense model's predictions.

The carved checkpoint is complete before this begins and stays as it is until this is done: what is
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
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.command.messages import size
from moezoo.errors import InputError, going_on
from moezoo_models.checkpoints.atomic import atomic_write, replacing_directory
from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.checkpoints.directory import INDEX, quiet, read_json, write_model
from moezoo_models.checkpoints.locks import writing
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carving import model_nats, read_block
from moezoo_models.conversion.convert import REPORT, Conversion
from moezoo_models.conversion.distillation import Distillation, RecoveryOptions
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.source import Source, projection_name
from moezoo_models.conversion.targets import Mixture
from moezoo_models.conversion.writer import check_space
from moezoo_models.devices import free_memory
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.progress import progress_bar

_WEIGHTS = "*.safetensors"
_STATES = 4
"""Numbers per trained weight in memory: itself, its gradient and Adam's two moments."""


class Recovery:
    """The recovery of one carve.

    Args:
        source: the dense model.
        target: the carved checkpoint, which may still have to be made.
        text: has the tokens to train on, and those for perplexities.
        options: of the training.
        control: recover the pruned model of as much work too.
    """

    def __init__(
        self,
        source: Source,
        target: Path,
        text: Calibration,
        options: RecoveryOptions,
        control: bool,
    ) -> None:
        self._source, self._target, self._text = source, target, text
        self._options, self._control = options, control
        self._scratch = target.with_name(f".{target.name}.recovery")

    @property
    def pruned(self) -> Path:
        """Where the blocks of the pruned model are kept until the end."""
        return self._scratch / "control"

    def check(self, mixture: Mixture) -> None:
        """Refuse what has no room: both models and the optimizer in memory, its state on disk.

        Raises:
            InputError: names what is needed.
        """
        shapes = [torch.Size(each.shape).numel() for each in self._source.tensors.values()]
        block = self._source.block(0)
        trained = self._source.num_layers * sum(each.numel() for each in block.values())
        needed = 4 * (2 * sum(shapes) + (_STATES - 1) * trained)
        if needed > (free := free_memory()):
            raise InputError(
                f"recover: the dense model, the carved one and Adam need about {size(needed)} of "
                f"memory, and {size(free)} are free; leave it out, or take a machine with more"
            )
        # Two files of state, while one replaces the other; twice the checkpoint.
        states = 2 * (_STATES - 1) * 4 * trained
        kept = 4 * trained * self._control
        check_space(self._target, states + kept + 2 * sum(shapes) * mixture.dtype.itemsize)

    def carved(self, kind: str, options: dict[str, Any], mixture: Mixture) -> Conversion | None:
        """Return the report of the target, if it is this carve already, and untrained.

        Args:
            kind: name of the format.
            options: of the carve.
            mixture: its shapes.
        """
        file = self._target / REPORT
        if not file.is_file():
            return None
        found = read_json(file)
        same = (
            found.get("method") == "carve"
            and found["options"] == json.loads(json.dumps(options))
            and found["target"]["architecture"] == kind
            and found["target"]["layers"] == list(mixture.layers)
            and "recovery" not in found["extra"]
            and found["source"]["sha256"] == self._source.fingerprint()
        )
        if not same or (self._control and not self.pruned.is_dir()):
            return None
        return Conversion(
            **{each.name: found[each.name] for each in dataclasses.fields(Conversion)}
        )

    def run(self, carved: Conversion, device: torch.device, max_shard_size: str) -> Conversion:
        """Train, put the result in the place of the carved checkpoint, and print figures.

        Args:
            carved: what is there.
            device: where to compute.
            max_shard_size: as for the carve.

        Returns:
            The carve's report with that of the recovery.

        Raises:
            InputError: the target is no longer what was carved, or the training went wrong.
        """
        how = "the same command goes on where this one was"
        with writing(self._scratch, "target"), going_on(how):
            self._scratch.mkdir(exist_ok=True)
            teacher = load_any(self._source.directory).to(device)
            dense_nats = model_nats(teacher, self._text)
            figures = self._controlled(teacher, carved, dense_nats) if self._control else {}
            student = load_as_it_is(self._target, device)[0]
            dtypes = {name: each.dtype for name, each in _tensors(student)}
            losses = self._train("state", teacher, student.float(), carved)
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
                figures = {"recovered": _figures(nats, dense_nats), **figures}
                made = self._described(carved, fresh, figures, losses)
                (fresh / REPORT).write_text(
                    json.dumps(dataclasses.asdict(made), indent=2, ensure_ascii=False) + "\n",
                    encoding="utf-8",
                )
            shutil.rmtree(self._scratch, ignore_errors=True)
        print(summary(made))
        return made

    def _train(self, name: str, teacher: Any, student: Any, carved: Conversion) -> list[float]:
        """Train all feed-forward weights but routers; return the losses."""
        trained = trained_weights(student)
        run = Distillation(
            teacher,
            student,
            trained,
            self._text.recovery,
            self._options,
            self._scratch / f"{name}.safetensors",
            self._identity(carved),
        )
        with progress_bar() as bar:
            task = bar.add_task("recovering", total=run.steps)
            return run.run(partial(bar.advance, task))

    def _identity(self, carved: Conversion) -> str:
        """Hash what decides the result, so that another run's state is not continued."""
        digest = hashlib.sha256(self._text.recovery.numpy().tobytes())
        decides = [carved.target["sha256"], self._source.stamp(), torch.__version__]
        decides.append(dataclasses.asdict(self._options) | {"save_every": None})
        digest.update(json.dumps(decides, sort_keys=True).encode())
        return digest.hexdigest()

    def _controlled(
        self, teacher: Any, carved: Conversion, dense_nats: Tensor
    ) -> dict[str, dict[str, float]]:
        """Recover the pruned model; its figures are kept for a run that goes on."""
        file, identity = self._scratch / "control.json", self._identity(carved)
        if file.is_file() and (found := read_json(file))["identity"] == identity:
            return {"control_recovered": found["figures"]}
        student = pruned_model(self._source, self.pruned, carved.target["layers"])
        student.to(teacher.device)
        self._train("control", teacher, student, carved)
        figures = _figures(model_nats(student, self._text), dense_nats)
        with atomic_write(file, "w") as opened:
            json.dump({"identity": identity, "figures": figures}, opened)
        (self._scratch / "control.safetensors").unlink(missing_ok=True)
        return {"control_recovered": figures}

    def _change(self) -> str:
        return (
            f"`moezoo carve --recover` trained the feed-forward weights on "
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
        self,
        carved: Conversion,
        fresh: Path,
        figures: dict[str, dict[str, float]],
        losses: list[float],
    ) -> Conversion:
        files = sorted(fresh.glob(_WEIGHTS))
        recovery = {
            "tokens": self._text.recovery.numel(),
            "sha256": hashlib.sha256(self._text.recovery.numpy().tobytes()).hexdigest(),
            **dataclasses.asdict(self._options),
            "losses": losses,
            "figures": figures,
        }
        return dataclasses.replace(
            carved,
            target=carved.target | {"sha256": {each.name: _sha256(each) for each in files}},
            extra=carved.extra | {"recovery": recovery},
        )


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a recovery trains: those of feed-forward blocks.

    Routers stay: a chosen expert counts fully, so that nothing but a change of choice would
    change anything, which no gradient sees. So do the scales u of :class:`moezoo.CarvedMoE`, of
    which stock formats know nothing.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".mlp." in name and ".mlp.gate." not in name and not name.endswith(".mlp.u")
    }


def pruned_model(source: Source, blocks: Path, layers: list[int]) -> MoezooForCausalLM:
    """Build a dense model, in fp32, some of whose blocks have fewer neurons.

    Args:
        source: the dense model.
        blocks: directory of the smaller blocks, as :func:`~moezoo_models.conversion.carving.\
save_block` keeps them.
        layers: their numbers.
    """
    state = {name: source.read(name).float() for name in source.tensors}
    config = dense_config(source.raw)
    dense = dict(config.ffn[0]["init_args"])
    for layer in layers:
        block = read_block(blocks, layer)
        arguments = {**dense, "d_ff": len(block["up"])}
        rule = {"layers": [layer], "class_path": "moezoo.DenseFFN", "init_args": arguments}
        config.ffn = [*config.ffn, rule]
        for name, of, kind in _PLACES:
            if name in block:
                state[projection_name(layer, of, kind)] = block[name]
    config.check()
    with quiet():
        model = MoezooForCausalLM(config).float().eval()
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model


_PLACES = (
    ("gate", "gate", "weight"),
    ("up", "up", "weight"),
    ("down", "down", "weight"),
    ("bias_in", "up", "bias"),
    ("bias_out", "down", "bias"),
)


def summary(made: Conversion) -> str:
    """Return the figures of a recovery in one table with those before it."""
    recovery, before = made.extra["recovery"], made.extra["perplexity"]
    figures = recovery["figures"]
    rows = [
        ("dense", before["dense"], None),
        ("carved", before.get("loaded", before["carved"]), None),
        ("the same, recovered", *figures["recovered"].values()),
    ]
    if "control_recovered" in figures:
        rows.append(("pruned to as much work, refitted", before["control"], None))
        rows.append(("the same, recovered", *figures["control_recovered"].values()))
    lines = [
        f"recovered on {recovery['tokens']:,} further tokens; perplexity on "
        f"{made.extra['calibration']['held_out_tokens']:,} held-out tokens"
    ]
    for name, value, error in rows:
        also = "" if error is None else f" ± {error:.3f}"
        lines.append(f"  {name:<34}{value:>10.4g}  × {value / before['dense']:.3f}{also}")
    return "\n".join(lines)


def _figures(nats: Tensor, dense: Tensor) -> dict[str, float]:
    """Return a perplexity, and the standard error over windows of its ratio to the dense one."""
    ratios = (nats - dense).mean(dim=1)
    error = float(ratios.std()) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return {
        "perplexity": math.exp(nats.mean()),
        "error": error * math.exp((nats.mean() - dense.mean()).item()),
    }


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


__all__ = ["Recovery", "RecoveryOptions", "pruned_model", "summary", "trained_weights"]
