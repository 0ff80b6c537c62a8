"""FSDP2, replicas and expert parallelism as a Lightning strategy.

``trainer.strategy`` takes any of Lightning's; ``ddp`` needs nothing from here. ``fsdp2`` is
:class:`FSDP2Strategy`. Every process has data of its own, whatever the mesh: W processes with
batches of B train as one process with batches of W B.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from moezoo.errors import InputError, check_int, check_number
from moezoo_train.adapters.lightning import set_data_parallel
from moezoo_train.parallel.distributed import ParallelDims, wait_at_most
from moezoo_train.parallel.sharded_checkpoints import load_sharded, save_sharded
from moezoo_train.parallel.state_dicts import (
    full_optimizer_state_dict,
    gather_tensors,
    load_optimizer_shards,
    optimizer_shards,
    shard_like,
)


def parallel_dims(
    everything: DeviceMesh, expert_parallel: int, replicas: int, device: torch.device
) -> ParallelDims:
    """Return the meshes of so many replicas, in each of which groups share experts.

    Neighbouring processes share experts; then come those of the same replica.

    Args:
        everything: one-dimensional mesh of all processes.
        expert_parallel: ranks that share the experts of a layer.
        replicas: copies of the model; times ``expert_parallel`` they divide the processes.
        device: of this process.
    """
    kind, processes = device.type, everything.size()
    dp, ep, expert_dp = everything, None, None
    if replicas > 1:
        shape = (replicas, processes // replicas)
        dp = init_device_mesh(kind, shape, mesh_dim_names=("dp_replicate", "fsdp"))
    if expert_parallel > 1:
        shards = processes // (expert_parallel * replicas)
        cube = init_device_mesh(
            kind,
            (replicas, shards, expert_parallel),
            mesh_dim_names=("dp_replicate", "fsdp", "ep"),
        )
        ep = cube["ep"]
        if expert_parallel < processes:
            expert_dp = cube["dp_replicate", "fsdp"] if replicas > 1 else cube["fsdp"]
    return ParallelDims(dp, ep, expert_dp, device)


class FSDP2Strategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer states over processes (FSDP2).

    A block's parameters are all-gathered when it computes. Checkpoints are the same as those of one
    process: written under any number of processes, read under any other.

    Args:
        expert_parallel: ranks that share the experts of a layer; tokens are dispatched to them. A
            rank's experts are sharded like the rest over the processes that have the same ones.
        replicas: copies of the whole model, each sharded over its share of the processes. With as
            many replicas as processes nothing is sharded, as in DDP.
        save_distributed_checkpoint: every process writes its shards, into a directory of
            safetensors files, instead of rank 0 one file of all.
        timeout_minutes: how long a process waits for the others before it gives up.

    Attributes:
        writes_directories: whether every process writes its shards of a checkpoint.
        parallel_dims: the meshes, once the process group is initialized.

    Raises:
        InputError: the numbers do not divide the processes.
    """

    def __init__(
        self,
        expert_parallel: int = 1,
        replicas: int = 1,
        save_distributed_checkpoint: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        minutes = check_number("timeout_minutes", timeout_minutes, minimum=0.05)
        self._patience = timedelta(minutes=minutes)
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, timeout=self._patience
        )
        self.expert_parallel = check_int("expert_parallel", expert_parallel)
        self.replicas = check_int("replicas", replicas)
        self.writes_directories = save_distributed_checkpoint
        self.parallel_dims: ParallelDims | None = None

    def setup_environment(self) -> None:
        """Initialize the process group and the meshes."""
        processes = self.num_nodes * self.num_processes
        ranks = self.expert_parallel * self.replicas
        if processes % ranks:
            raise InputError(
                f"trainer.strategy: expert_parallel {self.expert_parallel} × replicas "
                f"{self.replicas} does not divide the {processes} processes; change them, or "
                "trainer.devices"
            )
        # Experts that are sharded twice are gathered in two steps when saved; torch warns.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        set_data_parallel(self, processes)
        super().setup_environment()
        dims = parallel_dims(
            self.device_mesh["data_parallel"],
            self.expert_parallel,
            self.replicas,
            self.root_device,
        )
        for mesh in (dims.dp, dims.ep, dims.expert_dp):
            if mesh is not None:
                wait_at_most(self._patience, mesh)
        self.parallel_dims = dims

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return true: Lightning calls :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full state dict on rank 0, or on every process its shards."""
        assert self.lightning_module is not None
        state: dict[str, Tensor] = self.lightning_module.state_dict()
        if self.writes_directories:
            return state
        return gather_tensors(state, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's full state on rank 0, or on every process its shards."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = optimizer_shards(inner)
        if self.writes_directories:
            return state
        return full_optimizer_state_dict(state, keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file from rank 0, or a directory from all ranks."""
        path = Path(self.broadcast(str(filepath)))
        if self.writes_directories:
            save_sharded(checkpoint, path)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or this process's shards from a directory."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path)
        module = self._module()
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if fitting else []
        return load_sharded(path, module.state_dict(), optimizers)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's shards of the tensors."""
        module = self._module()
        state = shard_like(checkpoint["state_dict"], module.state_dict())
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shards of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_shards(optimizer, state)

    def _module(self) -> LightningModule:
        module: Any = self.lightning_module
        assert module is not None
        return module


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="FSDP2: parameters and optimizer states in shards"
)


def writes_directories(strategy: Strategy) -> bool:
    """Return whether every process writes its shards of a checkpoint."""
    return isinstance(strategy, FSDP2Strategy) and strategy.writes_directories
