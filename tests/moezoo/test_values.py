"""The table of values: its bags, its gradients, and who shares it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moezoo
from moezoo.experts.values import ValueTable

LAYERS = (moezoo.ProductKeyMemory, moezoo.MemoryPlus)


def reads(tokens: int, slots: int, rows: int, dtype: torch.dtype = torch.float64):
    indices = torch.randint(slots, (tokens, rows))
    return indices, torch.rand(tokens, rows, dtype=dtype)


def gradients(table: ValueTable, call: str, indices, weights, mask) -> list[torch.Tensor]:
    weights = weights.clone().requires_grad_()
    table.weight.grad = None
    output = getattr(table, call)(indices, weights, mask)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    return [output.detach(), table.weight.grad.to_dense(), weights.grad]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("slots", [3, 200])  # few slots: heavy duplicates, also within a bag
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_bags_equal_a_dense_product_with_all_gradients(sparse, slots, dtype, tolerance):
    table = ValueTable(slots, 31, sparse=sparse).to(dtype)
    indices, weights = reads(63, slots, 17, dtype)
    for mask in (None, torch.rand(63) < 0.5, torch.zeros(63, dtype=torch.bool)):
        fast = gradients(table, "forward", indices, weights, mask)
        slow = gradients(table, "reference", indices, weights, mask)
        for a, b in zip(fast, slow, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("sparse", [False, True])
def test_reruns_are_bit_identical(sparse, poison_empty):
    torch.manual_seed(0)
    table = ValueTable(5, 16, sparse=sparse)
    indices, weights = reads(500, 5, 8, torch.float32)
    first, second = (gradients(table, "forward", indices, weights, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("layer", LAYERS)
def test_no_tensor_holds_the_gathered_values(layer):
    tokens, rows, width = 200, 2 * 8, 96
    memory = layer(width, num_keys=8, num_heads=2, top_k=8)
    hidden = torch.randn(tokens, width, requires_grad=True)
    with LargestTensor() as largest:
        memory(hidden).hidden.sum().backward()
    assert tokens * width <= largest.numel < tokens * rows * width / 4
    with LargestTensor() as largest:
        memory.memory.table.weight[torch.randint(64, (tokens, rows))]
    assert largest.numel == tokens * rows * width  # what it would have been


@pytest.mark.parametrize("layer", LAYERS)
def test_a_sparse_step_leaves_untouched_rows_bit_unchanged(layer):
    memory = layer(16, num_keys=32, num_heads=2, top_k=4, sparse=True)
    (group,) = [g for g in memory.parameter_groups() if g.name == "values"]
    assert group.sparse
    before = memory.memory.table.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(group.parameters, lr=0.1)
    mask = torch.arange(10) < 6
    hidden = torch.randn(10, 16)
    touched = torch.zeros(32**2, dtype=torch.bool)
    for _ in range(2):  # the second step has momentum to move rows with
        output = memory(hidden, mask=mask)
        output.hidden.square().sum().backward()
        touched |= output.stats["expert_counts"] > 0
        optimizer.step()
        optimizer.zero_grad()
        hidden = hidden.flip(0) + 1
    moved = (memory.memory.table.weight != before).any(dim=1)
    assert moved.any()
    assert not moved.all()
    assert torch.equal(moved, touched)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_one_pool_share_one_table(layer):
    def build() -> torch.nn.ModuleList:
        with moezoo.shared_values():
            return torch.nn.ModuleList(
                layer(16, num_keys=4, top_k=4, value_pool=name) for name in ("a", "a", "b", "a")
            )

    model, other = build(), build()
    pointers = [m.memory.table.weight.data_ptr() for m in model]
    assert pointers[0] == pointers[1] == pointers[3] != pointers[2]
    assert not set(pointers) & {m.memory.table.weight.data_ptr() for m in other}

    tables = [name for name in model.state_dict() if name.endswith("values.weight")]
    assert tables == ["0.memory.values.weight", "2.memory.values.weight"]
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == sum(m.cost().total_parameters for m in model)
    grouped = [p for m in model for g in m.parameter_groups() for p in g.parameters]
    assert sorted(map(id, grouped)) == sorted(map(id, parameters))


def test_a_shared_tables_gradient_is_the_sum_over_its_layers():
    with moezoo.shared_values():
        layers = [moezoo.MemoryPlus(16, num_keys=4, top_k=4, value_pool="m") for _ in range(3)]
    weight = layers[0].memory.table.weight
    hidden = torch.randn(3, 9, 16)
    alone = []
    for layer, x in zip(layers, hidden, strict=True):
        alone.append(torch.autograd.grad(layer(x).hidden.square().sum(), weight)[0])
    sum(layer(x).hidden.square().sum() for layer, x in zip(layers, hidden, strict=True)).backward()
    torch.testing.assert_close(weight.grad, sum(alone))
    assert all(g.any() for g in alone)


def test_a_shared_table_follows_its_model():
    with moezoo.shared_values():
        model = torch.nn.Sequential(
            *(moezoo.ProductKeyMemory(8, num_keys=4, top_k=4, value_pool="m") for _ in range(2))
        )
    copied = copy.deepcopy(model).double()
    assert copied[1].memory.table is copied[0].memory.values
    assert copied[1].memory.table is not model[0].memory.values
    assert copied[1].memory.table.weight.dtype == torch.float64
    before = model[0].memory.values.weight.detach().clone()
    model[1].reset_parameters()
    assert torch.equal(model[1].memory.table.weight, before)
    model[0].reset_parameters()
    assert not torch.equal(model[1].memory.table.weight, before)


def test_a_pool_needs_layers_that_agree():
    with moezoo.shared_values():
        moezoo.MemoryPlus(16, num_keys=4, top_k=4, value_pool="m")
        with pytest.raises(moezoo.InputError, match=r"pool 'm' differ in num_slots.*16 and 25"):
            moezoo.MemoryPlus(16, num_keys=5, top_k=4, value_pool="m")
        with pytest.raises(moezoo.InputError, match="pool 'm' differ in sparse"):
            moezoo.MemoryPlus(16, num_keys=4, top_k=4, value_pool="m", sparse=True)
    with pytest.raises(moezoo.InputError, match="value_pool: True is not a name"):
        moezoo.MemoryPlus(16, value_pool=True)


def test_without_a_pool_or_a_model_each_layer_has_its_own():
    with moezoo.shared_values():
        layers = [moezoo.MemoryPlus(16, num_keys=4, top_k=4) for _ in range(2)]
    layers += [moezoo.MemoryPlus(16, num_keys=4, top_k=4, value_pool="m") for _ in range(2)]
    assert len({layer.memory.table.weight.data_ptr() for layer in layers}) == 4
