"""DeepSpeed's ZeRO as a Lightning strategy, with checkpoints that every strategy reads.

Lightning's own strategy for DeepSpeed differs from every other in what it computes: it turns
parameters and buffers to the lower precision, router and its biases included; clips all gradients
by one norm, after an update by what is not finite; and reads checkpoints by unpickling. This one
drives DeepSpeed's engine such that W processes compute what one does (Rajbhandari et al. 2020,
arXiv:1910.02054): parameters stay fp32, beside autocast, clip groups are clipped apart, and
checkpoints are those of one process. It runs on CPUs too, where Lightning's refuses to.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.errors import InputError, check_int, check_number
from moezoo.matrices.masked import Latent
from moezoo_train.adapters.deepspeed import (
    Fragment,
    fragment_of,
    local_gradients,
    never_compile_shm,
)
from moezoo_train.adapters.lightning import accumulates, finish_closure
from moezoo_train.optim.clipping import MAIN
from moezoo_train.parallel.state_dicts import full_state_dict, gathered
from moezoo_train.parallel.zero_states import gather_states, load_states

if TYPE_CHECKING:
    from moezoo_train.trained import Parallelized

BUCKET = 200_000_000
"""Most numbers of a bucket of gradients or parameters, as in Lightning's strategy."""
PRECISIONS = ("32-true", "bf16-mixed")


class ZeROStrategy(DDPStrategy):
    """Shard the optimizer's states, the gradients and the parameters over processes (ZeRO).

    Flattened tensors are sharded, so nothing that needs whole matrices goes with it. Every process
    builds the whole model once, at the start. For ``validate`` and ``test`` it is not sharded.

    Args:
        stage: 1 shards the optimizer's states, 2 the gradients too, 3 the parameters too.
        timeout_minutes: how long a process waits for the others before it gives up.
    """

    def __init__(self, stage: int = 2, timeout_minutes: float = 30.0) -> None:
        minutes = check_number("timeout_minutes", timeout_minutes, minimum=0.05)
        super().__init__(timeout=timedelta(minutes=minutes))
        self.stage = check_int("stage", stage, maximum=3)
        self._engine: Any = None
        self._groups: list[list[nn.Parameter]] = []

    def setup_environment(self) -> None:
        """Initialize the process group.

        Raises:
            InputError: DeepSpeed is missing.
        """
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                "trainer.strategy: ZeRO is DeepSpeed's, which is not installed; "
                "pip install 'moezoo[deepspeed]'"
            )
        super().setup_environment()
        assert self.cluster_environment is not None
        # DeepSpeed looks here, whoever started the processes.
        os.environ["LOCAL_RANK"] = str(self.local_rank)

    def setup(self, trainer: Trainer) -> None:
        """Hand model and optimizer to DeepSpeed, if this is training."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._start_engine()
        else:
            self.model_to_device()
        self.setup_precision_plugin()

    def _start_engine(self) -> None:
        # Else it takes a GPU where there is one, even if training is on CPUs.
        os.environ.setdefault("DS_ACCELERATOR", self.root_device.type)
        import deepspeed

        (optimizer,) = self.optimizers
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        module, config = self._module(), self._config()
        # DeepSpeed calls torch's collectives by their earlier names, and each call is a warning.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")
        never_compile_shm()
        if self.stage == 3:
            # One parameter after the other goes to the device: all may be too many for it.
            deepspeed.zero.Init(module, config_dict_or_path=config, dtype=torch.float32)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.root_device)
        on_device = Namespace(device_rank=self.root_device.index)
        self._engine, *_ = deepspeed.initialize(
            args=None if self.root_device.index is None else on_device,
            model=module,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        self.model = self._engine

    def _config(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration; clipping and accumulation are done here."""
        bucket = min(BUCKET, sum(p.numel() for group in self._groups for p in group))
        overlap = self.stage > 1 and self.root_device.type == "cuda"
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": overlap,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
        }
        if self.precision_plugin.precision == "bf16-mixed":
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # which would sum their gradients in bf16
            }
        return config

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute the gradient by DeepSpeed, which reduces it after the last micro-batch."""
        module = self._module()
        loss: Tensor = self.precision_plugin.pre_backward(closure_loss, module)
        last = not accumulates(module.trainer)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)  # Lightning has divided the loss
        return self.precision_plugin.post_backward(loss, module)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: :meth:`backward` tells DeepSpeed which micro-batch is the last."""
        yield

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Update this process's shard by DeepSpeed, which all-gathers the parameters."""
        result = closure()
        finish_closure(self.precision_plugin, self._module(), optimizer)
        self._engine.step()
        return result

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return this process's shards of the gradient by clip group, to be changed in place.

        There are some between the last micro-batch's backward pass and the step.
        """
        groups: dict[str, list[Tensor]] = {MAIN: []}
        for group, parts in local_gradients(self._engine.optimizer, self.stage).items():
            name = self.optimizers[0].param_groups[group]["clip_group"]
            groups.setdefault(name, []).extend(parts)
        return {name: parts for name, parts in groups.items() if parts}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Return true: DeepSpeed takes the model before a checkpoint is read."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full state dict on rank 0."""
        return full_state_dict(self._module(), keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's shards of the tensors."""
        module, state = self._module(), checkpoint["state_dict"]
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                with gathered(tensor, change=True):
                    tensor.copy_(state[name])
        if self._engine is not None:
            self._engine.optimizer.refresh_fp32_params()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full optimizer state on rank 0."""
        (inner,) = self.optimizers
        return gather_states(inner, self._groups, self._fragments(), keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shards of the optimizer's state."""
        (inner,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        load_states(inner, self._groups, self._fragments(), state)

    def _fragments(self) -> dict[nn.Parameter, Fragment]:
        zero = self._engine.optimizer
        return {p: fragment_of(zero, p, i) for i, group in enumerate(self._groups) for p in group}

    def _module(self) -> LightningModule:
        module: Any = self.lightning_module
        assert module is not None
        return module


for _stage, _what in ((1, "optimizer states"), (2, "and gradients"), (3, "and parameters")):
    StrategyRegistry.register(
        f"zero{_stage}", ZeROStrategy, description=f"DeepSpeed: {_what} in shards", stage=_stage
    )


def check_zero(precision: str, module: Parallelized) -> None:
    """Refuse options that would compute something else when sharded.

    Args:
        precision: as Lightning names it.
        module: what is trained.

    Raises:
        InputError: names the option to change.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: {precision} does not go with ZeRO; give {' or '.join(PRECISIONS)}"
        )
    if module.optimizer_config.name == "muon":
        raise InputError(
            "optimizer.name: Muon wants whole matrices, and ZeRO divides them anywhere; give "
            "adamw, or trainer.strategy fsdp2"
        )
    if module.optimizer_config.name == "sgd":
        raise InputError("optimizer.name: sgd has not been tried with ZeRO; give adamw")
    if module.guard.on_nan == "skip" or module.guard.spikes is not None:
        option = "on_nan" if module.guard.on_nan == "skip" else "spikes"
        other = "stop" if option == "on_nan" else "null"
        raise InputError(
            f"model.{option}: ZeRO cannot skip a step; give {other}, or trainer.strategy ddp or "
            "fsdp2"
        )
    if module.compile_model:
        raise InputError(
            "model.compile: ZeRO's hooks do not go with torch.compile; set it to false, or give "
            "trainer.strategy ddp or fsdp2"
        )
    if module.part.lora is not None:
        raise InputError("trainer.strategy: adapters do not go with ZeRO; use fsdp2 or ddp")
    if module.part.neurons is not None:
        raise InputError("trainer.strategy: ZeRO has not been tried with neurons; use ddp")
    if any(isinstance(part, Latent) for part in module.model.modules()):
        raise InputError(
            "trainer.strategy: ZeRO keeps weights where their masks are not; give ddp or fsdp2"
        )
