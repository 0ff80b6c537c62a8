"""``moezoo plan``: memory, traffic and time of a training run on many GPUs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from moezoo.command.tables import count, print_table
from moezoo.errors import InputError, check_int
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.finetune.pretrained import check_length
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.measure.throughput import count_parameters
from moezoo_train.plan.choices import check_layouts, yaml_lines
from moezoo_train.plan.estimate import KINDS, Estimate, Planner, best
from moezoo_train.plan.figure import draw
from moezoo_train.plan.laws import read_laws
from moezoo_train.plan.layouts import LAYOUTS, Memory
from moezoo_train.plan.machine import MACHINES, machine
from moezoo_train.plan.prediction import predict
from moezoo_train.plan.setup import Setup, precision
from moezoo_train.run.cli import TRAINER_DEFAULTS, MoezooCLI
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.parser import Parser
from moezoo_train.run.precision import RunTrainer
from moezoo_train.run.presets import describe_preset

_DESCRIPTION = "Plan a training run: memory, traffic and bounds on time, by formula."
_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "gpus": (int, 8, "how many GPUs"),
    "gpu": (str | None, None, f"which: {', '.join(MACHINES)}; null if described by the next"),
    "memory": (float | None, None, "GiB of a GPU"),
    "bandwidth": (float | None, None, "GB/s of its own memory"),
    "flops": (float | None, None, "dense TFLOP/s in the precision of the run"),
    "link": (float | None, None, "GB/s to GPUs of the same node, one direction"),
    "network": (float | None, None, "GB/s per GPU to other nodes"),
    "gpus_per_node": (int | None, None, "GPUs of a node; by default 8"),
    "layout": (str, ",".join(LAYOUTS), "which, separated by commas"),
    "expert_parallel": (
        int | None,
        None,
        "of fsdp2: GPUs that share one set of experts; null tries every number",
    ),
    "replicas": (int | None, None, "of fsdp2: copies of the model; null tries every number"),
    "pictures": (str | None, "runs/plan", "folder of plan.png and plan.svg; null draws none"),
    "law": (str | None, None, "laws.json of moezoo compare RUNS --law: also print their losses"),
    "json": (bool, False, "print JSON instead of tables"),
}


def run(argv: list[str]) -> None:
    """Run the command, e.g. ``["plan", "--config", "configs/moe.yaml", "--gpu", "h200"]``.

    Every option and every key of a configuration that `moezoo fit` takes is taken, and every other
    refused.

    Raises:
        InputError: something in the command line or the configuration is wrong.
    """
    quiet_lightning()
    PlanCLI(
        LanguageModel,
        TokenDataModule,
        save_config_callback=None,
        trainer_class=RunTrainer,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        seed_everything_default=0,
        parser_class=Parser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=["fit", *argv[1:]],
    )


class PlanCLI(MoezooCLI):
    """The command line of ``fit`` with the plan's own options; it builds no trainer."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List ``fit`` only, whose options these are."""
        return {"fit": MoezooCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the plan's options to the run's."""
        super().add_arguments_to_parser(parser)
        group = parser.add_argument_group("Plan")
        for name, (kind, default, text) in _OPTIONS.items():
            group.add_argument(f"--{name}", type=kind, default=default, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse as ``fit`` does, under the name of ``plan``."""
        own = self.subcommand_parser("fit")
        own.prog, own.description = "moezoo plan", _DESCRIPTION
        super().parse_arguments(parser, args)

    def set_ckpt_path(self) -> None:
        """Read no checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Make no room: nothing is trained. Leave out what only a running trainer needs."""
        config = self.config["fit"]
        if config["model"]["initialize_from"] is not None:
            raise InputError(
                "model.initialize_from: plan reads no weights; set it to null and describe the "
                "model by d_model, num_layers, ffn and so on"
            )
        if config["model"]["attention"] in ("flash_attention_2", "flex_attention"):
            config["model"]["attention"] = "sdpa"  # saves the same, and runs on every machine
        for name in ("callbacks", "plugins", "logger", "profiler"):
            config["trainer"][name] = None
        config["trainer"]["strategy"] = "auto"

    def instantiate_classes(self) -> None:
        """Build data and model, the model without its weights."""
        with torch.device("meta"):
            self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self.instantiated("data")
        self.model = self.instantiated("model")

    def run_subcommand(self, subcommand: str) -> None:
        """Plan, in place of fitting."""
        options, data = self.config_init["fit"], self.datamodule
        check_length(self.model.model, data.sequence_length)
        setup = Setup.of(
            self.model,
            precision(options["trainer"]["precision"]),
            data.batch_size,
            data.sequence_length,
            check_int(
                "trainer.accumulate_grad_batches", options["trainer"]["accumulate_grad_batches"]
            ),
        )
        if said := describe_preset(self.config["fit"]["model"], self.model.model.config):
            print(said, file=sys.stderr)
        own = Options(**{name: options[name] for name in _OPTIONS})
        plan(setup, own, options["trainer"]["max_steps"])


@dataclass(frozen=True)
class Options:
    """The plan's own options; the command's help says what they are."""

    gpus: int
    gpu: str | None = None
    memory: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    link: float | None = None
    network: float | None = None
    gpus_per_node: int | None = None
    layout: str = ",".join(LAYOUTS)
    expert_parallel: int | None = None
    replicas: int | None = None
    pictures: str | None = None
    law: str | None = None
    json: bool = False


def plan(setup: Setup, options: Options, steps: int = -1) -> list[Estimate]:
    """Estimate the layouts, print and draw them.

    Args:
        setup: the run.
        options: of the plan.
        steps: optimizer steps, which scaling laws ask for; -1 if they are not limited.

    Raises:
        InputError: an option is out of range, or none of the layouts can be had.
    """
    numbers = {"expert_parallel": options.expert_parallel, "replicas": options.replicas}
    given = [name for name, number in numbers.items() if number is not None]
    for name in given:
        check_int(name, numbers[name])
    layouts = check_layouts(options.layout, given)
    gpus = check_int("gpus", options.gpus)
    laws = [] if options.law is None else read_laws(options.law)
    kind = machine(
        options.gpu,
        options.memory,
        options.bandwidth,
        options.flops,
        options.link,
        options.network,
        options.gpus_per_node,
    )
    planner = Planner(setup, kind, options.expert_parallel, options.replicas)
    refused = {name: reason for name in layouts if (reason := planner.refusal(name, gpus))}
    if len(refused) == len(layouts):
        name, reason = next(iter(refused.items()))
        raise InputError(f"layout: {name} cannot be had: {reason}; choose another")
    possible = [name for name in layouts if name not in refused]
    estimates = [one for name in possible for one in planner.rows(name, gpus)]
    losses = predict(laws, setup.model, estimates[0].tokens_per_step, steps) if laws else []
    if options.json:
        rows = [one.as_dict() for one in estimates]
        figures: dict[str, Any] = {"machine": asdict(kind), "layouts": rows}
        if laws:
            figures["losses"] = [{**asdict(one), "law": one.law.name} for one in losses]
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        report(setup, planner, estimates, refused)
        for one in losses:
            print(one)
    if options.pictures is not None:
        paths = draw(Path(options.pictures), planner, possible, gpus)
        if not options.json:
            print("Pictures:", ", ".join(str(path) for path in paths))
    return estimates


def report(
    setup: Setup, planner: Planner, estimates: list[Estimate], refused: dict[str, str]
) -> None:
    """Print the tables."""
    total, active = count_parameters(setup.model)
    kind, first = planner.machine, estimates[0]
    print(
        f"{count(total)} parameters, {count(active)} active per token, {setup.precision.name}; "
        f"{first.plan.gpus} × {kind.name} of {size(kind.memory)}, {kind.gpus_per_node} per node; "
        f"{int(first.tokens_per_step):,} tokens and "
        f"{count(int(first.flops * first.plan.gpus))}FLOP per step\n"
    )
    names = [
        name for name in Memory._fields if any(getattr(e.plan.memory(), name) for e in estimates)
    ]
    padded = any(one.plan.padding for one in estimates)
    columns = _first_columns(estimates)
    columns += [*(f">{name.replace('_', ' ')}" for name in names), ">total", "fits"]
    columns += ["padding"] if padded else []
    rows = []
    for one in estimates:
        memory = one.plan.memory()
        cells = [size(getattr(memory, name)) for name in names]
        cells += [size(memory.total), "yes" if one.fits else "no"]
        cells += [", ".join(one.plan.padding) or "-"] if padded else []
        rows.append([*_first_cells(one, estimates), *cells])
    print_table("Memory of one GPU", columns, rows)
    _print_traffic(estimates)
    for name, reason in refused.items():
        print(f"{name} cannot be had: {reason}.")
    fitting = [one for one in estimates if one.fits]
    if not fitting:
        least = best(estimates)
        print(
            f"Nothing fits into {size(kind.memory)}; the least is {least.choice.label}, "
            f"{size(least.plan.memory().total)}."
        )
        return
    fastest = best(fitting)
    print(
        f"Highest bound on speed of what fits: {fastest.choice.label}, limited by "
        f"{fastest.bounds.largest}. For moezoo fit:\n"
    )
    trainer = fastest.choice.trainer(fastest.plan.gpus, kind.gpus_per_node)
    print("\n".join(yaml_lines(trainer)), end="\n\n")


def _print_traffic(estimates: list[Estimate]) -> None:
    kinds = [k for k in KINDS if any(c.kind == k for e in estimates for c in e.plan.collectives())]
    columns = _first_columns(estimates)
    columns += [*(f">{kind.replace('_', '-')}" for kind in kinds), ">sent"]
    columns += [">compute", ">memory", ">network", ">step ≥", ">tokens/s ≤"]
    rows = []
    for one in estimates:
        exchanged = one.plan.collectives()
        cells = [size(sum(c.size for c in exchanged if c.kind == kind)) for kind in kinds]
        cells.append(size(sum(c.sent for c in exchanged)))
        cells += [duration(seconds) for seconds in (*one.bounds, one.bounds.step)]
        rows.append([*_first_cells(one, estimates), *cells, count(int(one.tokens_per_second))])
    print_table("Exchanges of one GPU and bounds on time, per step", columns, rows)


def _first_columns(estimates: list[Estimate]) -> list[str]:
    return ["layout", *(f">{name.replace('_', ' ')}" for name in _numbers(estimates))]


def _first_cells(one: Estimate, estimates: list[Estimate]) -> list[str]:
    numbers = [one.choice.options[name] for name in _numbers(estimates)]
    return [one.plan.layout, *(str(number) if number > 1 else "-" for number in numbers)]


def _numbers(estimates: list[Estimate]) -> list[str]:
    """Name the numbers of ``fsdp2`` that any of the layouts has."""
    found = [one.choice.options for one in estimates]
    return [name for name in found[0] if any(options[name] > 1 for options in found)]


def size(number: float) -> str:
    """Write bytes with three digits and a binary unit: ``12.3 GiB``; 0 as a dash."""
    if not number:
        return "-"
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = 0
    # Three digits of 1000 and more would be four.
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.3g} {units[power]}"


def duration(seconds: float) -> str:
    """Write seconds with three digits: ``12.3 ms``; 0 as a dash."""
    if not seconds:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
