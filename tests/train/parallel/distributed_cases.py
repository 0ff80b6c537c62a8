"""What test_strategies.py runs, once in its own process and once in two."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.device_mesh import init_device_mesh

from moezoo import PEER, STEM, DenseFFN, InputError, MemoryPlus, RouterOptions, SparseMoE
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.data.loaders import ResumableLoader
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.parallel.distributed import ParallelDims, parallelize
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.parallel.state_dicts import full_state_dict, gather_tensors
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel

VOCABULARY, WIDTH, WINDOWS = 40, 16, 4

LAYERS = {
    "dense": partial(DenseFFN, d_ff=32),
    "moe": partial(SparseMoE, num_experts=4, top_k=2, d_expert=8, num_shared_experts=1),
    "three": partial(SparseMoE, num_experts=3, top_k=2, d_expert=8),
    "biased": partial(
        SparseMoE,
        num_experts=4,
        d_expert=8,
        router=RouterOptions(score="sigmoid", selection_bias=True),
    ),
    "peer": partial(PEER, num_experts=64, num_heads=2, top_k=4),
    "memory": partial(MemoryPlus, num_keys=8, num_heads=2, top_k=4, value_pool="values"),
    "sparse memory": partial(MemoryPlus, num_keys=8, num_heads=2, top_k=4, sparse=True),
    "sparse peer": partial(PEER, num_experts=64, num_heads=2, top_k=4, sparse=True),
    # Two ranks do not divide these rows.
    "token rows": partial(STEM, d_ff=24, vocab_size=VOCABULARY + 1),
    "sparse rows": partial(STEM, d_ff=24, vocab_size=VOCABULARY + 1, sparse=True),
    "offloaded rows": partial(STEM, d_ff=24, vocab_size=VOCABULARY + 1, sparse=True, offload=True),
}
STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "replicas": partial(FSDP2Strategy, replicas=2),
    "expert_parallel": partial(FSDP2Strategy, expert_parallel=2),
}
# Adam divides by the gradient's size: rounding in a gradient of nearly zero would decide a whole
# step. A larger eps makes this a comparison of gradients.
ADAMW = OptimizerConfig(lr=2e-3, eps=1e-3)
MUON = OptimizerConfig("muon", lr=2e-3, eps=1e-3, muon_lr=2e-3, muon_dtype="float32")


@dataclass(frozen=True)
class Case:
    """A training run, apart from its strategy."""

    layer: str
    steps: int = 6
    optimizer: OptimizerConfig = ADAMW
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    adapters: bool = False
    harm: bool = False


CASES = {layer: Case(layer) for layer in ("dense", "moe", "peer", "memory")} | {
    "muon": Case("moe", optimizer=MUON),
    # Two processes do not divide three experts, and share their rows.
    "rows": Case("three", optimizer=MUON),
    # Epochs of three batches: every other step has one.
    "accumulation": Case("moe", trainer={"accumulate_grad_batches": 2, "limit_train_batches": 3}),
    "activation checkpointing": Case("moe", model={"activation_checkpointing": True}),
    "before attention": Case("moe", model={"router_input": "pre_attention"}),
    "bf16": Case("moe", trainer={"precision": "bf16-mixed"}),
    "biased": Case("biased", trainer={"precision": "bf16-mixed"}),
    "sparse memory": Case("sparse memory"),
    "sparse peer": Case("sparse peer"),
    "token rows": Case("token rows"),
    "sparse rows": Case("sparse rows"),
    "offloaded rows": Case("offloaded rows"),
    "adapters": Case("moe", adapters=True),
    "skipped": Case("biased", model={"on_nan": "skip"}, harm=True),
    "skipped peer": Case("peer", model={"on_nan": "skip"}, harm=True),
    "in parts": Case("memory", model={"build_in_parts": True}),
}
TWO_PROCESSES = [(name, strategy) for name in list(CASES)[:4] for strategy in STRATEGIES]
TWO_PROCESSES += [("muon", "fsdp2"), ("muon", "expert_parallel"), ("accumulation", "fsdp2")]
TWO_PROCESSES += [
    ("adapters", "fsdp2"),
    ("accumulation", "expert_parallel"),
    ("activation checkpointing", "fsdp2"),
]
TWO_PROCESSES += [("activation checkpointing", "expert_parallel"), ("bf16", "expert_parallel")]
TWO_PROCESSES += [("before attention", "fsdp2"), ("before attention", "expert_parallel")]
TWO_PROCESSES += [("skipped", "fsdp2"), ("skipped peer", "ddp"), ("skipped peer", "fsdp2")]
TWO_PROCESSES += [(name, s) for name in ("sparse memory", "sparse peer") for s in ("ddp", "fsdp2")]
TWO_PROCESSES += [("token rows", "expert_parallel"), ("offloaded rows", "fsdp2")]

ROWS = CASES["sparse rows"]
# Runs that are interrupted halfway: of 2 steps each, by Muon, as its state has two shapes.
HALF, INTERRUPTED = 2, Case("moe", 4, MUON)
WRITERS = {
    "fsdp2 file": FSDP2Strategy,
    "fsdp2 directory": partial(FSDP2Strategy, save_distributed_checkpoint=True),
    "expert_parallel file": partial(FSDP2Strategy, expert_parallel=2),
    "expert_parallel directory": partial(
        FSDP2Strategy, expert_parallel=2, save_distributed_checkpoint=True
    ),
}
# Which of the cases leave a checkpoint halfway, and go on from it once more.
SAVED = [("adapters", "fsdp2 file"), ("rows", "fsdp2 directory")]
SAVED += [("sparse rows", "expert_parallel file"), ("sparse rows", "expert_parallel directory")]
READINGS = [(writer, writer) for writer in WRITERS] + [
    ("one process", "fsdp2 file"),
    ("one process", "expert_parallel directory"),
    ("fsdp2 directory", "expert_parallel file"),
    ("expert_parallel directory", "fsdp2 file"),
]


class Batches:
    """Random windows, some labels of which are ignored; W processes share what one has alone."""

    def __init__(self, rank: int, processes: int) -> None:
        self.share = slice(rank * WINDOWS // processes, (rank + 1) * WINDOWS // processes)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(VOCABULARY, (WINDOWS, 9), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, : number % 8] = -100  # processes score different numbers of tokens
        return {"input_ids": ids[self.share, :-1], "labels": labels[self.share]}


class Windows(pl.LightningDataModule):
    """The batches, from where a run stands."""

    def train_dataloader(self) -> Any:
        batches: Any = Batches(self.trainer.global_rank, self.trainer.world_size)
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return ResumableLoader(batches, lambda: progress.state_dict()["total"]["processed"], 0)


class Record(pl.Callback):
    """Keep losses, and the gradient after a first step."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        parts = [outputs["lm_loss"], *outputs["aux"].values()]
        self.losses.append(trainer.strategy.reduce(torch.stack(parts), reduce_op="mean"))

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step == 1:
            found = {name: whole_gradient(p) for name, p in module.model.named_parameters()}
            kept = {n: g for n, g in found.items() if g is not None and not g.is_sparse}
            whole = gather_tensors(kept)
            self.gradients = {name: gradient.clone() for name, gradient in whole.items()}


class Half(Checkpoint):
    """Leave a checkpoint halfway, behind all other callbacks, and go on.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == HALF:
            trainer.save_checkpoint(self.path)


class Harm(pl.Callback):
    """Let the last process compute NaN in the third step, whatever the others do."""

    def on_train_start(self, trainer, module) -> None:
        def spoil(layer, args, hidden) -> torch.Tensor:
            last = trainer.global_rank == trainer.world_size - 1
            return hidden * float("nan") if last and trainer.global_step == 2 else hidden

        module.model.get_input_embeddings().register_forward_hook(spoil)


def whole_gradient(parameter: Any) -> torch.Tensor | None:
    """Return a parameter's gradient, put together by DeepSpeed if that has it in parts."""
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def train(
    case: Case,
    strategy: Any,
    folder: Path,
    steps: int | None = None,
    resume: Path | None = None,
    save: Path | None = None,
    directory: Path | None = None,
    after: Callable[[pl.Trainer, LanguageModel], Any] | None = None,
) -> dict[str, Any]:
    """Train, and give losses, the second step's gradient and the last step's parameters.

    Args:
        case: the run.
        strategy: Lightning's.
        folder: where the model is that adapters are put on.
        steps: optimizer steps, if others than the case's.
        resume: checkpoint to begin from.
        save: checkpoint to leave halfway.
        directory: of the trained model, to leave.
        after: what else to do then; what it gives is given along.
    """
    pl.seed_everything(1, verbose=False)
    start = {"initialize_from": str(folder / "base"), "lora": LoRAOptions(rank=2)}
    module = LanguageModel(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        num_layers=2,
        num_heads=2,
        max_length=32,
        ffn=LAYERS[case.layer],
        optimizer=case.optimizer,
        schedule=ScheduleConfig("constant", warmup_steps=2),
        **case.model,
        **(start if case.adapters else {}),
    )
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=strategy,
        max_steps=steps or case.steps,
        max_epochs=-1,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=[record, *([Harm()] if case.harm else []), *([Half(save)] if save else [])],
        **case.trainer,
    )
    trainer.fit(module, Windows(), ckpt_path=resume, weights_only=True)
    if directory is not None:
        module.save(directory, None)
    found = {} if after is None else {"after": after(trainer, module)}
    return found | {
        "losses": torch.stack(record.losses),
        "gradients": record.gradients,
        "parameters": full_state_dict(module.model),
    }


def make_base(folder: Path) -> None:
    """Leave the model that adapters are put on."""
    config = MoezooConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn=[{"layers": "all", **LAYERS["moe"](WIDTH).config()}],
    )
    torch.manual_seed(2)
    save_checkpoint(folder / "base", MoezooForCausalLM(config))


def peak_of_building() -> tuple[float, float]:
    """Build a large model in parts, and give its size and how much memory grew at most, in MiB."""
    options = {"d_model": 256, "num_layers": 16, "ffn": partial(DenseFFN, d_ff=4096)}
    module = LanguageModel(vocab_size=VOCABULARY, num_heads=2, build_in_parts=True, **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is to be the present
    before = _resident("VmRSS")
    parallelize(
        module.model, ParallelDims(mesh, None, None, torch.device("cpu")), module.deferred_init
    )
    size = sum(p.numel() * p.element_size() for p in module.model.parameters()) / 2**20
    return size, _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def checkpoint_path(folder: Path, writer: str) -> Path:
    """Name the checkpoint of an interrupted run."""
    return folder / f"half of {writer}.ckpt"


def refusals(folder: Path, trainer: pl.Trainer, module: LanguageModel) -> list[str]:
    """Let the last process's part of a model be NaN, and give what saving it says."""
    weight: Any = module.model.lm_head.weight
    if trainer.global_rank == trainer.world_size - 1:
        weight.data.to_local().view(-1)[-1] = float("nan")
    said = []
    for save in (
        lambda: trainer.save_checkpoint(checkpoint_path(folder, "NaN")),
        lambda: module.save(folder / "model of NaN", None),
    ):
        try:
            save()
        except InputError as error:
            said.append(str(error))
    return said


def keep(folder: Path, name: str, result: Any) -> None:
    """Leave the first process's result for the test to read."""
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{name}.pt")


def run_program(main: Callable[[Path, list[str]], None]) -> None:
    """Run the function in this one of several processes, with what the test gave to all."""
    torch.set_num_threads(1)
    quiet_lightning()
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()


def main(folder: Path, arguments: list[str]) -> None:
    """Run everything that wants two processes."""
    for name, strategy in TWO_PROCESSES:
        result = train(CASES[name], STRATEGIES[strategy](), folder)
        keep(folder, f"{name}, {strategy}", result)
    for name, writer in SAVED:
        case, strategy, named = CASES[name], WRITERS[writer], f"{name}, {writer}"
        path = checkpoint_path(folder, named)
        keep(folder, named, train(case, strategy(), folder, save=path))
        merged = folder / "merged" if case.adapters else None
        again = train(case, strategy(), folder, resume=path, directory=merged)
        keep(folder, f"{named} again", again)
    for writer, strategy in WRITERS.items():
        path = checkpoint_path(folder, writer)
        keep(folder, f"whole, {writer}", train(INTERRUPTED, strategy(), folder, save=path))
    for writer, reader in READINGS:
        resumed = train(
            INTERRUPTED, WRITERS[reader](), folder, resume=checkpoint_path(folder, writer)
        )
        keep(folder, f"{writer} to {reader}", resumed)
    path = checkpoint_path(folder, "rows of one process")
    resumed = train(ROWS, STRATEGIES["expert_parallel"](), folder, resume=path)
    keep(folder, "rows of one process", resumed)
    for writer in ("fsdp2 file", "fsdp2 directory"):
        spoilt = partial(refusals, folder)
        result = train(CASES["dense"], WRITERS[writer](), folder, steps=1, after=spoilt)
        keep(folder, f"refusals, {writer}", result["after"])
    if sys.platform == "linux":
        keep(folder, "peak", peak_of_building())
    run(arguments)


if __name__ == "__main__":
    run_program(main)
