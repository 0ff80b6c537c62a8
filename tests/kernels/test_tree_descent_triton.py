"""Hard trees in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import leaf_mlp, path_neurons, tree_descent
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.tree_descent import reference

pytest.importorskip("triton", reason="triton is not installed")

# Tokens, width, depth, trees, hidden width of a leaf.
SIZES = [(3, 5, 3, 2, 3), (1, 1, 0, 1, 1), (2, 33, 2, 3, 20), (0, 4, 1, 1, 2)]


def close(actual, expected, digits):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= digits * expected.norm()


def clear_of_zero(x, weight, bias):
    """Keep tokens whose logits are no matter of rounding, at the size they came in."""
    logits = torch.einsum("td,nd->tn", x.double(), weight.double().flatten(0, -2))
    clear = (logits + bias.double().flatten()).abs().gt(1e-3).all(dim=1)
    return x[clear][: len(x) // 4]


@torch.no_grad()
def check(tokens, width, depth, trees, hidden, activation, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    num_nodes, num_leaves = 2 ** (depth + 1) - 1, 2**depth
    in_weight, out_weight = draw(trees, num_nodes, width), draw(trees, num_nodes, width)
    in_bias = draw(trees, num_nodes)
    x = clear_of_zero(draw(4 * tokens, width), in_weight, in_bias)
    leaves = torch.randint(-1, num_leaves, (len(x),), device=device)
    digits = 4e-6 if dtype == torch.float32 else 4e-3  # a leaf's answer is rounded to the dtype
    with moezoo_kernels.use("triton"):
        nodes = (in_weight[0, : num_leaves - 1], in_bias[0, : num_leaves - 1])
        assert torch.equal(tree_descent(x, *nodes), reference.tree_descent(x.double(), *nodes))
        for asking in (None, x.flip(0)):
            path = (in_weight, in_bias, out_weight)
            options = {"activation": activation, "asking": asking}
            output, bottoms = path_neurons(x, *path, **options)
            expected = reference.path_neurons(x.double(), *(t.double() for t in path), **options)
            close(output, expected[0], 4e-6)
            assert torch.equal(bottoms, expected[1])
        for gated in (False, True):
            inner = 2 * hidden if gated else hidden
            weights = draw(num_leaves, inner, width), draw(num_leaves, width, hidden)
            biases = draw(num_leaves, inner), draw(num_leaves, width)
            for bias_in, bias_out in ((None, None), biases):
                options = {"activation": activation, "gated": gated}
                output = leaf_mlp(
                    x, leaves, *weights, bias_in=bias_in, bias_out=bias_out, **options
                )
                exact = [None if t is None else t.double() for t in (bias_in, bias_out)]
                options |= {"bias_in": exact[0], "bias_out": exact[1]}
                in_fp64 = [t.double() for t in weights]
                expected = reference.leaf_mlp(x.double(), leaves, *in_fp64, **options)
                close(output, expected, digits)


@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interpreter_equals_the_reference(sizes):
    check(*sizes, "gelu")


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_interpreter_has_every_activation(activation):
    check(2, 5, 1, 1, 3, activation)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*fp32"), (90, "*bf16")])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability, dtype):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels.tree_descent import triton_trees

    row = {"width": 768, "COLUMNS": 1024}
    data = dict.fromkeys(("x", "weight", "bias"), dtype) | {"leaves": "*i64"}
    compile_for(capability, triton_trees._descend, data, row | {"depth": 12})
    data = dict.fromkeys(("x", "asking", "in_weight", "in_bias", "out_weight"), dtype)
    data |= {"output": "*fp32", "bottoms": "*i64"}
    path = row | {"trees": 2, "depth": 11, "HAS_ASKING": True}
    compile_for(capability, triton_trees._sum_path, data, path | {"ACTIVATION": "gelu"})
    data = {"x": dtype, "leaves": "*i64"}
    data |= dict.fromkeys(("w_in", "w_out", "bias_in", "bias_out"), dtype) | {"output": "*fp32"}
    leaf = row | {"hidden": 20, "GATED": True, "HAS_BIAS_IN": True, "HAS_BIAS_OUT": True}
    sizes = leaf | {"ACTIVATION": "silu", "UNITS": 16}
    compile_for(capability, triton_trees._answer, data, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("sizes", [*SIZES, (65, 768, 5, 2, 16)])
def test_a_gpu_equals_the_reference(dtype, activation, sizes):
    check(*sizes, activation, dtype, "cuda")
