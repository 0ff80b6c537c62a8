"""A forward and a backward pass through shapes alone.

What a layer saves for its backward pass follows from its code, so it is read off the code: the
model runs on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes and dtypes and
no data, with autograd's saved tensors and all collectives noted. Blocks of the same kind save the
same, so at most two of each kind are run, and a hundred layers take no longer than two.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moezoo.bench.memory import saved_storages, storage_key
from moezoo.feed_forward import FeedForward
from moezoo_models import MoezooForCausalLM
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention_backends import ATTENTION
from moezoo_train.adapters.torch_core import COPY_TO_DTYPE, FakeTensorMode, TorchDispatchMode
from moezoo_train.plan.setup import Setup

COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of torch's operators for collectives."""


@dataclass
class Trace:
    """Memory and communication of one micro-batch on one process.

    Attributes:
        activations: bytes kept between forward and backward, without the next.
        weight_copies: of these, bytes of the low-precision parameters that autocast makes.
        block: bytes that the largest block keeps while it is run again; 0 without checkpointing.
        collectives: bytes of the layers' own collectives, by kind: statistics over all processes.
    """

    activations: float = 0.0
    weight_copies: float = 0.0
    block: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)

    def plus(self, other: Trace, times: float) -> Trace:
        """Add another trace so many times; the largest block stays what it is."""
        collectives = defaultdict(float, self.collectives)
        for kind, size in other.collectives.items():
            collectives[kind] += times * size
        return Trace(
            self.activations + times * other.activations,
            self.weight_copies + times * other.weight_copies,
            self.block,
            dict(collectives),
        )


def trace(setup: Setup, *, cpu: bool = False) -> Trace:
    """Trace a micro-batch of a whole model.

    Args:
        setup: the run.
        cpu: attend as a CPU does, which under autocast computes attention in fp32.
    """
    kinds = _kinds(setup.model)
    first = [layers[0] for layers in kinds]
    checkpointing = setup.checkpointing
    base = _run(setup, sorted(first), cpu, checkpointing)
    whole = base
    for layers in kinds:
        if len(layers) > 1:
            two = _run(setup, sorted([*first, layers[1]]), cpu, checkpointing)
            whole = whole.plus(two.plus(base, -1.0), len(layers) - 1)
    if checkpointing:
        none = _run(setup, [], cpu, False)
        alone = [_run(setup, [number], cpu, False) for number in first]
        whole.block = max(_kept(one) for one in alone) - _kept(none)
    return whole


def _kinds(model: MoezooForCausalLM) -> list[list[int]]:
    """Sort the numbers of the blocks by what the blocks are."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, block in enumerate(model.model.blocks()):
        description = [
            block.mlp.config(),
            [layer.config() for layer in cast("list[FeedForward]", block.memories)],
            block.router_input,
            model.config.layer_types[number],
        ]
        kinds[json.dumps(description, sort_keys=True)].append(number)
    return list(kinds.values())


def _kept(found: Trace) -> float:
    return found.activations + found.weight_copies


def _run(setup: Setup, layers: list[int], cpu: bool, checkpointing: bool) -> Trace:
    """Trace the model with these of its blocks only."""
    dtype = setup.precision.parameters
    casting: Any = nullcontext()
    if setup.precision.mixed:
        casting = torch.autocast("cpu", setup.precision.compute)
    attention = nullcontext() if cpu else _attention_of_gpus()
    model = setup.excerpt(layers, checkpointing, dtype)
    with _fake_processes(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.empty(setup.batch_size, setup.sequence_length, dtype=torch.int64)
        labels = torch.empty_like(ids)
        given = [*model.parameters(), *model.buffers()]
        observer = _Observer(given)
        with observer, _KnownValues(), attention:
            with casting, saved_storages(given) as kept:
                # Embedded here: what embeds tokens on a CPU looks at their values first.
                output = model(
                    input_ids=ids,
                    attention_mask=_masks(model),
                    inputs_embeds=model.model.embed_tokens(ids),
                    shift_labels=labels,
                    return_logits=False,
                    use_cache=False,
                )
            if observer.collectives:  # there may be more of them on the way back
                output.loss.backward()
        copies = sum(size for key, size in kept.items() if key in observer.copies)
    return Trace(sum(kept.values()) - copies, copies, 0.0, dict(observer.collectives))


def _masks(model: MoezooForCausalLM) -> dict[str, None] | None:
    """Leave out the causal mask where training does, though transformers wants it for fake tensors.

    Windows of the training data hold no padding, so that sdpa is causal by a flag.
    """
    if attention_backend(model.config) != "sdpa" or model.config.sliding_window is not None:
        return None
    return dict.fromkeys(model.config.layer_types)


@contextmanager
def _fake_processes() -> Iterator[None]:
    """Simulate two processes for the layers; nothing that they send is received."""
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _attention_of_gpus() -> Iterator[None]:
    """Attend in the dtype of queries and keys, as on a GPU, on tensors that are on a CPU."""
    own = ATTENTION["sdpa"]
    ATTENTION["sdpa"] = sdpa_attention_forward
    try:
        yield
    finally:
        ATTENTION["sdpa"] = own


class _KnownValues(TorchFunctionMode):
    """Answer what layers ask of values, which fake tensors do not have.

    Token ids are in range, and the tables of hash layers, which are made when training starts, are
    there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.aminmax:
            return 0, 0
        if func is Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))


class _Observer(TorchDispatchMode):
    """Note collectives, and which tensors are parameters in another dtype."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self._parameters = {storage_key(parameter) for parameter in parameters}
        self._alive: list[Any] = []
        self.copies: set[int] = set()
        self.collectives: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in COLLECTIVES:
            self.collectives[collective_kind(func)] += collective_bytes(args)
        result = func(*args, **(kwargs or {}))
        self._alive.append(result)  # else its address may be used again; fake tensors are small
        if func is COPY_TO_DTYPE and storage_key(args[0]) in self._parameters:
            self.copies.add(storage_key(result))
        return result


def collective_kind(operator: Any) -> str:
    """Name a collective of torch as the plan does: ``all_reduce`` for ``c10d::allreduce_``."""
    name = operator.name().partition("::")[2].partition(".")[0].strip("_")
    kinds = {
        "allreduce": "all_reduce",
        "allgather_base": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_base": "reduce_scatter",
        "reduce_scatter_tensor": "reduce_scatter",
        "alltoall_base": "all_to_all",
        "all_to_all_single": "all_to_all",
    }
    return kinds.get(name, name)


def collective_bytes(arguments: Any) -> int:
    """Return the size of the larger side of a collective: what is gathered, scattered or summed."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(size(part) for part in value) if isinstance(value, list | tuple) else 0

    return max((size(argument) for argument in arguments), default=0)
