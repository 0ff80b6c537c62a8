"""A training configuration, with its model on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from moezoo.errors import InputError
from moezoo.experts import MLPExperts
from moezoo.routing import RouterOptions
from moezoo_models import MoezooForCausalLM
from moezoo_train.measure.throughput import ffn_layers, forward_flops_per_token
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer, is_sparse
from moezoo_train.parallel.zero import check_zero
from moezoo_train.run.module import LanguageModel

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        name: as Lightning's ``precision``.
        parameters: dtype of parameters, gradients and optimizer state.
        compute: dtype of matrix products and of what is exchanged between experts.
    """

    name: str
    parameters: torch.dtype
    compute: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether autocast makes low-precision copies of the parameters."""
        return self.parameters != self.compute

    @property
    def half(self) -> bool:
        """Whether matrix products take 16 bits."""
        return self.compute.itemsize == 2


def precision(name: str | int | None) -> Precision:
    """Read Lightning's ``trainer.precision``.

    Raises:
        InputError: a precision without formulas here.
    """
    short = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    short["auto"] = "bf16-mixed"  # as on the GPUs that are planned for
    text = short.get(str(name), str(name))
    if text in AUTOCAST:
        return Precision(text, torch.float32, AUTOCAST[text])
    if text in WHOLE:
        return Precision(text, WHOLE[text], WHOLE[text])
    known = ", ".join([*AUTOCAST, *WHOLE])
    raise InputError(f"trainer.precision: there are no formulas for '{name}'; choose from: {known}")


def _zero_refused(precision: Precision, module: LanguageModel) -> str | None:
    try:
        check_zero(precision.name, module)
    except InputError as error:
        return str(error)
    return None


class ExpertLayer(NamedTuple):
    """Stacked experts, how many of them a token takes, and whether each choice travels apart."""

    experts: MLPExperts
    taken: int
    apart: bool


@dataclass(frozen=True)
class Setup:
    """A training run as its configuration describes it.

    Attributes:
        model: on the meta device, in fp32.
        optimizer: how parameters are updated.
        precision: dtypes.
        batch_size: windows per micro-batch and process.
        sequence_length: tokens per window.
        accumulation: micro-batches per optimizer step.
        zero_refused: why `moezoo fit` refuses DeepSpeed; None if it does not.
    """

    model: MoezooForCausalLM
    optimizer: OptimizerConfig
    precision: Precision
    batch_size: int
    sequence_length: int
    accumulation: int
    zero_refused: str | None = None

    @classmethod
    def of(
        cls,
        module: LanguageModel,
        precision: Precision,
        batch_size: int,
        sequence_length: int,
        accumulation: int = 1,
    ) -> Setup:
        """Take over what a LightningModule was told.

        Raises:
            InputError: it is no model of ours, or there is no formula for its gradients.
        """
        if not isinstance(module.model, MoezooForCausalLM):
            raise InputError(
                "model.initialize_from: plan knows models of this library's own only; set it to "
                "null"
            )
        setup = cls(
            module.model,
            module.optimizer_config,
            precision,
            batch_size,
            sequence_length,
            accumulation,
            _zero_refused(precision, module),
        )
        if any(is_sparse(group) for group in setup.parameter_groups):
            raise InputError(
                "sparse: the size of sparse gradients depends on the text; set the layer's sparse "
                "to false to plan it"
            )
        return setup

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one GPU."""
        return self.batch_size * self.sequence_length

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are run again in the backward pass."""
        return any(getattr(b, "gradient_checkpointing", False) for b in self.model.model.blocks())

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Every parameter once, also where it is tied or shared."""
        return list(self.model.parameters())

    @cached_property
    def size(self) -> int:
        """Number of all parameters."""
        return sum(p.numel() for p in self.parameters)

    @cached_property
    def trained(self) -> list[Parameter]:
        """Those of them that are trained."""
        return [p for p in self.parameters if p.requires_grad]

    @cached_property
    def parameter_groups(self) -> list[dict[str, object]]:
        """The optimizer's groups over the trained parameters."""
        return build_optimizer(self.model, self.optimizer, fused=False).param_groups

    @cached_property
    def expert_layers(self) -> list[ExpertLayer]:
        """Stacked experts behind a router."""
        found = []
        for layer in ffn_layers(self.model):
            experts = getattr(layer, "experts", None)
            if isinstance(experts, MLPExperts) and experts.can_shard:
                names = (name for name in ("top_k", "num_hashes") if hasattr(layer, name))
                taken, router = int(getattr(layer, next(names))), getattr(layer, "router", None)
                apart = isinstance(router, RouterOptions) and router.weights.apply_to == "input"
                found.append(ExpertLayer(experts, taken, apart))
        return found

    @cached_property
    def expert_parameters(self) -> set[Parameter]:
        """Those that expert parallelism shards."""
        return {p for layer in self.expert_layers for p in layer.experts.parameters()}

    @cached_property
    def tables(self) -> list[str]:
        """Classes that expert parallelism would split beside stacked experts: PEER's tables."""
        known = {id(layer.experts) for layer in self.expert_layers}
        split = [m for m in self.model.modules() if getattr(m, "can_shard", False)]
        return sorted({type(m).__name__ for m in split if id(m) not in known})

    @cached_property
    def stacked(self) -> set[Parameter]:
        """Those of stacked experts, which FSDP2 may cut by rows in place of experts."""
        stacks = [m for m in self.model.modules() if isinstance(m, MLPExperts)]
        return {p for stack in stacks for p in stack.parameters()}

    @cached_property
    def buffers(self) -> list[Tensor]:
        """Every buffer once."""
        return list(self.model.buffers())

    @cached_property
    def units(self) -> list[list[Parameter]]:
        """The units that FSDP gathers: each block, and last the parameters outside of blocks."""
        seen: set[Parameter] = set()
        units: list[list[Parameter]] = []
        for module in [*self.model.model.blocks(), self.model]:
            own = [p for p in module.parameters() if p not in seen]
            seen.update(own)
            units.append(own)
        return units

    @cached_property
    def ffn_sizes(self) -> list[tuple[int, int, int]]:
        """Parameters of each layer: in all, of a token, and of experts that GPUs may share."""
        found = []
        for layer in ffn_layers(self.model):
            cost = layer.cost()
            shared = sum(p.numel() for p in layer.parameters() if p in self.expert_parameters)
            found.append((cost.total_parameters, cost.active_parameters, shared))
        return found

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs of the matrix products of a training step, per token.

        The backward pass takes twice the forward pass (Kaplan et al. 2020, arXiv:2001.08361,
        section 2.1); activation checkpointing repeats the blocks' forward pass, not the head's.
        """
        forward = forward_flops_per_token(self.model, self.sequence_length)
        head = 2 * self.model.lm_head.weight.numel()
        return 3.0 * forward + (forward - head if self.checkpointing else 0)

    def excerpt(
        self, layers: list[int], checkpointing: bool, dtype: torch.dtype
    ) -> MoezooForCausalLM:
        """Copy the model to another dtype, with these of its blocks only."""
        decoder = self.model.model
        whole = decoder.layers
        decoder.layers = nn.ModuleList(whole[number] for number in layers)
        try:
            copied = copy.deepcopy(self.model)
            nn.Module.to(copied, dtype)
        finally:
            decoder.layers = whole
        copied.config.layer_types = [copied.config.layer_types[number] for number in layers]
        for block in copied.model.blocks():
            block.gradient_checkpointing = checkpointing
        return copied
