"""How a run is spread over GPUs: each GPU's memory and traffic, in formulas.

Psi is the number of trained parameters, N the number of GPUs. Everything is of one GPU, the first,
whose share is the largest where parts are uneven, and of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch.nn import Parameter

from moezoo.errors import InputError, check_choice
from moezoo_kernels.linear_cross_entropy.chunked import scratch_bytes
from moezoo_train.plan.setup import ExpertLayer, Setup
from moezoo_train.plan.trace import Trace

LAYOUTS = {
    "ddp": "a whole model per GPU",
    "fsdp": "parameters, gradients and optimizer sharded; a block gathered at a time",
    "zero1": "DeepSpeed: optimizer sharded",
    "zero2": "DeepSpeed: optimizer and gradients sharded",
    "zero3": "DeepSpeed: optimizer, gradients and parameters sharded",
    "ep": "ddp with experts spread over groups of GPUs",
}
DEEPSPEED = ("zero1", "zero2", "zero3")
DEEPSPEED_BUCKET = 200_000_000
"""Numbers in a bucket of gradients or parameters: the default of Lightning's DeepSpeedStrategy."""


class Memory(NamedTuple):
    """Bytes of one GPU at the end of a forward pass, when it holds most.

    Attributes:
        parameters: with buffers.
        gradients: one per trained parameter.
        optimizer: moments, momenta, and DeepSpeed's fp32 master copy.
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
        traced: saved activations and collectives of a micro-batch, under autocast or, for
            DeepSpeed, without.
        layout: a key of :data:`LAYOUTS`.
        gpus: N.
        expert_parallel: GPUs that share one set of experts; 1 but for the layout ep.
        share: of the configuration's micro-batch that each GPU takes: 1, but where the global batch
            is held while N changes.
    """

    setup: Setup
    traced: Trace
    layout: str
    gpus: int
    expert_parallel: int = 1
    share: float = 1.0

    def memory(self) -> Memory:
        """Return a GPU's memory."""
        setup = self.setup
        trained = [p for p in setup.parameters if p.requires_grad]
        spread = self.layout in ("fsdp", "zero3")
        parameters = self._numbers(setup.parameters, spread) * self._width
        buffers = sum(b.numel() * b.element_size() for b in setup.buffers)
        gradients = self._numbers(trained, spread or self.layout == "zero2") * self._width
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
        if self.gpus == 1:
            return []
        found = self._parameter_traffic() + self._token_traffic()
        for kind, size in self.traced.collectives.items():
            total = size * self.setup.accumulation
            found.append(Collective(kind, "statistics of the layers", total, self.gpus))
        return [one for one in found if one.size and one.group > 1]

    @property
    def _width(self) -> int:
        """Bytes of a parameter.

        DeepSpeed holds parameters and gradients in the lower precision and an fp32 master copy
        beside the moments (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1).
        """
        precision = self.setup.precision
        lower = self.layout in DEEPSPEED
        return (precision.compute if lower else precision.parameters).itemsize

    def _numbers(self, parameters: Iterable[Parameter], sharded: bool) -> int:
        """Count the numbers of these parameters on the first GPU."""
        return sum(self._local(parameter, sharded) for parameter in parameters)

    def _local(self, parameter: Parameter, sharded: bool) -> int:
        """Count a parameter's numbers on the first GPU.

        FSDP2 and this plan of expert parallelism cut the first dimension into equal runs of rows,
        the last of which may be short (arXiv:2304.11277, and torch's ``fully_shard``); DeepSpeed
        cuts the flattened whole.
        """
        count = parameter.numel()
        if self.layout == "ep":
            mine = parameter in self.setup.expert_parameters
            return count // self.expert_parallel if mine else count
        if not sharded:
            return count
        if self.layout == "fsdp":
            rows = len(parameter)
            return -(-rows // self.gpus) * (count // rows)
        return -(-count // self.gpus)

    def _optimizer(self) -> float:
        """Sum up the optimizer's state.

        AdamW keeps two moments and a 4-byte step count per parameter tensor (arXiv:1711.05101,
        algorithm 2; ``torch.optim.AdamW``), Muon one momentum (arXiv:2502.16982, eq. 1), both in
        the parameter's dtype, SGD nothing. DeepSpeed keeps fp32 moments and an fp32 copy of the
        parameters: 12 bytes per parameter, sharded (arXiv:1910.02054, section 3.1).
        """
        spread = self.layout == "fsdp" or self.layout in DEEPSPEED
        total = 0.0
        for group in self.setup.parameter_groups:
            parameters: list[Parameter] = list(group["params"])  # type: ignore[call-overload]
            numbers = self._numbers(parameters, spread)
            if self.layout in DEEPSPEED:
                total += 12 * numbers
            elif group.get("algorithm") == "muon":
                total += self._width * numbers
            elif "sgd" in str(group.get("algorithm")):
                continue
            else:
                total += 2 * self._width * numbers + 4 * len(parameters)
        return total

    def _copies_elsewhere(self) -> float:
        """Return the low-precision copies of experts that other GPUs hold."""
        copied = self.setup.precision.mixed and not self.setup.checkpointing
        if self.layout != "ep" or not copied:
            return 0.0
        elsewhere = 1 - 1 / self.expert_parallel
        return (
            _count(self.setup.expert_parameters) * elsewhere * self.setup.precision.compute.itemsize
        )

    def _buffers(self) -> float:
        """Sum up what is there for communication.

        DDP copies every gradient into buckets (``gradient_as_bucket_view`` is off by default).
        FSDP2 holds what is in no block gathered, and of the largest block: its parameters, those of
        the next being gathered, its gradients and the copy that is being scattered. DeepSpeed has
        two buckets of gradients, which overlap, and one of parameters. Expert parallelism holds, of
        each layer, the tokens dispatched to it and the outputs combined.
        """
        setup = self.setup
        trained = sum(p.numel() for p in setup.parameters if p.requires_grad)
        if self.layout == "ddp":
            return trained * self._width
        if self.layout == "ep":
            own = [p for p in setup.parameters if p.requires_grad]
            exchanged = [self._exchanged(layer) for layer in setup.expert_layers]
            held = max(exchanged, default=0.0) if setup.checkpointing else sum(exchanged)
            return self._numbers(own, False) * self._width + 2 * held
        if self.layout in ("zero1", "zero2"):
            return 3 * min(DEEPSPEED_BUCKET, trained) * self._width
        *blocks, rest = [sum(p.numel() for p in unit) for unit in setup.units]
        return (rest + 4 * max(blocks)) * self._width

    def _parameter_traffic(self) -> list[Collective]:
        """List what gradients and parameters cost.

        DDP sums all gradients once per step, and sends the first GPU's buffers to all. FSDP gathers
        a block in the forward and in the backward pass of every micro-batch, what is in no block
        once, and scatters the gradients of every micro-batch: ``fully_shard`` pads each parameter
        to N equal runs of rows. ZeRO: arXiv:1910.02054, section 7: 1 and 2 scatter gradients and
        gather parameters; 3 gathers them twice. Stage 2 and 3 scatter in every micro-batch.
        """
        setup, gpus = self.setup, self.gpus
        trained = [p for p in setup.parameters if p.requires_grad]
        again = setup.accumulation
        if self.layout in ("ddp", "ep"):
            shared = [
                p for p in trained if self.layout == "ddp" or p not in setup.expert_parameters
            ]
            experts = self._numbers([p for p in trained if p not in set(shared)], False)
            replicas = gpus // self.expert_parallel
            buffers = sum(b.numel() * b.element_size() for b in setup.buffers)
            return [
                Collective("all_reduce", "gradients", _count(shared) * self._width, gpus),
                Collective(
                    "all_reduce",
                    "experts' gradients",
                    experts * self._width,
                    replicas,
                    self.expert_parallel,
                ),
                Collective("broadcast", "buffers", buffers, gpus),
            ]
        if self.layout == "fsdp":
            sizes = [self._padded(unit) for unit in setup.units]
            gathered = (2 * sum(sizes[:-1]) + sizes[-1]) * again
            scattered = self._padded(trained) * again
        else:
            numbers = -(-_count(trained) // gpus) * gpus
            gathered = numbers * self._width * (2 * again if self.layout == "zero3" else 1)
            scattered = numbers * self._width * (1 if self.layout == "zero1" else again)
        return [
            Collective("all_gather", "parameters", gathered, gpus),
            Collective("reduce_scatter", "gradients", scattered, gpus),
        ]

    def _padded(self, parameters: Iterable[Parameter]) -> int:
        return self._numbers(parameters, True) * self.gpus * self._width

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
        if self.layout != "ep" or self.expert_parallel == 1:
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


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def refusal(setup: Setup, layout: str, gpus: int, expert_parallel: int) -> str | None:
    """Return why a layout is impossible; None if it is not."""
    if layout in DEEPSPEED and setup.optimizer.name == "muon":
        return "DeepSpeed flattens parameters, and Muon needs matrices"
    if layout in DEEPSPEED and setup.optimizer.name == "sgd":
        return "sgd has not been tried with DeepSpeed"
    if layout != "ep":
        return None
    if not setup.expert_layers:
        return "no layer has routed experts"
    if expert_parallel == 1:
        return f"no number of a node's GPUs divides {gpus} and the number of experts"
    if gpus % expert_parallel:
        return f"{expert_parallel} does not divide {gpus} GPUs"
    for layer in setup.expert_layers:
        if layer.experts.num_experts % expert_parallel:
            return f"{expert_parallel} does not divide {layer.experts.num_experts} experts"
    return None


def check_layouts(text: str) -> list[str]:
    """Split and check ``ddp,fsdp``.

    Raises:
        InputError: one of them is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"layout: none is given; choose from: {', '.join(LAYOUTS)}")
    return list(dict.fromkeys(check_choice("layout", name, LAYOUTS) for name in names))
