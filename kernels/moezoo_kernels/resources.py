"""Registers and shared memory of every Triton kernel, compiled without a GPU.

``python -m moezoo_kernels.resources`` prints the table in kernels/README.md: bf16 operands at the
sizes below, with all constants that the kernel is tuned over.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90)


class Launch(NamedTuple):
    """A kernel as it is launched.

    Attributes:
        op: which op launches it.
        kernel: the jitted function, or the tuner around it.
        types: Triton's types of its arguments.
        constants: the arguments that are known when it is compiled, but for those it is tuned over.
        warps: of a program, unless they are tuned over.
    """

    op: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


class Row(NamedTuple):
    """One line of the table."""

    op: str
    kernel: str
    tuned: str
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack and local memory
    shared: int  # bytes of a program


def launches() -> list[Launch]:
    """List every kernel: d 2048, blocks of 6144, experts of 768, 16 neurons of 8 heads, 512²."""
    return [*_experts(), *_selective(), *_sparse(), *_tables(), *_trees()]


def _pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def _experts() -> Iterator[Launch]:
    from moezoo_kernels.grouped_mlp import triton_matmul, triton_stages

    tile = {"PRECISION": "ieee", "SUMMED": triton_matmul._SUMMED, "height": 2048, "width": 1536}
    types = _pointers("data matrices product", "bf16") | _pointers(
        "tokens groups firsts ends", "i64"
    )
    types |= dict.fromkeys(("stride_group", "stride_height", "stride_width"), "i64")
    constants = tile | {"num_groups": 128, "GATHER": True, "ROWS": triton_matmul._ROWS}
    yield Launch("grouped_mlp", triton_matmul._matmul, types, constants)
    types = _pointers("left right product", "bf16")
    types |= _pointers("left_tokens right_tokens starts", "i64")
    constants = tile | {"GATHER_LEFT": True, "GATHER_RIGHT": False}
    yield Launch("grouped_mlp", triton_matmul._outer, types, constants)
    constants = {"width": 768, "ACTIVATION": 3, "GATED": True, "COLUMNS": 1024}
    constants |= {"BOUND": 0, "GATE": 0.0, "UP": 0.0, "SHIFT": 0.0, "INTERLEAVED": False}
    types = _pointers("inner hidden", "bf16")
    yield Launch("grouped_mlp", triton_stages._activate, types, constants)
    types = _pointers("grad inner weighted grad_inner", "bf16")
    types |= _pointers("weights grad_weights", "fp32")
    yield Launch("grouped_mlp", triton_stages._activate_backward, types, constants)


def _selective() -> Iterator[Launch]:
    from moezoo_kernels.selective_mlp import triton_selective

    tile = {"width": 2048, "units": 6144, "HAS_DENSE": False, "UNITS": 64, "DEPTH": 32}
    types = _pointers("x w_gate w_up bias_gate bias_up hidden", "bf16")
    types |= _pointers("least_input least_up_input least_gate", "fp32")
    types |= _pointers("gates dense", "i8")
    strides = ("stride_gate", "stride_gate_column", "stride_up", "stride_up_column")
    types |= dict.fromkeys(strides, "i64")
    has = dict.fromkeys(("HAS_INPUT", "HAS_UP_INPUT", "HAS_GATE"), True)
    has |= {"HAS_BIAS_GATE": False, "HAS_BIAS_UP": False, "GATED": True}
    bounds = {"ACTIVATION": 3, "BOUND": 0, "GATE": 0.0, "UP": 0.0, "SHIFT": 0.0}
    yield Launch("selective_mlp", triton_selective._hide, types, tile | has | bounds)
    types = _pointers("hidden w_down bias_down output", "bf16")
    types |= _pointers("least_hidden", "fp32") | _pointers("dense", "i8")
    types |= dict.fromkeys(("stride_row", "stride_column"), "i64")
    has = {"HAS_BIAS": False, "HAS_HIDDEN": True}
    yield Launch("selective_mlp", triton_selective._answer, types, tile | has)


def _sparse() -> Iterator[Launch]:
    from moezoo_kernels.sparse_linear import triton_blocks

    types = _pointers("x values bias output", "bf16") | {"columns": "*i32", "starts": "*i64"}
    constants = {"width": 2048, "rows": 6144, "BLOCK": 32, "HAS_BIAS": False, "PRECISION": "ieee"}
    constants |= {"TOKENS": triton_blocks._MANY}
    yield Launch(
        "block_sparse_linear", triton_blocks._multiply, types | {"tokens": "i64"}, constants
    )


def _tables() -> Iterator[Launch]:
    from moezoo_kernels.product_key_top_k import triton_select
    from moezoo_kernels.rank_one_experts import triton_rank_one
    from moezoo_kernels.weighted_bag import triton_bag

    strides = dict.fromkeys(("half_stride", "token_stride", "head_stride", "heads"), "i64")
    types = _pointers("halves scores", "fp32") | _pointers("slots", "i64") | strides
    constants = {"n": 512, "top_k": 16}
    sizes = {"ROW": 512, "CHOICES": 16}
    yield Launch("product_key_top_k", triton_select._select, types, constants | sizes)
    types = _pointers("grad halves", "fp32") | _pointers("slots", "i64") | strides
    sizes = {"COLUMNS": 512}
    yield Launch("product_key_top_k", triton_select._scatter, types, constants | sizes)
    given = _pointers("indices", "i64") | _pointers("weights inner coefficients", "fp32")
    constants = {"width": 2048, "choices": 128, "COLUMNS": 1024, "ACTIVATION": 1, "GATED": False}
    types = _pointers("x u gate", "bf16") | given
    yield Launch("rank_one_experts", triton_rank_one._answer, types, constants)
    types = given | _pointers("grad of_weights of_u of_gate", "fp32") | _pointers("v", "bf16")
    yield Launch("rank_one_experts", triton_rank_one._differentiate, types, constants)
    constants = {"width": 2048, "choices": 128}
    types = _pointers("table output", "bf16") | _pointers("weights", "fp32")
    types |= _pointers("indices", "i64")
    yield Launch("weighted_bag", triton_bag._bag, types, constants)
    types = _pointers("source sums", "bf16") | _pointers("weights", "fp32")
    types |= _pointers("order starts", "i64")
    yield Launch("weighted_bag", triton_bag._sum_rows, types, constants)
    types = (
        _pointers("grad table", "bf16") | _pointers("dots", "fp32") | _pointers("indices", "i64")
    )
    yield Launch("weighted_bag", triton_bag._dots, types, constants | {"COLUMNS": 1024})


def _trees() -> Iterator[Launch]:
    from moezoo_kernels.tree_descent import triton_trees

    row: dict[str, Any] = {"width": 768, "COLUMNS": 1024}
    types = _pointers("x weight bias", "bf16") | _pointers("leaves", "i64")
    yield Launch("tree_descent", triton_trees._descend, types, row | {"depth": 12})
    types = _pointers("x in_weight in_bias out_weight asking", "bf16")
    types |= _pointers("output", "fp32") | _pointers("bottoms", "i64")
    path = row | {"trees": 2, "depth": 11, "HAS_ASKING": False, "ACTIVATION": "gelu"}
    yield Launch("path_neurons", triton_trees._sum_path, types, path)
    types = _pointers("x w_in w_out bias_in bias_out", "bf16")
    types |= _pointers("output", "fp32") | _pointers("leaves", "i64")
    leaf = row | {"hidden": 16, "GATED": False, "HAS_BIAS_IN": True, "HAS_BIAS_OUT": True}
    leaf |= {"ACTIVATION": "gelu", "UNITS": 16}
    yield Launch("leaf_mlp", triton_trees._answer, types, leaf)


def measure(launch: Launch, capability: int) -> Iterator[Row]:
    """Compile a kernel with each choice that it is tuned over, down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = launch.kernel.fn if hasattr(launch.kernel, "configs") else launch.kernel
    for tuned, warps in _choices(launch):
        types = {name: launch.types.get(name, "constexpr") for name in function.arg_names}
        # As at a launch: tensors, and steps between their rows, are multiples of 16.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(types.values())
            if kind != "constexpr"
        }
        source = ASTSource(function, types, {**launch.constants, **tuned}, aligned)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        used = _usage(compiled.asm["cubin"])
        choice = ", ".join(f"{name} {value}" for name, value in tuned.items())
        spilled = used["STACK"] + used["LOCAL"]
        name = function.__name__.lstrip("_")
        yield Row(launch.op, name, choice, warps, used["REG"], spilled, compiled.metadata.shared)


def _choices(launch: Launch) -> list[tuple[Mapping[str, int], int]]:
    tuned = getattr(launch.kernel, "configs", None)
    return [(c.kwargs, c.num_warps) for c in tuned] if tuned else [({}, launch.warps)]


def _usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump, which comes with Triton, says of the only kernel in a binary."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", printed)}


def main() -> None:
    """Print the table in Markdown."""
    columns = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    print(f"| op | kernel | constants tuned over | warps | {columns} |")
    print("|" + "---|" * (4 + len(CAPABILITIES)))
    for launch in launches():
        for rows in zip(*(measure(launch, c) for c in CAPABILITIES), strict=True):
            op, kernel, tuned, warps = rows[0][:4]
            found = " | ".join(
                f"{row.registers}, {row.shared:,}" + (f" ({row.spilled})" if row.spilled else "")
                for row in rows
            )
            print(
                f"| `{op}` | `{kernel}` |{tuned and f' {tuned}'} | {warps} | {found} |", flush=True
            )


if __name__ == "__main__":
    main()
