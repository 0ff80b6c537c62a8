"""Selective blocks: every backend against the rule, and the rule against loops over the kept."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels import native, selective_mlp
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gate_value, up_value
from moezoo_kernels.layouts import column_major
from moezoo_kernels.selective_mlp import NO_THRESHOLDS, Thresholds, counted, op
from moezoo_kernels.selective_mlp.reference import selective_mlp as reference

SIZES = [(1, 37, 19), (3, 64, 130), (16, 33, 7), (2, 5, 1), (0, 4, 3)]
BOUNDED = [
    ("quick_gelu", GLUOptions(limit=0.5, up_shift=1.0)),
    ("silu", GLUOptions(limit=0.5)),
    ("silu", GLUOptions(limit=0.2, limit_after=True)),
    ("silu", GLUOptions(gate_softcap=0.7, up_softcap=0.5)),
]
LEVELS = {"input": 0.6, "up_input": 0.4, "gate": 0.1, "hidden": 0.05}


def drawn(tokens, width, hidden, *, gated=True, biased=True, levels=LEVELS, dtype=torch.float64):
    """A block's operands in one dtype, and options: thresholds differ by channel."""
    generator = torch.Generator().manual_seed(tokens + 7 * width + hidden)

    def draw(*shape, scale):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x = draw(tokens, width, scale=1.0)
    gate = draw(hidden, width, scale=width**-0.5) if gated else None
    up, down = draw(hidden, width, scale=width**-0.5), draw(width, hidden, scale=hidden**-0.5)
    sizes = {"input": width, "up_input": width, "gate": hidden, "hidden": hidden}
    least = {
        name: torch.rand(size, generator=generator) * 2 * levels[name]
        for name, size in sizes.items()
        if name in levels and (gated or name != "up_input")
    }
    options = {}
    if biased:
        options = {"bias_up": draw(hidden, scale=0.5), "bias_down": draw(width, scale=0.5)}
        options |= {"bias_gate": draw(hidden, scale=0.5)} if gated else {}
    return (x, gate, up, down), Thresholds(**least), options


def exact(operands, thresholds, options):
    """What the rule gives in fp64, and what it keeps."""
    wide = [None if t is None else t.double() for t in operands]
    filled = {"bias_gate": None, "bias_up": None, "bias_down": None, "glu": PLAIN_GLU}
    filled |= {"activation": "silu", "dense": None} | options
    for name in ("bias_gate", "bias_up", "bias_down"):
        filled[name] = None if filled[name] is None else filled[name].double()
    return reference(*wide, thresholds, **filled)


def assert_near(found, wanted, bound):
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= bound * wanted.norm()


def one_by_one(operands, thresholds, activation, glu, dense):
    """Each token from the rows and columns that it keeps, and from nothing else."""
    answers = []
    for t, x in enumerate(operands[0]):

        def used(values, name, token=t):
            least = getattr(thresholds, name)
            everything = least is None or (dense is not None and bool(dense[token]))
            return (
                torch.arange(len(values)) if everything else (values.abs() > least).nonzero()[:, 0]
            )

        _, gate, up, down = operands
        columns = used(x, "input")
        first = (up if gate is None else gate)[:, columns] @ x[columns]
        value = (
            ACTIVATIONS[activation] if gate is None else lambda v: gate_value(v, activation, glu)
        )(first)
        rows = used(value, "gate")
        hidden = torch.zeros(len(up), dtype=x.dtype)
        hidden[rows] = value[rows]
        if gate is not None:
            columns = used(x, "up_input")
            hidden[rows] *= up_value(up[rows][:, columns] @ x[columns], glu)
        read = used(hidden, "hidden")
        answers.append(down[:, read] @ hidden[read])
    return torch.stack(answers)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dense", [False, True])
def test_the_rule_is_what_is_kept_alone(gated, dense):
    operands, thresholds, _ = drawn(5, 23, 31, gated=gated, biased=False)
    flags = torch.arange(5) % 2 == 1 if dense else None
    wanted = one_by_one(operands, thresholds, "silu", PLAIN_GLU, flags)
    found, counts = exact(operands, thresholds, {"dense": flags})
    assert_near(found, wanted, 1e-13)
    assert 0 < counts[0, 0] < 23
    assert 0 < counts[0, 2] < 31
    assert counts[0, 3] <= counts[0, 2]
    if dense:
        assert counts[1].tolist() == [23, 23 if gated else 0, 31, 31]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_gives_the_rule_and_its_gradients(activation, gated):
    operands, thresholds, options = drawn(6, 17, 23, gated=gated)
    dense = torch.arange(6) == 2
    found, wanted = [], []
    for function, results in ((counted, found), (exact_call, wanted)):
        leaves = [t.clone().requires_grad_() for t in operands if t is not None]
        biases = {name: t.clone().requires_grad_() for name, t in options.items()}
        given = leaves if gated else [leaves[0], None, *leaves[1:]]
        y, counts = function(*given, thresholds, activation=activation, dense=dense, **biases)
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results += [y.detach(), *torch.autograd.grad(y, [*leaves, *biases.values()], grad)]
        results.append(counts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def exact_call(*operands, **options):
    return reference(*operands, **{"glu": PLAIN_GLU, "bias_gate": None, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_library_computes_every_activation(
    native_library, poison_empty, activation, gated, dtype
):
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-6
    for size in SIZES:
        for columns in (False, True):
            operands, thresholds, options = drawn(*size, gated=gated, dtype=dtype)
            dense = torch.arange(size[0]) % 3 == 1
            options |= {"activation": activation, "dense": dense if columns else None}
            laid = [t if t is None or not columns else column_major(t) for t in operands[1:]]
            with moezoo_kernels.use("cpu"):
                found, counts = counted(operands[0], *laid, thresholds, **options)
            wanted, kept = exact(operands, thresholds, options)
            assert found.dtype == dtype
            assert_near(found, wanted, bound)
            if dtype == torch.float32:
                assert torch.equal(counts, kept)


@pytest.mark.parametrize(("activation", "glu"), BOUNDED)
def test_every_library_bounds_the_factors(native_library, poison_empty, activation, glu):
    operands, thresholds, options = drawn(3, 29, 41, dtype=torch.float32)
    options |= {"activation": activation, "glu": glu}
    for name in ("cpu", "torch"):
        with moezoo_kernels.use(name):
            found = selective_mlp(*operands, thresholds, **options)
        assert_near(found, exact(operands, thresholds, options)[0], 3e-6)


@pytest.mark.parametrize("columns", [False, True])
def test_all_kept_none_kept_and_no_thresholds(native_library, poison_empty, columns):
    operands, _, options = drawn(3, 37, 53, dtype=torch.float32)
    laid = [column_major(t) if columns else t for t in operands[1:]]
    sizes = (37, 37, 53, 53)
    nothing = Thresholds(*(torch.full((n,), float("inf")) for n in sizes))
    zeros = Thresholds(*(torch.zeros(n) for n in sizes))
    with moezoo_kernels.use("cpu"):
        empty, counts = counted(operands[0], *laid, nothing, **options)
        assert torch.equal(empty, options["bias_down"].expand(3, -1))
        assert not counts.any()
        for thresholds in (zeros, NO_THRESHOLDS):
            found, counts = counted(operands[0], *laid, thresholds, **options)
            assert_near(found, exact(operands, NO_THRESHOLDS, options)[0], 3e-6)
            assert counts.tolist() == [list(sizes)] * 3


@pytest.mark.parametrize("names", [("input",), ("up_input",), ("gate",), ("hidden",)])
def test_one_threshold_alone(native_library, poison_empty, names):
    levels = {name: LEVELS[name] for name in names}
    operands, thresholds, options = drawn(2, 45, 67, levels=levels, dtype=torch.float32)
    for turn in (column_major, lambda t: t):
        laid = [turn(t) for t in operands[1:]]
        with moezoo_kernels.use("cpu"):
            found, counts = counted(operands[0], *laid, thresholds, **options)
        wanted, kept = exact(operands, thresholds, options)
        assert_near(found, wanted, 3e-6)
        assert torch.equal(counts, kept)


def test_what_is_no_number_is_seen(native_library):
    operands, thresholds, options = drawn(3, 37, 53, dtype=torch.float32)
    operands[0][1, 4] = float("nan")
    for name in ("cpu", "torch", "reference"):
        with moezoo_kernels.use(name):
            found = selective_mlp(*operands, thresholds, **options)
        assert found.isnan().all(1).tolist() == [False, True, False]


def test_any_number_of_threads_gives_the_same_bits(native_library):
    operands, thresholds, options = drawn(2, 700, 900, dtype=torch.float32)
    laid = [column_major(operands[1]), operands[2], column_major(operands[3])]
    before, found = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        with moezoo_kernels.use("cpu"):
            found.append(selective_mlp(operands[0], *laid, thresholds, **options))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_flops_are_those_of_what_is_kept():
    operands, thresholds, _ = drawn(3, 37, 53, biased=False, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        _, counts = op.selective_mlp(
            *operands, *thresholds, None, None, None, "silu", [0, 0, 0, 0], None, "cpu"
        )
    of_input, of_up, of_gate, of_hidden = counts.unbind(1)
    products = of_input * 53 + of_gate * of_up + of_hidden * 37
    assert counter.get_total_flops() == 2 * int(products.sum())


@pytest.mark.skipif(isinstance(native.load(), str), reason="no C++ library")
def test_op_and_compiler():
    operands, thresholds, options = drawn(3, 16, 24, dtype=torch.float32)
    biases = [options[name] for name in ("bias_gate", "bias_up", "bias_down")]
    dense = torch.tensor([True, False, True])
    rest = ("silu", [0.0, 0.0, 0.0, 0.0], dense, "cpu")
    opcheck(op.selective_mlp, (*operands, *thresholds, *biases, *rest))
    compiled = torch.compile(selective_mlp, fullgraph=True, backend="aot_eager")
    found = compiled(*operands, thresholds, **options)
    assert torch.equal(found, selective_mlp(*operands, thresholds, **options))


def test_what_does_not_fit_is_named():
    (x, gate, up, down), thresholds, _ = drawn(3, 8, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match="activation: 'softsign' is not known"):
        selective_mlp(x, gate, up, down, activation="softsign")
    with pytest.raises(ValueError, match=r"w_down: shape is \(12, 8\)"):
        selective_mlp(x, gate, up, down.t(), thresholds)
    with pytest.raises(ValueError, match=r"w_gate: dtype is torch.float64; give torch.float32"):
        selective_mlp(x, gate.double(), up, down, thresholds)
    with pytest.raises(ValueError, match=r"thresholds.up_input: there is no gate"):
        selective_mlp(x, None, up, down, thresholds)
    with pytest.raises(ValueError, match=r"thresholds.gate: shape is \(8,\)"):
        selective_mlp(x, gate, up, down, Thresholds(gate=torch.zeros(8)))
    with pytest.raises(ValueError, match=r"dense: dtype is torch.int64"):
        selective_mlp(x, gate, up, down, thresholds, dense=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="glu: bounds a gated"):
        selective_mlp(x, None, up, down, glu=GLUOptions(limit=1.0))
