"""weighted_bag: the output and every gradient of each backend, at awkward sizes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels import weighted_bag
from moezoo_kernels.weighted_bag.reference import weighted_bag as reference

DIGITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}


@dataclass
class Problem:
    table: Tensor
    indices: Tensor
    weights: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        table = self.table.detach().to(dtype).requires_grad_()
        accumulation = torch.promote_types(dtype, torch.float32)
        weights = self.weights.detach().to(accumulation).requires_grad_()
        return Problem(table, self.indices, weights, self.grad.to(dtype))

    def outputs(self, function=weighted_bag, **options) -> list[Tensor]:
        output = function(self.table, self.indices, self.weights, **options)
        of_table, of_weights = torch.autograd.grad(output, [self.table, self.weights], self.grad)
        return [output.detach(), of_table, of_weights]


def problem(tokens=63, choices=7, rows=40, width=37, routing="some none") -> Problem:
    indices = torch.randint(max(rows, 1), (tokens, choices))
    if routing == "some none":
        indices[torch.rand(indices.shape) < 0.3] = -1
    if routing == "all none":
        indices.fill_(-1)
    if routing == "one row":
        indices.fill_(rows - 1)
    table, weights = torch.randn(rows, width), torch.randn(tokens, choices)
    return Problem(table, indices, weights, torch.randn(tokens, width)).to(torch.float64)


def assert_close(actual: list[Tensor], expected: list[Tensor], digits: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        dense = a.to_dense().double()
        assert (dense - b.double()).norm() <= digits * b.double().norm()


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16])
def on_torch(request):
    with moezoo_kernels.use("torch"):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def on_cpp(request, native_library):
    with moezoo_kernels.use("cpu"):
        yield request.param


SIZES = [
    {},
    {"tokens": 0},
    {"tokens": 1, "choices": 1},
    {"choices": 0},
    {"rows": 1},
    {"width": 1},
    {"width": 64, "choices": 16},
    {"width": 131, "rows": 3000},
    {"tokens": 500, "rows": 3},
    {"routing": "all none"},
    {"routing": "one row"},
    {"rows": 0, "routing": "all none"},
]


def _equals_the_reference(dtype, sparse, sizes):
    given = problem(**sizes).to(dtype)
    expected = given.to(torch.float64).outputs(reference)
    actual = given.outputs(sparse=sparse)
    assert actual[1].is_sparse == sparse
    assert [t.dtype for t in actual] == [dtype, dtype, torch.promote_types(dtype, torch.float32)]
    # The table's own rounding is in the reference as well: what is left is that of the result,
    # and, on torch, that of the weights.
    assert_close(actual, expected, DIGITS[dtype])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_torch_equals_the_reference(on_torch, poison_empty, sparse, sizes):
    _equals_the_reference(on_torch, sparse, sizes)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpp_equals_the_reference(on_cpp, poison_empty, sparse, sizes):
    _equals_the_reference(on_cpp, sparse, sizes)


def test_the_reference_is_the_formula():
    given = problem(tokens=5)
    expected = torch.zeros(5, 37, dtype=torch.float64)
    for t, row in enumerate(given.indices.tolist()):
        for j, i in enumerate(row):
            if i >= 0:
                expected[t] += given.weights[t, j].detach() * given.table[i].detach()
    torch.testing.assert_close(given.outputs(reference)[0], expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_threads_and_reruns_change_no_bit(on_cpp, sparse):
    given = problem(tokens=400, choices=9, rows=300, width=65).to(on_cpp)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        results.append([t.to_dense() for t in given.outputs(sparse=sparse)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_strides_do_not_matter(on_cpp):
    given = problem().to(on_cpp)
    expected = given.outputs()
    table = torch.stack([given.table.detach()] * 2, dim=-1)[..., 0].requires_grad_()
    weights = given.weights.detach().t().contiguous().t().requires_grad_()
    indices, grad = given.indices.t().contiguous().t(), given.grad.t().contiguous().t()
    assert not table.is_contiguous()
    actual = Problem(table, indices, weights, grad).outputs()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("sparse", [False, True])
def test_only_what_is_asked_for_is_computed(backend, sparse):
    with moezoo_kernels.use(backend):
        given = problem().to(torch.float32)
        _, of_table, of_weights = given.outputs(sparse=sparse)
        output = weighted_bag(given.table, given.indices, given.weights.detach(), sparse=sparse)
        output.backward(given.grad)
        assert torch.equal(given.table.grad.to_dense(), of_table.to_dense())
        output = weighted_bag(given.table.detach(), given.indices, given.weights, sparse=sparse)
        output.backward(given.grad)
        torch.testing.assert_close(given.weights.grad, of_weights)


def test_sparse_gradients_are_coalesced_and_name_only_rows_read(on_cpp):
    given = problem(rows=1000).to(on_cpp)
    of_table = given.outputs(sparse=True)[1]
    assert of_table.is_coalesced()
    assert torch.equal(of_table.indices()[0], given.indices[given.indices >= 0].unique())


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_what_nobody_reads_may_be_nan(backend):
    given = problem().to(torch.float32)
    given.indices[given.indices == 3] = -1
    with torch.no_grad():
        given.table[3] = torch.nan
        given.weights[given.indices < 0] = torch.nan
    with moezoo_kernels.use(backend):
        output, of_table, of_weights = given.outputs()
    assert all(t.isfinite().all() for t in (output, of_table, of_weights))
    assert not of_weights[given.indices < 0].any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("wrong", [-2, 40])
def test_an_index_out_of_range_is_an_error(backend, wrong):
    given = problem().to(torch.float32)
    given.indices[2, 3] = wrong
    with moezoo_kernels.use(backend), pytest.raises(ValueError, match=f"indices: {wrong} is not"):
        weighted_bag(given.table, given.indices, given.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(3)}, "give table"),
        ({"indices": torch.zeros(63, 7)}, "indices: dtype is torch.float32"),
        ({"weights": torch.zeros(63, 6)}, "weights: shape is"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    given = problem()
    operands = {"table": given.table, "indices": given.indices, "weights": given.weights}
    with pytest.raises(ValueError, match=message):
        weighted_bag(**(operands | change))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    given = problem(tokens=5).to(torch.float32)
    arguments = (given.table, given.indices, given.weights, False, backend)
    torch.library.opcheck(torch.ops.moezoo.weighted_bag, arguments)
    torch.library.opcheck(torch.ops.moezoo.sort_by_row, (given.indices, 40))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_traces_into_one_graph(backend):
    torch._dynamo.reset()
    given = problem().to(torch.float32)
    with moezoo_kernels.use(backend):
        compiled = torch.compile(weighted_bag, fullgraph=True, backend="aot_eager")
        expected = given.outputs()
        actual = given.outputs(compiled)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_sparse_gradients_are_refused_under_compile():
    torch._dynamo.reset()
    given = problem().to(torch.float32)
    with pytest.raises(Exception, match="no sparse gradients; set it to false"):
        torch.compile(weighted_bag, fullgraph=True, backend="eager")(
            given.table, given.indices, given.weights, sparse=True
        )


def test_autocast_changes_nothing(on_cpp):
    given = problem().to(on_cpp)
    expected = given.outputs()
    with torch.autocast("cpu", torch.bfloat16):
        actual = given.outputs()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_checkpointing_recomputes_the_same_bits(on_cpp):
    given = problem().to(on_cpp)

    def run(table, indices, weights):
        return checkpoint(weighted_bag, table, indices, weights, use_reentrant=False)

    for a, b in zip(given.outputs(run), given.outputs(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_flops_are_those_of_the_rows_read(backend):
    given = problem().to(torch.float32)
    with moezoo_kernels.use(backend), FlopCounterMode(display=False) as counter:
        given.outputs()
    assert counter.get_total_flops() == 3 * 2 * int(given.indices.ge(0).sum()) * 37
