"""How a run is spread over GPUs: each GPU's memory and traffic, in formulas.

Psi is the number of trained parameters, N the number of GPUs, R of replicas, E of the GPUs that
share one set of experts. Everything is of one GPU, the first, whose share is the largest where
parts are uneven, and of one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch.nn import Parameter

from moezoo_kernels.linear_cross_entropy.chunked import scratch_bytes
from moezoo_train.parallel.distributed import shard_dimension
from moezoo_train.parallel.zero import BUCKET
from moezoo_train.plan.setup import ExpertLayer, Setup
from moezoo_train.plan.trace import Trace

LAYOUTS = {
    "ddp": "a whole model per GPU",
    "fsdp2": "parameters, gradients and optimizer in shards; a block gathered at a time",
    "zero1": "DeepSpeed: optimizer in shards",
    "zero2": "DeepSpeed: optimizer and gradients in shards",
    "zero3": "DeepSpeed: optimizer, gradients and parameters in shards",
}
"""The strategies of `moezoo fit`, by the names that ``trainer.strategy`` has for them."""
ZERO = ("zero1", "zero2", "zero3")


class Memory(NamedTuple):
    """Bytes of one GPU at the end of a forward pass, when it holds most.

    Attributes:
        parameters: with buffers.
        gradients: one per trained parameter.
        optimizer: moments, momenta, and DeepSpeed's copy of the parameters.
        activations: saved for the backward pass, in one micro-batch.
        weight_copies: parameters in the compute dtype, which autocast keeps for the backward pass.
        communication: buckets, gathered parameters, tokens of other GPUs.
        working: a chunk of the logits and their gradients, or a block that is run again.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    weight_copies: float
    communication: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Collective(NamedTuple):
    """One kind of exchange.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all or broadcast.
        what: is exchanged.
        size: bytes per step that the collective is called with: the whole that is summed,
            gathered, scattered or, of an all-to-all, given away by one GPU, itself included.
        group: how many GPUs take part.
        stride: distance between them, in a numbering node by node.
    """

    kind: str
    what: str
    size: float
    group: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that leave one GPU with the algorithms of least traffic.

        A ring sends 2 (n-1)/n of the whole in an all-reduce and (n-1)/n in an all-gather or a
        reduce-scatter (Thakur, Rabenseifner & Gropp 2005, section 4; Patarasuk & Yuan 2009); an
        all-to-all keeps 1/n at home. A broadcast is passed on once.
        """
        others = (self.group - 1) / self.group
        factor = {"all_reduce": 2 * others, "broadcast": 1.0 if self.group > 1 else 0.0}
        return self.size * factor.get(self.kind, others)


@dataclass(frozen=True)
class Plan:
    """A run in one layout on so many GPUs.

    Attributes:
        setup: the run.
        traced: saved activations and collectives of a micro-batch.
        layout: a key of :data:`LAYOUTS`.
        gpus: N.
        expert_parallel: E, neighbouring GPUs; more than 1 with ``fsdp2`` only.
        replicas: R, each of N / R neighbouring GPUs; more than 1 with ``fsdp2`` only.
        share: of the configuration's micro-batch that each GPU takes: 1, but where the global batch
            is held while N changes.
    """

    setup: Setup
    traced: Trace
    layout: str
    gpus: int
    expert_parallel: int = 1
    replicas: int = 1
    share: float = 1.0

    def memory(self) -> Memory:
        """Return a GPU's memory."""
        return self._memory

    @cached_property
    def _memory(self) -> Memory:
        setup = self.setup
        spread = self.layout in ("fsdp2", "zero3")
        parameters = self._numbers(setup.parameters, spread) * self._width
        buffers = sum(b.numel() * b.element_size() for b in setup.buffers)
        gradients = self._numbers(setup.trained, spread or self.layout == "zero2") * self._width
        vocabulary, width = setup.model.lm_head.weight.shape
        logits = scratch_bytes(setup.tokens, width, vocabulary)
        return Memory(
            parameters=parameters + buffers,
            gradients=gradients,
            optimizer=self._optimizer(),
            activations=self.traced.activations * self.share,
            weight_copies=self.traced.weight_copies - self._copies_elsewhere(),
            communication=self._buffers() if self.gpus > 1 else 0.0,
            # At the loss all activations are there; while a block is run again, fewer.
            working=max(logits, self.traced.block * self.share),
        )

    def collectives(self) -> list[Collective]:
        """List the collectives of one step; none with one GPU."""
        return self._collectives

    @cached_property
    def _collectives(self) -> list[Collective]:
        if self.gpus == 1:
            return []
        found = self._fsdp2_traffic() if self.layout == "fsdp2" else self._parameter_traffic()
        found += self._token_traffic()
        for kind, size in self.traced.collectives.items():
            total = size * self.setup.accumulation
            found.append(Collective(kind, "statistics of the layers", total, self.gpus))
        return [one for one in found if one.size and one.group > 1]

    @property
    def padding(self) -> list[str]:
        """How many experts each stack is padded to, e.g. ``8 experts as 48``: for those that are.

        A stack whose experts and rows cannot be cut evenly is gathered, and its gradient scattered,
        as if every shard had as many experts as the first.
        """
        found = []
        for parameter in self.setup.stacked if self.layout == "fsdp2" else ():
            mine, shards = self._stack(parameter)
            experts = mine[0]
            if shard_dimension(mine, shards) == 0 and experts % shards:
                found.append(f"{experts} experts as {-(-experts // shards) * shards}")
        return sorted(set(found))

    @property
    def _width(self) -> int:
        """Bytes of a parameter: DeepSpeed's run beside autocast, as the others do."""
        return self.setup.precision.parameters.itemsize

    def _numbers(self, parameters: Iterable[Parameter], sharded: bool) -> int:
        """Count the numbers of these parameters on the first GPU."""
        return sum(self._local(parameter, sharded) for parameter in parameters)

    def _local(self, parameter: Parameter, sharded: bool) -> int:
        """Count a parameter's numbers on the first GPU.

        FSDP2 cuts a dimension into equal runs, the last of which may be short (arXiv:2304.11277,
        and torch's ``fully_shard``); DeepSpeed cuts the flattened whole.
        """
        count = parameter.numel()
        if not sharded:
            return count
        if self.layout in ZERO:
            return -(-count // self.gpus)
        stack, shards = self._stack(parameter)
        cut = shard_dimension(stack, shards) if parameter in self.setup.stacked else 0
        return -(-stack[cut] // shards) * (math.prod(stack) // stack[cut])

    def _is_shared(self, parameter: Parameter) -> bool:
        return self.expert_parallel > 1 and parameter in self.setup.expert_parameters

    def _stack(self, parameter: Parameter) -> tuple[tuple[int, ...], int]:
        """Return the shape that is sharded, and the number of shards."""
        groups = self.expert_parallel if self._is_shared(parameter) else 1
        shape = tuple(parameter.shape)
        return (shape[0] // groups, *shape[1:]), self.gpus // (self.replicas * groups)

    def _optimizer(self) -> float:
        """Sum up the optimizer's state.

        AdamW keeps two moments and a 4-byte step count per parameter tensor (arXiv:1711.05101,
        algorithm 2; ``torch.optim.AdamW``), Muon one momentum (arXiv:2502.16982, eq. 1), both in
        the parameter's dtype, SGD nothing. DeepSpeed keeps two fp32 moments of its shards, and in
        stages 1 and 2 a copy of the parameters (arXiv:1910.02054, section 3.1).
        """
        spread = self.layout != "ddp"
        total = 0.0
        for group in self.setup.parameter_groups:
            parameters: list[Parameter] = list(group["params"])  # type: ignore[call-overload]
            numbers = self._numbers(parameters, spread)
            if self.layout in ZERO:
                total += (8 if self.layout == "zero3" else 12) * numbers
            elif group.get("algorithm") == "muon":
                total += self._width * numbers
            elif "sgd" in str(group.get("algorithm")):
                continue
            else:
                total += 2 * self._width * numbers + 4 * len(parameters)
        return total

    def _copies_elsewhere(self) -> float:
        """Return the low-precision copies of experts that other GPUs hold."""
        if not self.setup.precision.mixed or self.setup.checkpointing:
            return 0.0
        elsewhere = 1 - 1 / self.expert_parallel
        copied = sum(p.numel() for p in self.setup.expert_parameters)
        return copied * elsewhere * self.setup.precision.compute.itemsize

    def _buffers(self) -> float:
        """Sum up what is there for communication.

        DDP copies every gradient into buckets (``gradient_as_bucket_view`` is off by default).
        FSDP2 holds what is in no block gathered, and of the largest block: its parameters, those of
        the next being gathered, its gradients and the copy that is being scattered; of shared
        experts, those that are this GPU's, and none of that where no other GPU has the same. With
        shared experts, also the tokens dispatched to each layer and the outputs combined. DeepSpeed
        has two buckets of gradients, which overlap, and one of parameters; stage 3 gathers blocks
        as FSDP2 does.
        """
        setup = self.setup
        trained = sum(p.numel() for p in setup.trained)
        if self.layout == "ddp":
            return trained * self._width
        if self.layout in ("zero1", "zero2"):
            return 3 * min(BUCKET, trained) * self._width
        *blocks, rest = [sum(self._gathered(p) for p in unit) for unit in setup.units]
        exchanged = [self._exchanged(layer) for layer in setup.expert_layers]
        held = max(exchanged, default=0.0) if setup.checkpointing else sum(exchanged)
        return (rest + 4 * max(blocks)) * self._width + (
            2 * held if self.expert_parallel > 1 else 0
        )

    def _gathered(self, parameter: Parameter) -> int:
        """Count the numbers of a parameter that are there once it is gathered."""
        if not self._is_shared(parameter):
            return parameter.numel()
        mine = parameter.numel() // self.expert_parallel
        return mine if self.expert_parallel < self.gpus else 0

    def _parameter_traffic(self) -> list[Collective]:
        """List what gradients and parameters cost but for FSDP2.

        DDP sums all gradients once per step, and sends the first GPU's buffers to all. ZeRO:
        arXiv:1910.02054, section 7: 1 and 2 scatter gradients and gather parameters; 3 gathers them
        twice. Stages 2 and 3 scatter in every micro-batch.
        """
        setup, gpus = self.setup, self.gpus
        trained = sum(p.numel() for p in setup.trained)
        if self.layout == "ddp":
            buffers = sum(b.numel() * b.element_size() for b in setup.buffers)
            return [
                Collective("all_reduce", "gradients", trained * self._width, gpus),
                Collective("broadcast", "buffers", buffers, gpus),
            ]
        size, again = -(-trained // gpus) * gpus * self._width, setup.accumulation
        gathered = size * (2 * again if self.layout == "zero3" else 1)
        scattered = size * (1 if self.layout == "zero1" else again)
        return [
            Collective("all_gather", "parameters", gathered, gpus),
            Collective("reduce_scatter", "gradients", scattered, gpus),
        ]

    def _fsdp2_traffic(self) -> list[Collective]:
        """List what FSDP2 sends: of shared experts among those that have the same, apart.

        It gathers a block in the forward and in the backward pass of every micro-batch, what is in
        no block once, scatters the gradients of every micro-batch and sums what is left over the
        replicas. Every shard is as large as the first: ``fully_shard`` pads.
        """
        shards = self.gpus // self.replicas
        found = self._sharded_traffic("", shards, 1, shared=False)
        if self.expert_parallel > 1:
            groups = self.expert_parallel
            found += self._sharded_traffic("experts' ", shards // groups, groups, shared=True)
        return found

    def _sharded_traffic(
        self, whose: str, shards: int, stride: int, shared: bool
    ) -> list[Collective]:
        again = self.setup.accumulation
        units = [[p for p in u if self._is_shared(p) == shared] for u in self.setup.units]
        *blocks, rest = [self._numbers(unit, True) for unit in units]
        mine = self._numbers([p for unit in units for p in unit if p.requires_grad], True)
        padded = shards * self._width * again
        apart = self.gpus // self.replicas
        return [
            Collective(
                "all_gather",
                f"{whose}parameters",
                (2 * sum(blocks) + rest) * padded,
                shards,
                stride,
            ),
            Collective("reduce_scatter", f"{whose}gradients", mine * padded, shards, stride),
            Collective(
                "all_reduce",
                f"{whose}gradients over replicas",
                mine * self._width * again,
                self.replicas,
                apart,
            ),
        ]

    def _token_traffic(self) -> list[Collective]:
        """List the exchanges of tokens between experts.

        Every token's vector goes to the GPUs of its ``top_k`` experts and an output comes back, in
        the forward pass and, as gradients, in the backward pass: four exchanges (Lepikhin et al.
        2020, arXiv:2006.16668, section 3.3). Activation checkpointing repeats the first two.
        :func:`moezoo.parallel.dispatch_tokens` sends a token once to a GPU that holds several of
        its experts, so this is the most there can be; inputs that are weighted by the expert's
        weight are sent for each expert. Indices and router weights, which travel with the tokens,
        are left out.
        """
        if self.expert_parallel == 1:
            return []
        exchanges = 6 if self.setup.checkpointing else 4
        vectors = sum(self._exchanged(layer) for layer in self.setup.expert_layers)
        size = exchanges * vectors * self.setup.accumulation
        return [Collective("all_to_all", "tokens", size, self.expert_parallel)]

    def _exchanged(self, layer: ExpertLayer) -> float:
        """Return the bytes of one exchange in one layer, those that stay included."""
        copies = layer.taken if layer.apart else min(layer.taken, self.expert_parallel)
        tokens = self.setup.tokens * self.share
        return tokens * copies * layer.experts.d_model * self.setup.precision.compute.itemsize
