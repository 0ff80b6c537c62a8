"""Single-neuron experts: every backend against the formula written out, and what each keeps."""

import pytest
import torch
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels import native, rank_one_experts
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.rank_one_experts import cpu, plain_torch
from moezoo_kernels.rank_one_experts.operands import Experts
from moezoo_kernels.rank_one_experts.reference import rank_one_experts as reference


@pytest.fixture(params=["cpu by token", "cpu by expert", "torch"])
def backend(request, monkeypatch):
    name, _, order = request.param.partition(" ")
    if name == "cpu" and (reason := native.unusable(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", float("inf") if order == "by token" else 0)
    with moezoo_kernels.use(name):
        yield name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_output_and_gradients_are_those_of_the_formula(
    make_rank_one, assert_near, gated, activation, poison_empty
):
    problem = make_rank_one(gated=gated, activation=activation)
    assert_near(problem.outputs(rank_one_experts), problem.outputs(reference), 1e-14)


@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_routings_of_every_kind(make_rank_one, assert_near, routing, tokens, poison_empty):
    problem = make_rank_one(tokens, routing=routing, gated=True)
    assert_near(problem.outputs(rank_one_experts), problem.outputs(reference), 1e-14)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_dtypes_stay_near_the_exact_answer(make_rank_one, assert_near, backend, dtype, gated):
    short = make_rank_one(200, gated=gated, dtype=dtype)
    found = short.outputs(rank_one_experts)
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-6
    assert_near(found, short.to(torch.float64).outputs(reference), bound)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "weights" else dtype)


def every_gradient(problem) -> dict[str, torch.Tensor]:
    """Also with frozen tables, when the gradients of x and weights may be made by token."""
    found = problem.outputs(rank_one_experts)
    tables = {name: getattr(problem, name) for name in ("u", "v", "gate")}
    for name, table in tables.items():
        setattr(problem, name, None if table is None else table.detach())
    output = problem.run(rank_one_experts)
    x, weights = torch.autograd.grad(output, [problem.x, problem.weights], problem.grad)
    for name, table in tables.items():
        setattr(problem, name, table)
    return found | {"x alone": x, "weights alone": weights}


@pytest.mark.parametrize("order", [0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_library_computes_every_activation(
    make_rank_one, assert_near, native_library, monkeypatch, poison_empty, activation, dtype, order
):
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", order)
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-6
    for gated, width in ((False, 29), (True, 165)):  # less than a stripe of columns, and more
        short = make_rank_one(150, width, activation=activation, gated=gated, dtype=dtype)
        short.x, short.grad = 3 * short.x, short.grad.float()  # into the activations' tails
        exact = short.to(torch.float64).outputs(reference)
        exact |= {"x alone": exact["x"], "weights alone": exact["weights"]}
        with moezoo_kernels.use("cpu"):
            assert_near(every_gradient(short), exact, bound)


@pytest.mark.parametrize("order", [0, float("inf")])
@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_routings_of_every_kind_in_c(
    make_rank_one, assert_near, native_library, monkeypatch, poison_empty, routing, tokens, order
):
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", order)
    problem = make_rank_one(tokens, routing=routing, gated=True, dtype=torch.float32)
    exact = problem.to(torch.float64).outputs(reference)
    exact |= {"x alone": exact["x"], "weights alone": exact["weights"]}
    with moezoo_kernels.use("cpu"):
        assert_near(every_gradient(problem), exact, 2e-6)


@pytest.mark.parametrize("order", [0, float("inf")])
@pytest.mark.parametrize("routing", ["some_none", "one_expert"])
def test_any_number_of_threads_gives_the_same_bits(
    make_rank_one, native_library, monkeypatch, routing, order
):
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", order)
    problem = make_rank_one(1000, 272, 600, 7, routing=routing, gated=True, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    with moezoo_kernels.use("cpu"):
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(every_gradient(problem))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_tokens_give_the_bits_of_one_pass(
    make_rank_one, assert_near, native_library, monkeypatch, poison_empty, routing, dtype
):
    """Experts without a token in the first block, or in any, among them."""
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", 0)
    problem = make_rank_one(63, 165, routing=routing, gated=True, dtype=dtype)
    found, calls, call = [], [], native.call
    for tokens in (1 << 40, 10):
        monkeypatch.setattr(cpu, "_BLOCK_TOKENS", tokens)
        monkeypatch.setattr(cpu, "_BLOCK_ASSIGNMENTS_PER_EXPERT", 0)
        monkeypatch.setattr(native, "call", lambda *a: (calls.append(a[0]), call(*a)))
        calls.clear()
        with moezoo_kernels.use("cpu"):
            found.append(every_gradient(problem))
    assert calls.count("moezoo_rank_one_experts_by_expert") == 2 * 6  # and again, frozen
    backward = calls.count("moezoo_rank_one_experts_backward_by_expert")
    assert backward == (6 if dtype == torch.float32 else 1) + 6
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    exact = problem.to(torch.float64).outputs(reference)
    exact |= {"x alone": exact["x"], "weights alone": exact["weights"]}
    assert_near(found[1], exact, 2e-2 if dtype == torch.bfloat16 else 2e-6)


def test_sparse_gradients_are_of_the_rows_of_all_blocks(make_rank_one, monkeypatch):
    monkeypatch.setattr(cpu, "_ASSIGNMENTS_PER_EXPERT", 0)
    monkeypatch.setattr(cpu, "_BLOCK_ASSIGNMENTS_PER_EXPERT", 0)
    problem = make_rank_one(63, dtype=torch.float32)
    found = []
    for tokens in (1 << 40, 10):
        monkeypatch.setattr(cpu, "_BLOCK_TOKENS", tokens)
        problem.u.requires_grad_(), problem.v.requires_grad_()
        with moezoo_kernels.use("cpu"):
            output = problem.run(rank_one_experts, sparse=True)
            found.append(torch.autograd.grad(output, [problem.u, problem.v], problem.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_larger_than_a_cache_are_streamed_right(make_rank_one, native_library, dtype):
    """From 8 MiB on: rows without assignments too, and rows with more than are summed at once."""
    rows = 9 * 2**20 // (64 * dtype.itemsize)
    problem = make_rank_one(40, 64, rows, 6, routing="repeated", dtype=dtype)
    problem.indices[:, 0] = 3
    wanted = {}
    for name in ("torch", "cpu"):
        with moezoo_kernels.use(name):
            wanted[name] = problem.outputs(rank_one_experts)
    for name, value in wanted["torch"].items():
        difference = (wanted["cpu"][name].float() - value.float()).norm()
        assert difference <= 1e-2 * value.float().norm(), name
        assert torch.equal(wanted["cpu"][name] == 0, value == 0), name


def test_the_order_is_chosen_by_assignments_per_expert(make_rank_one, monkeypatch):
    called = []
    monkeypatch.setattr(native, "call", lambda name, *arguments: called.append(name))
    for experts, expected in ((8, "by_expert"), (9, "by_token")):
        p = make_rank_one(1, 5, experts, 6, dtype=torch.float32)
        cpu.forward(p.x, Experts(p.u, p.v, None, "gelu"), p.indices, p.weights)
        assert called.pop() == f"moezoo_rank_one_experts_{expected}"


def test_empty_slots_have_no_gradient_and_padding_may_be_anything(make_rank_one, backend):
    problem = make_rank_one(gated=True, dtype=torch.float32)
    problem.indices[5] = -1
    clean = problem.outputs(rank_one_experts)
    problem.x = problem.x.detach().clone()
    problem.x[5] = torch.nan
    found = problem.outputs(rank_one_experts)
    assert (clean["y"][5] == 0).all()
    for name, value in clean.items():
        assert torch.equal(found[name], value), name
    assert (clean["weights"][problem.indices < 0] == 0).all()
    assert (clean["weights"][problem.indices >= 0] != 0).all()


def test_chunks_of_tokens_change_nothing(make_rank_one, assert_near, monkeypatch):
    problem = make_rank_one(gated=True)
    whole = problem.outputs(rank_one_experts)
    for rows in (1, 2 * 6, 5 * 6):
        monkeypatch.setattr(plain_torch, "_CHUNK_BYTES", {"cpu": rows * 29 * 8})
        assert_near(problem.outputs(rank_one_experts), whole, 1e-14)


def test_frozen_tables_get_no_gradient_and_the_others_the_same(make_rank_one, assert_near, backend):
    problem = make_rank_one(gated=True, dtype=torch.float32)
    whole = problem.outputs(rank_one_experts)
    names = ["x", "u", "v", "gate", "weights"]
    for frozen in (["u"], ["v"], ["gate"], ["x", "weights"], ["u", "v", "gate"], names[:4]):
        wanted = [name for name in names if name not in frozen]
        for name in frozen:
            setattr(problem, name, getattr(problem, name).detach())
        output = problem.run(rank_one_experts)
        operands = [getattr(problem, name) for name in wanted]
        found = torch.autograd.grad(output, operands, problem.grad)
        found = dict(zip(wanted, found, strict=True))
        assert_near(found, {name: whole[name] for name in wanted}, 5e-7)
        for name in frozen:
            getattr(problem, name).requires_grad_()


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_sparse_gradients_hold_the_rows_that_were_read(make_rank_one, backend, tokens):
    problem = make_rank_one(tokens, gated=True, dtype=torch.float32)
    dense = problem.outputs(rank_one_experts)
    sparse = problem.outputs(rank_one_experts, sparse=True)
    read = problem.indices.unique()
    for name in ("u", "v", "gate"):
        assert sparse[name].is_sparse
        assert torch.equal(sparse[name].coalesce().indices()[0], read[read >= 0])
        assert torch.equal(sparse[name].to_dense(), dense[name])
    assert torch.equal(sparse["x"], dense["x"])


def test_strided_operands_give_the_same(make_rank_one, assert_near, backend):
    problem = make_rank_one(gated=True, dtype=torch.float32)
    expected = problem.outputs(rank_one_experts)
    for name in ("x", "u", "v", "gate", "weights", "grad", "indices"):
        tensor = getattr(problem, name).detach()
        setattr(problem, name, tensor.t().contiguous().t())
    assert_near(problem.outputs(rank_one_experts), expected, 5e-7)


@pytest.mark.parametrize("gated", [False, True])
def test_op_is_registered_as_torch_wants_it(make_rank_one, backend, gated):
    p = make_rank_one(5, gated=gated, dtype=torch.float32)
    for tensor in (p.x, p.u, p.v, p.weights, *([p.gate] if gated else [])):
        tensor.requires_grad_()
    arguments = (p.x, p.u, p.v, p.gate, p.indices, p.weights, "silu", False, backend)
    opcheck(torch.ops.moezoo.rank_one_experts.default, arguments)


def test_compiles_as_a_whole_with_the_same_numbers(make_rank_one, backend):
    problem = make_rank_one(gated=True, dtype=torch.float32)
    expected = problem.outputs(rank_one_experts)
    torch._dynamo.reset()
    compiled = torch.compile(rank_one_experts, fullgraph=True, backend="aot_eager")
    for name, value in problem.outputs(compiled).items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(Exception, match=r"sparse: torch.compile has no sparse"):
        problem.run(compiled, sparse=True)


def test_autocast_decides_the_output_s_dtype_only(make_rank_one, backend):
    problem = make_rank_one(dtype=torch.float32)
    expected = problem.run(rank_one_experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = problem.run(rank_one_experts)
    assert torch.equal(output, expected.bfloat16())
    problem.x = problem.x.detach().bfloat16()
    assert problem.run(rank_one_experts).dtype == torch.bfloat16


def test_checkpointing_gives_the_same_gradients(make_rank_one, backend):
    problem = make_rank_one(gated=True, dtype=torch.float32)

    def recomputed(*operands, **options):
        return checkpoint(rank_one_experts, *operands, **options, use_reentrant=False)

    expected = problem.outputs(rank_one_experts)
    for name, value in problem.outputs(recomputed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_of_the_rows_read(make_rank_one, backend, gated):
    problem = make_rank_one(gated=gated, dtype=torch.float32)
    rows = int((problem.indices >= 0).sum()) * 29 * 2
    with FlopCounterMode(display=False) as forward:
        problem.run(rank_one_experts)
    assert forward.get_total_flops() == rows * (3 if gated else 2)
    with FlopCounterMode(display=False) as both:
        problem.outputs(rank_one_experts)
    assert both.get_total_flops() == 3 * rows * (3 if gated else 2)
    for name in ("x", "u", "gate") if gated else ("x", "u"):
        setattr(problem, name, getattr(problem, name).detach())
    with FlopCounterMode(display=False) as both:
        torch.autograd.grad(problem.run(rank_one_experts), problem.v, problem.grad)
    assert both.get_total_flops() == rows * ((3 if gated else 2) + 2)


class Meter:
    """The most memory that was allocated at once, and the largest single piece, in bytes."""

    def __enter__(self) -> "Meter":
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        events = list(self._profile.profiler.kineto_results.events())
        moves = sorted(
            (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.nbytes()
        )
        held = self.peak = 0
        self.largest = max((size for _, size in moves), default=0)
        for _, size in moves:
            held += size
            self.peak = max(self.peak, held)


@pytest.mark.parametrize("gated", [False, True])
def test_no_tensor_of_every_gathered_row_is_saved_or_exists(make_rank_one, backend, gated):
    tokens, choices, width = 2048, 32, 64
    problem = make_rank_one(tokens, width, 100, choices, gated=gated, dtype=torch.float32)
    gathered = tokens * choices * width * 4
    problem.outputs(rank_one_experts)  # first use loads code
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = problem.run(rank_one_experts)
    tensors = (getattr(problem, name) for name in ("x", "u", "v", "gate", "indices", "weights"))
    own = {t.data_ptr() for t in tensors if t is not None}
    extra = sum(size for pointer, size in saved.items() if pointer not in own)
    assert extra == tokens * choices * 4 * (2 if gated else 1)  # pre-activations

    with Meter() as meter:
        problem.run(rank_one_experts)
    assert meter.peak < gathered / 4
    with Meter() as meter:
        y.sum().backward()
    assert meter.largest <= gathered / 8
    assert meter.peak < gathered / 2

    with Meter() as meter:  # the meter sees what it is to find
        problem.run(reference)
    assert meter.largest >= gathered / 2  # half of the rows have no index of -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelo"}, r"activation: 'gelo' is not known; choose from: relu, gelu, "),
        ({"x": torch.ones(3)}, r"give x \(T, D\), u \(N, D\), indices \(T, J\), not x \(3,\)"),
        ({"x": torch.ones(63, 5)}, r"x: shape is \(63, 5\), the others ask for \(63, 29\)"),
        ({"v": torch.ones(41, 5)}, r"v: shape is \(41, 5\), the others ask for \(41, 29\)"),
        ({"gate": torch.ones(7, 29)}, r"gate: shape is \(7, 29\), the others ask for \(41, 29\)"),
        ({"weights": torch.ones(63, 5)}, r"weights: shape is \(63, 5\), the others ask for"),
        ({"v": torch.ones(41, 29).half()}, r"v: dtype is torch.float16, u has torch.float32"),
        ({"indices": torch.ones(63, 6)}, r"indices: dtype is torch.float32; give torch.int64"),
    ],
)
def test_mistakes_are_named(make_rank_one, changes, message):
    problem = make_rank_one(dtype=torch.float32)
    for name, value in changes.items():
        setattr(problem, name, value)
    with pytest.raises(ValueError, match=message):
        problem.run(rank_one_experts)


@pytest.mark.parametrize("wrong", [-2, 41])
@pytest.mark.parametrize("tokens", [1, 63])
def test_an_index_of_no_expert_is_refused(make_rank_one, backend, tokens, wrong):
    problem = make_rank_one(tokens, dtype=torch.float32)
    problem.indices[-1, -1] = wrong
    with pytest.raises(ValueError, match=rf"indices: {wrong} is not a row; give -1 \(none\) … 40"):
        problem.run(rank_one_experts)
