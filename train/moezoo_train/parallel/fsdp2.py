"""Many processes as one: FSDP2, replicas, and experts shared by ranks, as a Lightning strategy.

``trainer.strategy`` takes any of Lightning's; ``ddp`` needs nothing from here. ``fsdp2`` is
:class:`FSDP2Strategy`. Every process has data of its own, whatever the layout: W processes with
batches of B train as one process with batches of W B.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from moezoo.errors import InputError, check_int, check_number
from moezoo_train.parallel.distributed import (
    Layout,
    wait_at_most,
)
from moezoo_train.parallel.sharded_checkpoints import load_sharded, save_sharded
from moezoo_train.parallel.whole_tensors import split_like, whole_optimizer_state, whole_tensors


class FSDP2Strategy(ModelParallelStrategy):
    """Each process keeps a part of parameters, gradients and optimizer states (FSDP2).

    A block's parameters are gathered when it computes. Checkpoints are the same as those of one
    process: written under any layout, read under any other.

    Args:
        expert_parallel: ranks that share the experts of a layer; tokens travel to them. A rank's
            experts are divided like the rest over the processes that have the same ones.
        replicas: copies of the whole model, each divided over its share of the processes. With as
            many replicas as processes nothing is divided, as in DDP.
        save_distributed_checkpoint: every process writes its part, into a directory of safetensors
            files, instead of the first process a file of all.
        timeout_minutes: how long a process waits for the others before it gives up.

    Attributes:
        layout: the meshes, once processes have met.

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
        self.layout: Layout | None = None

    def setup_environment(self) -> None:
        """Let the processes meet, and lay out the meshes."""
        processes = self.num_nodes * self.num_processes
        ranks = self.expert_parallel * self.replicas
        if processes % ranks:
            raise InputError(
                f"trainer.strategy: expert_parallel {self.expert_parallel} × replicas "
                f"{self.replicas} does not divide the {processes} processes; change them, or "
                "trainer.devices"
            )
        # Experts that are divided twice are put together in two steps, to save them; torch warns.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self._data_parallel_size, self._tensor_parallel_size = processes, 1
        super().setup_environment()
        kind = self.root_device.type
        dense = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            shape = (self.replicas, processes // self.replicas)
            dense = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        experts = beside = None
        if self.expert_parallel > 1:
            cube = init_device_mesh(
                kind,
                (self.replicas, processes // ranks, self.expert_parallel),
                mesh_dim_names=("replicate", "shard", "expert"),
            )
            experts = cube["expert"]
            if self.expert_parallel < processes:
                beside = cube["replicate", "shard"] if self.replicas > 1 else cube["shard"]
        for mesh in (dense, experts, beside):
            if mesh is not None:
                wait_at_most(self._patience, mesh)
        self.layout = Layout(dense, experts, beside, self.root_device)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning call :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the tensors: whole ones on the first process, or every process its parts."""
        assert self.lightning_module is not None
        state: dict[str, Tensor] = self.lightning_module.state_dict()
        if self._save_distributed_checkpoint:
            return state
        return whole_tensors(state, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state in the form that one process has."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if self._save_distributed_checkpoint:
            return state
        return whole_optimizer_state(state, keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a file from the first process, or a directory from all."""
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            save_sharded(checkpoint, path)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or of a directory the parts that this process keeps."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path)
        module = self._module()
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if fitting else []
        return load_sharded(path, module.state_dict(), optimizers)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Keep this process's parts of the tensors."""
        module = self._module()
        state = split_like(checkpoint["state_dict"], module.state_dict())
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this process's parts of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                number: split_like(values, dict.fromkeys(values, parameters[number]))
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})

    def _module(self) -> LightningModule:
        module: Any = self.lightning_module
        assert module is not None
        return module


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="FSDP2: parameters and optimizer states in shards"
)


def writes_directories(strategy: Strategy) -> bool:
    """Return whether every process writes its part of a checkpoint."""
    return isinstance(strategy, FSDP2Strategy) and strategy._save_distributed_checkpoint
