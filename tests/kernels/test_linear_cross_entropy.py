"""linear_cross_entropy: loss and every gradient, at awkward sizes, and what it keeps."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo.bench.memory import saved_storages, temporary_bytes
from moezoo_kernels import linear_cross_entropy, product_libraries
from moezoo_kernels.linear_cross_entropy import chunked, cpu
from moezoo_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

DIGITS = {torch.float64: 1e-13, torch.float32: 1e-6}
CHUNKS = {"one chunk": 1000, "many chunks": 5, "chunks of a token": 1}


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    grad: float = 1.7

    def to(self, dtype: torch.dtype) -> "Problem":
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (self.hidden, self.weight))
        return Problem(hidden, weight, self.labels, self.grad)

    def outputs(self, function=linear_cross_entropy, **options) -> list[Tensor]:
        loss, z_loss, count = function(self.hidden, self.weight, self.labels, **options)
        gradients = torch.autograd.grad(self.grad * loss, [self.hidden, self.weight])
        return [loss.detach(), z_loss, count, *gradients]


def problem(tokens=63, vocabulary=1001, width=37, ignored="some") -> Problem:
    labels = torch.randint(vocabulary, (tokens,))
    if ignored == "some":
        labels[torch.rand(tokens) < 0.3] = -100
    if ignored == "all":
        labels.fill_(-100)
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    return Problem(hidden, weight, labels).to(torch.float64)


def assert_close(actual: list[Tensor], expected: list[Tensor], digits: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= digits * b.double().norm()


def assert_as_near(actual: list[Tensor], others: list[Tensor], exact: list[Tensor]) -> None:
    """Compare errors; a scalar's is luck, so that one may be as large as the dtype's rounding."""
    for own, theirs, truth in zip(actual, others, exact, strict=True):
        error, other = ((t.double() - truth.double()).norm() for t in (own, theirs))
        assert error <= 1.1 * other if truth.ndim else error <= 2**-9 * truth.abs()


@pytest.fixture(params=CHUNKS)
def chunks(request, monkeypatch):
    tokens_per_chunk = CHUNKS[request.param]
    monkeypatch.setattr(chunked, "chunk_size", lambda tokens, width: tokens_per_chunk)


@pytest.fixture(params=[torch.float64, torch.float32])
def on_torch(request):
    with moezoo_kernels.use("torch"):
        yield request.param


@pytest.fixture
def on_cpp(native_library):
    with moezoo_kernels.use("cpu"):
        yield torch.float32


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    with moezoo_kernels.use(request.param):
        yield request.param


SIZES = [
    {},
    {"ignored": "none"},
    {"ignored": "all"},
    {"tokens": 0},
    {"tokens": 1, "ignored": "none"},
    {"vocabulary": 1},
    {"width": 1},
    {"vocabulary": 3, "tokens": 200, "width": 64},
    {"vocabulary": 64, "tokens": 5},
    {"vocabulary": 4097, "tokens": 5},
]


def _equals_the_reference(dtype, sizes, z_loss):
    given = problem(**sizes).to(dtype)
    actual = given.outputs(z_loss=z_loss)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.int64, dtype, dtype]
    assert_close(actual, given.to(torch.float64).outputs(reference, z_loss=z_loss), DIGITS[dtype])


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_torch_equals_the_reference(on_torch, chunks, poison_empty, sizes, z_loss):
    _equals_the_reference(on_torch, sizes, z_loss)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpp_equals_the_reference(on_cpp, poison_empty, sizes, z_loss):
    _equals_the_reference(on_cpp, sizes, z_loss)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("sizes", [{"tokens": 451}, {"tokens": 451, "ignored": "none"}])
def test_large_products_equal_the_reference(backend, by_onednn, sizes, z_loss, monkeypatch):
    if by_onednn and not product_libraries.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    products, run = [], product_libraries.onednn_linear
    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: by_onednn)
    monkeypatch.setattr(
        product_libraries, "onednn_linear", lambda *parts: products.append(1) or run(*parts)
    )
    exact = problem(vocabulary=1031, width=192, **sizes)
    exact.weight.data *= 0.1
    found = exact.to(torch.float32).outputs(z_loss=z_loss)
    assert_close(found, exact.outputs(reference, z_loss=z_loss), DIGITS[torch.float32])
    assert bool(products) is by_onednn


def test_the_reference_is_the_formula():
    given = problem(tokens=7, vocabulary=5, width=3)
    with torch.no_grad():
        loss, z_loss, count = reference(given.hidden, given.weight, given.labels, z_loss=0.1)
    entropies, squares = [], []
    for row, label in zip(given.hidden.tolist(), given.labels.tolist(), strict=True):
        if label == -100:
            continue
        logits = [sum(h * w for h, w in zip(row, v, strict=True)) for v in given.weight.tolist()]
        partition = math.log(sum(map(math.exp, logits)))
        entropies.append(partition - logits[label])
        squares.append(partition**2)
    assert int(count) == len(entropies)
    assert float(z_loss) == pytest.approx(0.1 * sum(squares) / len(squares))
    assert float(loss - z_loss) == pytest.approx(sum(entropies) / len(entropies))


@pytest.mark.parametrize("dtype", DIGITS)
def test_equals_torchs_cross_entropy(chunks, dtype):
    def plain(hidden, weight, labels):
        loss = F.cross_entropy(F.linear(hidden, weight), labels)
        return loss, loss.new_zeros(()), (labels != -100).sum()

    given = problem().to(dtype)
    assert_close(given.outputs(), given.outputs(plain), DIGITS[dtype])


def test_bf16_is_as_near_to_the_truth_as_plain_torch(backend, chunks):
    given = problem(tokens=300).to(torch.bfloat16)
    exact = given.to(torch.float64).outputs(reference)
    plain = given.outputs(reference)
    assert_as_near(given.outputs(), plain, exact)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32(backend, chunks):
    given = problem(tokens=300).to(torch.float32)
    exact = given.to(torch.float64).outputs(reference)
    with torch.autocast("cpu", torch.bfloat16):
        own, theirs = given.outputs(), given.outputs(reference)
    assert [t.dtype for t in own] == [t.dtype for t in theirs]
    assert_as_near(own, theirs, exact)
    of_weight = own[-1]
    assert not torch.equal(of_weight, of_weight.bfloat16().float())


def test_fp16_products_do_not_lose_small_gradients():
    given = problem(tokens=100, width=16, vocabulary=50)
    given.hidden.data.mul_(1e-2)
    exact, actual = given.outputs(reference), given.to(torch.float16).outputs()
    assert actual[-1].dtype == torch.float16
    assert_close(actual[-2:], exact[-2:], 4e-3)


def test_large_logits_do_not_overflow(backend):
    given = problem(ignored="none").to(torch.float32)
    given.hidden.data.mul_(1e4)
    assert_close(given.outputs(), given.to(torch.float64).outputs(reference), 1e-6)


def test_threads_and_reruns_change_no_bit_of_a_softmax(on_cpp):
    logits, labels = torch.randn(40, 1001), torch.randint(1001, (40,))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        losses, partitions, slopes = torch.empty(40), torch.empty(40), logits.clone()
        cpu.Softmax(slopes)(slopes, labels, losses, partitions, 0.1, True)
        results.append([losses, partitions, slopes])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_reruns_change_no_bit(backend, chunks):
    given = problem(tokens=200).to(torch.float32)
    results = [given.outputs(z_loss=0.1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(backend, value):
    given = problem(ignored="none").to(torch.float32)
    with torch.no_grad():
        given.hidden[3, 0] = value
    loss, _, _, of_hidden, of_weight = given.outputs()
    assert loss.isnan()
    assert of_hidden[3].isnan().all()
    assert of_weight.isnan().any()


def test_batches_and_strides_do_not_matter():
    given = problem(tokens=60).to(torch.float32)
    expected = given.outputs()
    hidden = given.hidden.detach().view(6, 10, 37).transpose(0, 1).requires_grad_()
    weight = given.weight.detach().t().contiguous().t().requires_grad_()
    labels = given.labels.view(6, 10).t()
    assert not hidden.is_contiguous()
    actual = Problem(hidden, weight, labels).outputs()
    actual[3] = actual[3].transpose(0, 1).reshape(60, 37)
    assert_close(actual, expected, 1e-6)


def test_other_labels_can_be_left_out():
    given = problem()
    expected = given.outputs()
    given.labels[given.labels == -100] = 7_000
    actual = given.outputs(ignore_index=7_000)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_no_label_asks_for_may_be_nan(backend):
    given = problem().to(torch.float32)
    with torch.no_grad():
        given.hidden[given.labels == -100] = torch.nan
    assert all(t.isfinite().all() for t in given.outputs())


def test_a_tied_embedding_gets_the_sum_of_both_gradients(chunks):
    given, embedding = problem(), nn.Embedding(1001, 37, dtype=torch.float64)
    tokens = torch.randint(1001, (63,))

    def gradient(function) -> Tensor:
        loss = function(embedding(tokens) * 2, embedding.weight, given.labels)[0]
        return torch.autograd.grad(loss, embedding.weight)[0]

    assert_close([gradient(linear_cross_entropy)], [gradient(reference)], 1e-13)


def test_gradients_add_up_over_micro_batches():
    one, other = problem().to(torch.float32), problem().to(torch.float32)
    weight = one.weight.detach().requires_grad_()
    for given in (one, other):
        (linear_cross_entropy(given.hidden, weight, given.labels).loss / 2).backward()
    expected = []
    for given in (one, other):
        loss = reference(given.hidden.double(), weight.double(), given.labels)[0] / 2
        expected.append(torch.autograd.grad(loss, weight)[0])
    assert_close([weight.grad], [sum(expected)], 1e-6)


def test_the_graph_can_be_used_twice():
    given = problem().to(torch.float32)
    loss = linear_cross_entropy(given.hidden, given.weight, given.labels).loss
    loss.backward(retain_graph=True)
    first = given.weight.grad.clone()
    loss.backward()
    assert torch.equal(given.weight.grad, 2 * first)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_asked_for_is_computed(frozen):
    given = problem().to(torch.float32)
    expected = given.outputs()
    getattr(given, frozen).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        output = linear_cross_entropy(given.hidden, given.weight, given.labels)
    assert counter.get_total_flops() == 2 * 2 * int(output.num_labels) * 1001 * 37
    (given.grad * output.loss).backward()
    left, right = (given.weight, 4) if frozen == "hidden" else (given.hidden, 3)
    assert torch.equal(left.grad, expected[right])
    assert getattr(given, frozen).grad is None


def test_without_gradients_there_is_no_work_for_them(backend):
    given = problem().to(torch.float32)
    expected = given.outputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = linear_cross_entropy(given.hidden, given.weight, given.labels)
    assert torch.equal(output.loss, expected[0])
    assert counter.get_total_flops() == 2 * int(output.num_labels) * 1001 * 37


def test_flops_are_those_of_the_labels():
    given = problem().to(torch.float32)
    with FlopCounterMode(display=False) as counter:
        given.outputs()
    assert counter.get_total_flops() == 3 * 2 * int((given.labels != -100).sum()) * 1001 * 37


def test_what_is_saved_are_the_gradients():
    given = problem().to(torch.float32)
    with saved_storages() as kept:
        output = linear_cross_entropy(given.hidden, given.weight, given.labels)
    assert sorted(kept.values()) == [8, 4 * 63 * 37, 4 * 1001 * 37]
    del output


def test_memory_is_that_of_a_chunk():
    given = problem(tokens=500, ignored="none").to(torch.float32)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(given.hidden, given.weight, given.labels).loss
        return torch.autograd.grad(loss, [given.hidden, given.weight])

    gradients = 4 * 37 * (1001 + 500)
    chunk = chunked.scratch_bytes(500, 37, 1001)
    assert temporary_bytes(step, torch.device("cpu")) < gradients + chunk + 20_000 < 4 * 500 * 1001


@pytest.mark.parametrize("wrong", [-1, 1001])
def test_a_label_out_of_range_is_an_error(wrong):
    given = problem()
    given.labels[5] = wrong
    with pytest.raises(ValueError, match=f"labels: {wrong} is not a token; give 0 … 1000, or -100"):
        linear_cross_entropy(given.hidden, given.weight, given.labels)


class Sharded(Tensor):
    """As a DTensor is: it has a mesh."""

    device_mesh = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 36)}, "give hidden"),
        ({"labels": torch.zeros(63)}, "labels: dtype is torch.float32"),
        ({"labels": torch.zeros(62, dtype=torch.int64)}, "labels: shape is"),
        ({"weight": torch.zeros(5, 37)}, "weight: dtype is torch.float32"),
        ({"z_loss": -1.0}, "z_loss: -1.0 is out of range"),
        ({"weight": torch.zeros(5, 37).as_subclass(Sharded)}, "weight: is sharded"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    given = problem()
    operands = {"hidden": given.hidden, "weight": given.weight, "labels": given.labels}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(operands | change))


def test_second_derivatives_are_refused():
    given = problem(tokens=5, vocabulary=7, width=3)
    loss = linear_cross_entropy(given.hidden, given.weight, given.labels).loss
    with pytest.raises(RuntimeError, match="have no second derivative; use"):
        torch.autograd.grad(loss, given.hidden, create_graph=True)
    with moezoo_kernels.use("reference"):
        loss = linear_cross_entropy(given.hidden, given.weight, given.labels).loss
    (first,) = torch.autograd.grad(loss, given.hidden, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), given.hidden)[0].abs().sum() > 0


@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
def test_opcheck(backend, needs):
    given = problem(tokens=5, vocabulary=7, width=3).to(torch.float32)
    hidden = given.hidden.detach().requires_grad_(needs[0])
    weight = given.weight.detach().requires_grad_(needs[1])
    arguments = (hidden, weight, given.labels, -100, 0.1, *needs, torch.float32, backend)
    torch.library.opcheck(torch.ops.moezoo.linear_cross_entropy, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_traces_into_one_graph(autocast):
    torch._dynamo.reset()
    given = problem().to(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = given.outputs(), given.outputs(compiled)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_checkpointing_recomputes_the_same_bits():
    given = problem().to(torch.float32)

    def run(hidden, weight, labels):
        return checkpoint(linear_cross_entropy, hidden, weight, labels, use_reentrant=False)

    for a, b in zip(given.outputs(run), given.outputs(), strict=True):
        assert torch.equal(a, b)
