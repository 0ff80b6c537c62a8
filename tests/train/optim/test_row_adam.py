"""Adam by rows: the updates are SparseAdam's, and nothing goes over the whole table."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moezoo import STEM, Engram, MoLE, ProductKeyMemory
from moezoo_kernels.adam_rows import adam_rows
from moezoo_train.optim import clipping
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.optim.row_adam import RowAdam

ROWS, OPTIONS = 50, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}


def gradient(table: torch.Tensor, step: int) -> torch.Tensor:
    """A sparse gradient of a few rows, of which one comes twice in odd steps."""
    rows = torch.tensor([7, 0, 49, 31, 7]) if step % 2 else torch.tensor([0, 3, 31])
    values = torch.randn(len(rows), *table.shape[1:], dtype=table.dtype) * 0.1
    return torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 19, 64])
def test_steps_are_those_of_sparse_adam(native_library, dtype, width):
    table = torch.nn.Parameter(torch.randn(ROWS, width, dtype=dtype))
    twin = copy.deepcopy(table)
    ours, theirs = RowAdam([table], **OPTIONS), torch.optim.SparseAdam([twin], **OPTIONS)
    for step in range(4):
        before = table.detach().clone()
        twin.grad = gradient(table, step)
        table.grad = twin.grad.clone()
        touched = twin.grad.coalesce().indices()[0]
        for optimizer in (ours, theirs):
            optimizer.step()
        stays = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, touched, False)
        assert torch.equal(table[stays], before[stays])
        assert (table[touched] != before[touched]).all()
    tight = {"rtol": 1e-13, "atol": 1e-15} if dtype == torch.float64 else {}
    torch.testing.assert_close(table, twin, **tight)
    states = ours.state_dict()["state"][0], theirs.state_dict()["state"][0]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, **tight)


def test_either_goes_on_from_the_others_state():
    table = torch.nn.Parameter(torch.randn(ROWS, 5))
    twin = copy.deepcopy(table)
    table.grad = gradient(table, 0)
    first = RowAdam([table], **OPTIONS)
    first.step()
    twin.data.copy_(table)
    second = torch.optim.SparseAdam([twin], **OPTIONS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    table.grad = gradient(table, 1)
    twin.grad = table.grad.clone()
    for optimizer in (first, second):
        optimizer.step()
    torch.testing.assert_close(table, twin)


def test_cpp_and_torch_agree_and_threads_change_nothing(native_library):
    rows = torch.randperm(4000)[:3000]
    values = torch.randn(3000, 16)
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "step_size": 0.1}
    start = [torch.randn(4000, 16), torch.randn(4000, 16), torch.rand(4000, 16)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        tensors = [tensor.clone() for tensor in start]
        adam_rows(*tensors, rows, values, **options)
        found.append(tensors)
    torch.set_num_threads(before)
    strided = [tensor.t().contiguous().t() for tensor in start]  # which C++ does not take
    adam_rows(*strided, rows, values, **options)
    for one, other, plain in zip(*found, strided, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-6)
    adam_rows(*tensors, rows[:0], values[:0], **options)  # no row, no step
    assert all(torch.equal(a, b) for a, b in zip(tensors, found[0], strict=True))


class WholeTables(TorchDispatchMode):
    """Lists what torch's operators make, or overwrite, that is as large as a table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = [a.untyped_storage().data_ptr() for a in args if is_strided(a)]
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if not is_strided(tensor) or tensor.untyped_storage().nbytes() < self.size:
                continue
            if tensor.untyped_storage().data_ptr() not in given or function._schema.is_mutable:
                self.found.append(str(function))
        return made


def is_strided(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (lambda: Engram(16, num_heads=2, num_rows=30000, vocab_size=50, sparse=True), 120000),
        (lambda: STEM(16, d_ff=4, vocab_size=60000, sparse=True), 60000),
        (lambda: MoLE(16, d_expert=4, d_ff=4, vocab_size=30000, sparse=True), 30000),
        (lambda: ProductKeyMemory(16, num_keys=200, top_k=2, v_dim=8, sparse=True), 160000),
    ],
    ids=["engram", "stem", "mole", "memory"],
)
def test_a_step_makes_nothing_as_large_as_the_table(layer, size):
    """Forward, statistics, backward, norms, clipping, update: below a number of bytes."""
    model = layer().train()
    optimizer = build_optimizer(model, OptimizerConfig())
    (table,) = (p for g in model.parameter_groups() if g.sparse for p in g.parameters)
    assert 4 * len(table) >= size  # so that a float per row would be seen

    def step() -> None:
        optimizer.zero_grad()
        ids = torch.randint(50, (2, 10))
        context = {"token_ids": ids} if model.needs_token_ids else {}
        output = model(torch.randn(2, 10, 16), **context)
        assert output.stats["usage"] > 0
        output.hidden.square().sum().backward()
        gradients = clipping.grouped_gradients(optimizer)
        clipping.clip_norms(gradients, clipping.gradient_norms(gradients), 0.1)
        optimizer.step()

    step()  # the first makes the moments
    before = table.detach().clone()
    with WholeTables(size) as watch:
        step()
    assert watch.found == []
    assert 0 < (table != before).any(dim=1).sum() <= 2 * 10 * 8
