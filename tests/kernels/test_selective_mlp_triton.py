"""Selective blocks in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions
from moezoo_kernels.layouts import column_major
from moezoo_kernels.selective_mlp import Thresholds, counted, reference

pytest.importorskip("triton", reason="triton is not installed")

SIZES = [(3, 5, 7), (1, 1, 1), (2, 33, 70), (0, 4, 3)]


@torch.no_grad()
def check(tokens, width, hidden, activation, *, glu=PLAIN_GLU, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)

    def draw(*shape, scale=1.0):
        return torch.randn(shape, device=device).mul(scale * shape[-1] ** -0.5).to(dtype)

    x = draw(tokens, width, scale=width**0.5)
    digits = 1e-5 if dtype == torch.float32 else 2e-2
    for gated in (True, False) if glu == PLAIN_GLU else (True,):
        gate, up, down = draw(hidden, width), draw(hidden, width), draw(width, hidden)
        gate = gate if gated else None
        for turned, biased, masked in ((True, True, True), (False, False, True), (True, False, 0)):
            biases = [draw(n, scale=0.5) if biased else None for n in (hidden, hidden, width)]
            levels = (0.5, 0.3, 0.1, 0.05)
            sizes = (width, width, hidden, hidden)
            least = [
                torch.rand(n, device=device) * level * 2 if masked else None
                for n, level in zip(sizes, levels, strict=True)
            ]
            if not gated:
                biases[0] = least[1] = None
            options = {
                **dict(zip(("bias_gate", "bias_up", "bias_down"), biases, strict=True)),
                "activation": activation,
                "glu": glu,
                "dense": torch.arange(tokens, device=device) % 3 == 1 if turned else None,
            }
            operands = [gate, up, down]
            laid = [t if t is None or not turned else column_major(t) for t in operands]
            with moezoo_kernels.use("triton"):
                found, counts = counted(x, *laid, Thresholds(*least), **options)
            exact = [None if t is None else t.double() for t in (x, *operands)]
            for name in ("bias_gate", "bias_up", "bias_down"):
                options[name] = None if options[name] is None else options[name].double()
            expected, wanted = reference.selective_mlp(*exact, Thresholds(*least), **options)
            assert found.dtype == dtype
            assert (found.double() - expected).norm() <= digits * expected.norm()
            if dtype == torch.float32:
                assert torch.equal(counts, wanted)


@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interpreter_equals_the_reference(sizes):
    check(*sizes, "silu")


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_interpreter_has_every_activation(activation):
    check(2, 5, 7, activation)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "glu",
    [
        GLUOptions(limit=0.2, up_shift=1.0),
        GLUOptions(limit=0.05, limit_after=True),
        GLUOptions(gate_softcap=0.2, up_softcap=0.3),
    ],
)
def test_the_interpreter_bounds_the_factors(glu):
    check(2, 5, 7, "silu", glu=glu)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*fp32"), (90, "*bf16")])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability, dtype):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels import resources

    for launch in resources._selective():
        types = {k: dtype if v == "*bf16" else v for k, v in launch.types.items()}
        constants = launch.constants | {"HAS_DENSE": True}
        constants |= {name: True for name in constants if name.startswith("HAS_BIAS")}
        if "BOUND" in constants:
            constants |= {"BOUND": 3, "GATE": 4.0, "UP": 25.0, "SHIFT": 1.0}
        compile_for(capability, launch.kernel, types, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("sizes", [*SIZES, (9, 576, 1536)])
def test_a_gpu_equals_the_reference(dtype, activation, sizes):
    check(*sizes, activation, dtype=dtype, device="cuda")
