"""Parallelize a model for the strategy that trains it, or refuse the strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from moezoo.errors import InputError
from moezoo.experts.token_table import TokenTable
from moezoo_train.adapters.lightning import load_beside_parameters
from moezoo_train.parallel.distributed import (
    broadcast_from_rank0,
    keep_from_ddp,
    parallelize,
)
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.parallel.zero import ZeROStrategy, check_zero

if TYPE_CHECKING:
    from moezoo_train.trained import Parallelized


def check_strategy(strategy: Strategy, module: Parallelized, fitting: bool) -> None:
    """Refuse a strategy under which the layers do not work, or that does not go with an option.

    Raises:
        InputError: names the option to change.
    """
    if isinstance(strategy, FSDP2Strategy):
        if module.part.neurons is not None:
            raise InputError("trainer.strategy: fsdp2 has not been tried with neurons; use ddp")
        if module.part.lora is not None and strategy.expert_parallel > 1:
            raise InputError(
                "trainer.strategy.expert_parallel: ranks cannot share adapted experts; set it to 1"
            )
        if module.part.sparse_memory is not None and strategy.expert_parallel > 1:
            raise InputError(
                "trainer.strategy.expert_parallel: sparse_memory ranks the rows of whole tables; "
                "set it to 1"
            )
    elif isinstance(strategy, ZeROStrategy):
        if fitting:
            check_zero(strategy.precision_plugin.precision, module)
    elif isinstance(strategy, DeepSpeedStrategy):
        raise InputError(
            "trainer.strategy: Lightning's DeepSpeed reads checkpoints by unpickling; give zero1, "
            "zero2 or zero3 (moezoo_train.parallel.zero.ZeROStrategy)"
        )
    elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise InputError(
            "trainer.strategy: it does not divide these parameters; give fsdp2 "
            "(moezoo_train.parallel.fsdp2.FSDP2Strategy)"
        )


def parallelize_for(strategy: Strategy, module: Parallelized) -> None:
    """Prepare a model for a strategy: shard it, or synchronize its parameters.

    Raises:
        InputError: the strategy is one under which the layers do not work.
    """
    check_strategy(strategy, module, module.trainer.state.fn == TrainerFn.FITTING)
    if isinstance(strategy, FSDP2Strategy):
        assert strategy.parallel_dims is not None
        parallelize(module.model, strategy.parallel_dims, module.deferred_init)
        return
    if module.deferred_init is not None:
        module.deferred_init.materialize(module.model)
    if any(isinstance(part, TokenTable) and part.offload for part in module.model.modules()):
        load_beside_parameters(strategy)
    if isinstance(strategy, ZeROStrategy):
        model = module.model
        broadcast_from_rank0([*model.parameters(), *model.buffers()], strategy.root_device)
    elif isinstance(strategy, DDPStrategy):
        keep_from_ddp(cast(nn.Module, module), strategy.root_device)


def check_sparse_gradients(strategy: Strategy, compiled: bool) -> None:
    """Refuse strategies and options without sparse gradients.

    Raises:
        InputError: names the option to change.
    """
    if compiled:
        raise InputError(
            "model.compile: torch.compile has no sparse gradients; set it to false, or the "
            "layer's sparse to false"
        )
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy)
    if not known or isinstance(strategy, ZeROStrategy | DeepSpeedStrategy):
        raise InputError(
            "trainer.strategy: it has no sparse gradients; give ddp or fsdp2, or set the layer's "
            "sparse to false"
        )
