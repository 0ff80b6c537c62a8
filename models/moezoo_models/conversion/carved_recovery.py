"""`moezoo carve --recover`, and the pruned model that shows what of it is routing's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.checkpoints.directory import quiet, read_json
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carving import model_nats, read_block
from moezoo_models.conversion.convert import Conversion
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.recovery import Recovery, figures_of, recovery_table
from moezoo_models.conversion.source import Source, projection_name
from moezoo_models.conversion.targets import Mixture
from moezoo_models.model.causal_lm import MoezooForCausalLM


class CarvedRecovery(Recovery[Conversion]):
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
        super().__init__(source, target, text, options, "carve")
        self._control = control

    @property
    def pruned(self) -> Path:
        """Where the blocks of the pruned model are kept until the end."""
        return self._scratch / "control"

    def carved(self, kind: str, options: dict[str, Any], mixture: Mixture) -> Conversion | None:
        """Return the report of the target, if it is this carve already, and untrained.

        Args:
            kind: name of the format.
            options: of the carve.
            mixture: its shapes.
        """
        found = self.earlier(options)
        if found is None or (self._control and not self.pruned.is_dir()):
            return None
        same = (
            found["target"]["architecture"] == kind
            and found["target"]["layers"] == list(mixture.layers)
            and "recovery" not in found["extra"]
        )
        if not same:
            return None
        return Conversion(
            **{each.name: found[each.name] for each in dataclasses.fields(Conversion)}
        )

    def run(self, made: Conversion, device: torch.device, max_shard_size: str) -> Conversion:
        """Train as :meth:`Recovery.run` does, and print figures."""
        recovered = super().run(made, device, max_shard_size)
        print(summary(recovered))
        return recovered

    def _beside(
        self, teacher: Any, made: Conversion, dense_nats: Tensor
    ) -> dict[str, dict[str, float]]:
        """Recover the pruned model; its figures are kept for a run that goes on."""
        if not self._control:
            return {}
        file, identity = self._scratch / "control.json", self._identity(made)
        if file.is_file() and (found := read_json(file))["identity"] == identity:
            return {"control_recovered": found["figures"]}
        student = pruned_model(self._source, self.pruned, made.target["layers"])
        student.to(teacher.device)
        self._train("control", teacher, student, made)
        figures = figures_of(model_nats(student, self._text), dense_nats)
        with atomic_write(file, "w") as opened:
            json.dump({"identity": identity, "figures": figures}, opened)
        (self._scratch / "control.safetensors").unlink(missing_ok=True)
        return {"control_recovered": figures}


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
    held_out = made.extra["calibration"]["held_out_tokens"]
    return recovery_table(rows, recovery["tokens"], held_out)
