"""Block-sparse products in Triton: in the interpreter, compiled, and on a GPU with 2:4's beside."""

import pytest
import torch
import torch.nn.functional as F

import moezoo_kernels
from moezoo_kernels import sparse_linear
from moezoo_kernels.sparse_linear import pack_blocks, pack_groups

pytest.importorskip("triton", reason="triton is not installed")


def check(tokens, block, dtype=torch.float32, device="cpu", rows=3, columns=2):
    torch.manual_seed(0)
    kept = torch.rand(rows, columns) < 0.5
    kept[0], kept[1] = False, True
    dense = torch.randn(rows * block, columns * block)
    dense *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    dense = dense.to(device, dtype)
    matrix = pack_blocks(dense, block)
    x = torch.randn(tokens, columns * block).to(device, dtype)
    for bias in (None, torch.randn(rows * block).to(device, dtype)):
        with moezoo_kernels.use("triton"):
            found = sparse_linear(x, matrix, bias)
        wanted = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
        assert found.dtype == dtype
        digits = 1e-5 if dtype == torch.float32 else 1e-2
        assert (found.double() - wanted).norm() <= digits * wanted.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("tokens", [0, 1, 16, 67])
def test_the_interpreter_equals_the_dense_product(tokens, block):
    check(tokens, block)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*fp32"), (90, "*bf16")])
def test_the_kernel_compiles_for_ampere_and_hopper(compile_for, capability, dtype):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels import resources

    (launch,) = resources._sparse()
    types = {k: dtype if v == "*bf16" else v for k, v in launch.types.items()}
    for tokens in (16, 64):
        constants = launch.constants | {"HAS_BIAS": True, "TOKENS": tokens}
        compile_for(capability, launch.kernel, types, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("tokens", [1, 67, 2048])
def test_a_gpu_equals_the_dense_product(dtype, block, tokens):
    check(tokens, block, dtype=dtype, device="cuda", rows=24, columns=36)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 67, 2048])
def test_sparse_tensor_cores_equal_the_dense_product(dtype, tokens):
    torch.manual_seed(0)
    groups = torch.randn(256, 32, 4)
    dense = (groups * (torch.rand(256, 32, 4).argsort(-1) < 2)).view(256, 128).to("cuda", dtype)
    matrix = pack_groups(dense, 2, 4)
    assert matrix.semi is not None
    x, bias = torch.randn(tokens, 128).to("cuda", dtype), torch.randn(256).to("cuda", dtype)
    with moezoo_kernels.use("semi_structured"):
        found = sparse_linear(x, matrix, bias)
    wanted = F.linear(x.double(), dense.double(), bias.double())
    assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()
