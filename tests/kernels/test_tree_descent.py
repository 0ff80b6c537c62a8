"""Hard trees: the same decisions, answers and gradients as asking every node, reading the path."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels import backends, leaf_mlp, native, path_neurons, tree_descent
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.tree_descent import reference

MARGIN = 1e-3  # decisions nearer to zero than this may differ by rounding


def _relative(actual, expected):
    return (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)


def _tree(tokens, width, depth, dtype=torch.float32, trees=()):
    """Draw tokens, nodes and biases; tokens with a logit near zero are drawn away from it."""
    num_nodes = 2**depth - 1
    weight = torch.randn(*trees, num_nodes, width).mul(width**-0.5).to(dtype)
    bias = torch.randn(*trees, num_nodes).mul(0.1).to(dtype)
    x = torch.randn(4 * tokens + 8, width)
    logits = torch.einsum("td,nd->tn", x.double(), weight.double().flatten(0, -2))
    clear = (logits + bias.double().flatten()).abs().gt(MARGIN).all(dim=1)
    x = x[clear][:tokens]
    assert len(x) == tokens
    return x, weight, bias


def _leaves(width, hidden, num_leaves, gated, bias, dtype=torch.float32):
    inner = 2 * hidden if gated else hidden
    draw = [
        torch.randn(num_leaves, inner, width) * width**-0.5,
        torch.randn(num_leaves, width, hidden) * hidden**-0.5,
    ]
    if bias:
        draw += [torch.randn(num_leaves, inner), torch.randn(num_leaves, width)]
    w_in, w_out, *biases = (t.to(dtype) for t in draw)
    bias_in, bias_out = biases or (None, None)
    return {"w_in": w_in, "w_out": w_out, "bias_in": bias_in, "bias_out": bias_out}


def _to(operands, **options):
    return {k: None if t is None else t.to(**options) for k, t in operands.items()}


@pytest.mark.parametrize("depth", [0, 1, 3, 6])
@pytest.mark.parametrize("width", [1, 5, 16, 67, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_leaves_are_reached(native_library, poison_empty, depth, width, dtype):
    x, weight, bias = _tree(37, width, depth, dtype)
    expected = reference.tree_descent(x.double(), weight, bias)
    for backend in ("cpu", "torch"):
        with moezoo_kernels.use(backend):
            assert torch.equal(tree_descent(x, weight, bias), expected)
            bf16 = x.bfloat16()
            same = reference.tree_descent(bf16.double(), weight, bias)
            assert (tree_descent(bf16, weight, bias) == same).float().mean() > 0.9
    with moezoo_kernels.use("torch"):
        in_fp64 = tree_descent(x.double(), weight.double(), bias.double())
    assert torch.equal(in_fp64, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [1, 5, 33])
def test_each_token_gets_its_leafs_answer(native_library, poison_empty, gated, activation, hidden):
    options = {"activation": activation, "gated": gated}
    for tokens, width, num_leaves, bias in ((1, 7, 4, True), (43, 37, 4, False), (43, 16, 1, True)):
        operands = _leaves(width, hidden, num_leaves, gated, bias)
        x, leaves = torch.randn(tokens, width), torch.randint(-1, num_leaves, (tokens,))
        in_fp64 = _to(operands, dtype=torch.float64)
        expected = reference.leaf_mlp(x.double(), leaves, **in_fp64, **options)
        for backend in ("cpu", "torch"):
            with moezoo_kernels.use(backend):
                actual = leaf_mlp(x, leaves, **operands, **options)
            assert not actual[leaves < 0].any()
            assert _relative(actual, expected) <= 2e-6
        half = _to(operands, dtype=torch.bfloat16)
        expected = reference.leaf_mlp(
            x.bfloat16().double(), leaves, **_to(half, dtype=torch.float64), **options
        )
        with moezoo_kernels.use("cpu"):
            actual = leaf_mlp(x.bfloat16(), leaves, **half, **options)
        assert actual.dtype == torch.bfloat16
        assert _relative(actual, expected) <= 3e-3  # one rounding to bf16


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("trees", [1, 3])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_neurons_on_the_path_are_summed(native_library, poison_empty, depth, trees, activation):
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, 19, 96):
            x, in_weight, in_bias = _tree(17, width, depth + 1, dtype, (trees,))
            out_weight = torch.randn_like(in_weight)
            tensors = (in_weight, in_bias, out_weight)
            in_fp64 = [t.double() for t in (x, *tensors)]
            for asking in (None, x.flip(0)):
                options = {"activation": activation, "asking": asking}
                expected = reference.path_neurons(*in_fp64, **options)
                with moezoo_kernels.use("cpu"):
                    output, bottoms = path_neurons(x, *tensors, **options)
                assert output.dtype == torch.float32
                assert _relative(output, expected[0]) <= 2e-6
                assert torch.equal(bottoms, expected[1])
                with moezoo_kernels.use("torch"):
                    output, bottoms = path_neurons(*in_fp64, **options)
                assert _relative(output, expected[0]) <= 1e-12
                assert torch.equal(bottoms, expected[1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_torch_and_the_reference_agree_with_all_gradients(backend):
    x, in_weight, in_bias = _tree(11, 6, 4, trees=(2,))
    operands = _leaves(6, 5, 3, True, True)
    leaves = torch.randint(-1, 3, (11,))
    path = [x, in_weight, in_bias, torch.randn_like(in_weight)]
    path, leaf = (
        [t.double().requires_grad_() for t in tensors] for tensors in (path, operands.values())
    )
    x = path[0]
    with moezoo_kernels.use(backend):
        by_path = path_neurons(*path, activation="gelu")[0]
        by_leaf = leaf_mlp(
            x, leaves, *leaf[:2], activation="silu", gated=True, bias_in=leaf[2], bias_out=leaf[3]
        )
    answers = [by_path, by_leaf]
    for t in range(11):
        token, total = x[t], torch.zeros(6, dtype=torch.float64)
        for weight, bias, rows in zip(*path[1:], strict=True):
            node = 0
            while node < len(weight):
                logit = weight[node] @ token + bias[node]
                total = total + torch.nn.functional.gelu(logit) * rows[node]
                node = 2 * node + (2 if logit > 0 else 1)
        torch.testing.assert_close(by_path[t], total, rtol=1e-12, atol=1e-12)
        answers.append(total)
    direction = torch.randn(11, 6, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(answers[2:]) * direction).sum(), path)
    actual = torch.autograd.grad((by_path * direction).sum(), path)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with moezoo_kernels.use("reference"):
        again = leaf_mlp(
            x, leaves, *leaf[:2], activation="silu", gated=True, bias_in=leaf[2], bias_out=leaf[3]
        )
    for a, b in zip(
        torch.autograd.grad((by_leaf * direction).sum(), [x, *leaf]),
        torch.autograd.grad((again * direction).sum(), [x, *leaf]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_where_a_gradient_is_wanted_plain_torch_gives_it(native_library):
    x, in_weight, in_bias = _tree(9, 8, 3, trees=(2,))
    path = [x, in_weight, in_bias, torch.randn_like(in_weight)]
    operands, leaves = _leaves(8, 4, 3, False, True), torch.randint(0, 3, (9,))
    gradients = []
    for backend in ("cpu", "torch"):
        tensors = [t.clone().requires_grad_() for t in (*path, *operands.values())]
        with moezoo_kernels.use(backend):
            assert not tree_descent(tensors[0], *(t[0] for t in tensors[1:3])).requires_grad
            output = path_neurons(*tensors[:4], activation="relu")[0]
            w_in, w_out, bias_in, bias_out = tensors[4:]
            biases = {"bias_in": bias_in, "bias_out": bias_out}
            options = {"activation": "relu", "gated": False}
            output = output + leaf_mlp(tensors[0], leaves, w_in, w_out, **biases, **options)
        output.square().sum().backward()
        gradients.append([t.grad for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_logit_of_zero_goes_right_to_a_leaf_and_left_to_a_neuron(native_library):
    x, zeros = torch.randn(3, 20), torch.zeros(3, 20)
    for backend in ("cpu", "torch", "reference"):
        with moezoo_kernels.use(backend):
            assert tree_descent(x, zeros, zeros[:, 0]).tolist() == [3, 3, 3]
            trees = (zeros[None], zeros[None, :, 0], zeros[None])
            assert path_neurons(x, *trees, activation="relu")[1].tolist() == [[0], [0], [0]]


def test_neither_threads_nor_the_batch_change_a_bit(native_library):
    x, in_weight, in_bias = _tree(150, 70, 4, trees=(9,))
    path = (in_weight, in_bias, torch.randn_like(in_weight))
    operands, leaves = _leaves(70, 19, 5, True, True), torch.randint(0, 5, (150,))

    def answers(tokens):
        with moezoo_kernels.use("cpu"):
            options = {"activation": "silu", "gated": True}
            return (
                tree_descent(x[tokens], in_weight[0], in_bias[0]),
                leaf_mlp(x[tokens], leaves[tokens], **operands, **options),
                *path_neurons(x[tokens], *path, activation="silu"),
            )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = answers(slice(None))
        torch.set_num_threads(2)
        two = answers(slice(None))
    finally:
        torch.set_num_threads(threads)
    by_token = [answers(slice(t, t + 1)) for t in range(150)]
    alone = [torch.cat(parts) for parts in zip(*by_token, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_tokens_and_strides(native_library, backend):
    x, in_weight, in_bias = _tree(10, 12, 3, trees=(2,))
    path = (in_weight, in_bias, torch.randn_like(in_weight))
    operands, leaves = _leaves(12, 4, 3, False, True), torch.randint(-1, 3, (10,))

    def run(change):
        options = {"activation": "relu", "gated": False}
        nodes = (change(in_weight[0]), change(in_bias[0]))
        moved = {name: change(t) for name, t in operands.items()}
        yield tree_descent(change(x), *nodes)
        yield leaf_mlp(change(x), change(leaves), **moved, **options)
        yield from path_neurons(change(x), *map(change, path), activation="relu")

    with moezoo_kernels.use(backend):
        strided = run(lambda t: torch.stack([t, t], dim=-1)[..., 0])
        for a, b in zip(run(lambda t: t), strided, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        x, leaves = x[:0], leaves[:0]
        assert [len(t) for t in run(lambda t: t)] == [0, 0, 0, 0]


def _examples():
    x, in_weight, in_bias = _tree(6, 8, 3, trees=(2,))
    operands, leaves = _leaves(8, 4, 3, True, True), torch.tensor([0, 2, -1, 1, 1, 0])
    op = torch.ops.moezoo
    biases = (operands["bias_in"], operands["bias_out"])
    weights = (operands["w_in"], operands["w_out"])
    return [
        (op.tree_descent.default, (x, in_weight[0], in_bias[0], "cpu")),
        (op.leaf_mlp.default, (x, leaves, *weights, *biases, "silu", True, "cpu")),
        (op.path_neurons.default, (x, None, in_weight, in_bias, in_weight + 1, "gelu", "cpu")),
        (op.path_neurons.default, (x, -x, in_weight, in_bias, in_weight + 1, "gelu", "cpu")),
    ]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_opcheck(native_library, which):
    op, arguments = _examples()[which]
    torch.library.opcheck(op, arguments)


def test_compiles_to_one_graph_and_follows_autocast(native_library):
    x, in_weight, in_bias = _tree(6, 8, 3, trees=(2,))
    operands = _leaves(8, 4, 8, True, True)

    def run(x):
        leaves = tree_descent(x, in_weight[0], in_bias[0])
        answer = leaf_mlp(x, leaves, **operands, activation="silu", gated=True)
        return (leaves, answer, *path_neurons(x, in_weight, in_bias, in_weight, activation="relu"))

    expected = run(x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        leaves, answer, output, bottoms = run(x)
    assert torch.equal(leaves, expected[0])
    assert torch.equal(answer, expected[1].bfloat16())  # computed in fp32, rounded once
    assert torch.equal(output, expected[2])
    assert torch.equal(bottoms, expected[3])


def test_flops_are_those_of_the_rows_that_are_read(native_library):
    row = 2 * 8
    expected = (6 * 3 * row, 5 * (8 + 4) * row, 6 * 2 * 6 * row, 6 * 2 * 8 * row)
    for (op, arguments), flops in zip(_examples(), expected, strict=True):
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        assert counter.get_total_flops() == flops


def test_what_runs_where(native_library, monkeypatch):
    rows = {(r.op, r.backend): r for r in backends.table() if r.device == "cpu"}
    for name in ("tree_descent", "leaf_mlp", "path_neurons"):
        assert rows[name, "cpu"].default
    asked = []
    choose = backends.choose

    def spy(*arguments, prefer=None):
        asked.append(prefer)
        return choose(*arguments, prefer=prefer)

    monkeypatch.setattr(backends, "choose", spy)
    for dtype, hidden in ((torch.float32, 160), (torch.bfloat16, 160), (torch.bfloat16, 8)):
        operands = _leaves(4, hidden, 1, False, False, dtype)
        x, leaves = torch.randn(128, 4).to(dtype), torch.zeros(128, dtype=torch.int64)
        leaf_mlp(x, leaves, **operands, activation="relu", gated=False)
    assert [a for a in asked if a != "grouped_mm"] == [None, "torch", None, None]
    monkeypatch.setenv("MOEZOO_NATIVE", "off")
    native.load.cache_clear()
    x, weight, bias = _tree(5, 8, 3)
    assert torch.equal(tree_descent(x, weight, bias), reference.tree_descent(x, weight, bias))


MISTAKES = [
    (tree_descent, {"weight": torch.ones(3, 5)}, r"give x \(T, D\) and weight \(N, D\), not"),
    (tree_descent, {"weight": torch.ones(4, 8)}, "weight: 4 nodes are no complete tree; give 2"),
    (tree_descent, {"bias": torch.ones(4)}, r"bias: shape is \(4,\), the others ask for \(3,\)"),
    (tree_descent, {"bias": torch.ones(3).half()}, "bias: dtype is torch.float16, others have"),
    (leaf_mlp, {"activation": "swish"}, "activation: 'swish' is not known; choose from: relu"),
    (leaf_mlp, {"leaves": torch.zeros(3).long()}, r"give x \(T, D\), leaves \(T,\), w_out"),
    (leaf_mlp, {"leaves": torch.zeros(2).int()}, "leaves: dtype is torch.int32; give torch.int64"),
    (leaf_mlp, {"leaves": torch.tensor([0, 2])}, "leaves: 2 is not a leaf; give -1 .* 0 to 1"),
    (leaf_mlp, {"leaves": torch.tensor([0, -2])}, "leaves: -2 is not a leaf"),
    (leaf_mlp, {"w_in": torch.ones(2, 3, 8)}, r"w_in: shape is .* ask for \(2, 4, 8\)"),
    (leaf_mlp, {"bias_out": torch.ones(2, 4)}, r"bias_out: shape is .* ask for \(2, 8\)"),
    (leaf_mlp, {"x": torch.ones(2, 8).bfloat16()}, "w_in: dtype is torch.float32, x has"),
    (path_neurons, {"x": torch.ones(2, 9)}, r"give x \(T, D\) and in_weight \(P, N, D\), not"),
    (path_neurons, {"in_bias": torch.ones(3)}, r"in_bias: shape is .* ask for \(1, 3\)"),
    (path_neurons, {"in_weight": torch.ones(1, 0, 8)}, "in_weight: 0 nodes are no complete tree"),
    (path_neurons, {"asking": torch.ones(1, 8)}, r"asking: shape is \(1, 8\), x has \(2, 8\)"),
    (path_neurons, {"activation": "swish"}, "activation: 'swish' is not known"),
]


@pytest.mark.parametrize(("function", "change", "message"), MISTAKES)
def test_mistakes_are_named(function, change, message):
    arguments = {
        tree_descent: {"weight": torch.ones(3, 8), "bias": torch.ones(3)},
        leaf_mlp: {
            "leaves": torch.zeros(2, dtype=torch.int64),
            "w_in": torch.ones(2, 4, 8),
            "w_out": torch.ones(2, 8, 4),
            "activation": "relu",
            "gated": False,
        },
        path_neurons: {
            "in_weight": torch.ones(1, 3, 8),
            "in_bias": torch.ones(1, 3),
            "out_weight": torch.ones(1, 3, 8),
            "activation": "relu",
        },
    }[function]
    with pytest.raises(ValueError, match=message) as caught:
        function(**{"x": torch.ones(2, 8), **arguments, **change})
    assert "\n" not in str(caught.value)
