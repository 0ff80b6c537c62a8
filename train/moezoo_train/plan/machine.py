"""GPUs and their interconnects, after the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo_train.measure.throughput import PEAK_BF16

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in a cluster.

    Attributes:
        name: of the GPU.
        memory: bytes of one GPU. Data sheets write GB and mean GiB.
        bandwidth: bytes per second of its own memory.
        half: FLOP/s of dense matrix products in bf16 or fp16.
        single: the same in fp32, without TensorFloat-32, as torch's default has it.
        link: bytes per second that a GPU sends to others of its node, in one direction.
        network: bytes per second that a GPU sends out of its node, its share of the node's cards.
        gpus_per_node: how many GPUs share a node.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    network: float
    gpus_per_node: int = 8


def _gpu(
    name: str, peak: str, gib: float, bandwidth: float, single: float, link: float, network: float
) -> Machine:
    return Machine(
        name,
        memory=gib * GIB,
        bandwidth=bandwidth,
        half=PEAK_BF16[peak],
        single=single,
        link=link,
        network=network,
    )


# Memory, bandwidth, fp32 and links (half of the bidirectional figure) from NVIDIA's data sheets.
# The network is that of the vendor's own systems: 400 Gb/s per GPU in DGX H100 and H200, 200 Gb/s
# in DGX A100. Cards without NVLink talk over PCIe 4.0 x16, and get a 200 Gb/s network card each,
# which is an assumption: give --network for yours.
MACHINES = {
    "h200": _gpu("H200 SXM", "H200", 141, 4.8e12, 67e12, 450e9, 50e9),
    "h100": _gpu("H100 SXM", "H100", 80, 3.35e12, 67e12, 450e9, 50e9),
    "a100": _gpu("A100 SXM 80GB", "A100", 80, 2.039e12, 19.5e12, 300e9, 25e9),
    "l40s": _gpu("L40S", "L40S", 48, 0.864e12, 91.6e12, 32e9, 25e9),
    "l4": _gpu("L4", "L4", 24, 0.3e12, 30.3e12, 32e9, 25e9),
    "rtx4090": _gpu("RTX 4090", "RTX 4090", 24, 1.008e12, 82.6e12, 32e9, 25e9),
    "rtx3090": _gpu("RTX 3090", "RTX 3090", 24, 0.936e12, 35.6e12, 32e9, 25e9),
}


def machine(
    gpu: str | None,
    memory: float | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    link: float | None = None,
    network: float | None = None,
    gpus_per_node: int | None = None,
) -> Machine:
    """Look a GPU up, and replace what is given.

    Args:
        gpu: a key of :data:`MACHINES`; None for one that is described by the rest.
        memory: GiB.
        bandwidth: GB/s.
        flops: TFLOP/s in the precision of the run.
        link: GB/s inside a node, one direction.
        network: GB/s per GPU between nodes.
        gpus_per_node: GPUs of a node.

    Raises:
        InputError: the GPU is not known, a number is out of range, or without a GPU one of memory,
            bandwidth and flops is missing.
    """
    numbers = {
        "memory": memory,
        "bandwidth": bandwidth,
        "flops": flops,
        "link": link,
        "network": network,
    }
    for field, value in numbers.items():
        if value is not None and not check_number(field, value) > 0:
            raise InputError(f"{field}: 0 is out of range; give a number above 0")
    if gpu is None:
        for field in ("memory", "bandwidth", "flops"):
            if numbers[field] is None:
                raise InputError(
                    f"gpu: missing; give one of {', '.join(MACHINES)}, or --memory, --bandwidth "
                    "and --flops"
                )
        base = replace(MACHINES["a100"], name="given GPU")
    else:
        base = MACHINES[check_choice("gpu", gpu.lower(), MACHINES)]
    if gpus_per_node is not None:
        base = replace(base, gpus_per_node=check_int("gpus_per_node", gpus_per_node))

    def given(value: float | None, unit: float, otherwise: float) -> float:
        return otherwise if value is None else value * unit

    return replace(
        base,
        memory=given(memory, GIB, base.memory),
        bandwidth=given(bandwidth, 1e9, base.bandwidth),
        half=given(flops, 1e12, base.half),
        single=given(flops, 1e12, base.single),
        link=given(link, 1e9, base.link),
        network=given(network, 1e9, base.network),
    )
