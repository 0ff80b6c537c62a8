"""UltraFastFFF: which neurons answer, what is read, and where gradients go."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moezoo import InputError, UltraFastFFF

D = 16


def ultra(**arguments) -> UltraFastFFF:
    torch.manual_seed(0)
    return UltraFastFFF(D, **{"num_trees": 3, "depth": 4, **arguments}).double()


def tokens(count: int = 20) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def paths(layer: UltraFastFFF, x: torch.Tensor) -> list[list[int]]:
    """The neurons of each tree that a token visits, found one decision at a time."""
    found = []
    for weight, bias in zip(layer.in_weight, layer.in_bias, strict=True):
        node, visited = 0, []
        while node < layer.num_nodes:
            visited.append(node)
            node = 2 * node + (2 if weight[node] @ x + bias[node] > 0 else 1)
        found.append(visited)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_output_is_the_sum_of_the_neurons_on_the_path(training, depth):
    layer = ultra(depth=depth).train(training)
    gelu = torch.nn.functional.gelu
    for x, y in zip(tokens(), layer(tokens()).hidden, strict=True):
        expected = torch.zeros(D, dtype=torch.float64)
        for p, visited in enumerate(paths(layer, x)):
            assert len(visited) == depth + 1
            for n in visited:
                a = layer.in_weight[p, n] @ x + layer.in_bias[p, n]
                expected += gelu(a) * layer.out_weight[p, n]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_without_gradients_is_the_same_function(dtype, same):
    layer = ultra().to(dtype).eval()
    x = tokens().to(dtype)
    with torch.no_grad():
        given = {} if same else {"router_input": x.flip(0)}
        fast = layer(x, **given)
        slow = layer.double().reference(x.double(), **{k: v.double() for k, v in given.items()})
    assert fast.hidden.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3  # one rounding to bf16
    assert (fast.hidden - slow.hidden).norm() <= tolerance * slow.hidden.norm()
    assert torch.equal(fast.stats["expert_counts"], slow.stats["expert_counts"])


@pytest.mark.parametrize("training", [True, False])
def test_neurons_off_the_path_get_exactly_no_gradient(training):
    layer = ultra().train(training)
    x = tokens(1)[0]
    layer(x).hidden.sum().backward()
    for p, visited in enumerate(paths(layer, x)):
        off = [n for n in range(layer.num_nodes) if n not in visited]
        for parameter in layer.parameters():
            gradient = parameter.grad[p]
            assert not gradient[off].any()
            assert all(gradient[n].any() for n in visited)


def test_a_zero_logit_goes_left():
    layer = ultra(depth=1, num_trees=1).eval()
    with torch.no_grad():
        layer.in_weight[0, 0] = 0.0
        layer.in_bias[0, 0] = 0.0
    for call in (layer, layer.reference, layer.train()):
        assert call(tokens()).stats["expert_counts"].tolist() == [20, 0]


class RowsRead(TorchDispatchMode):
    """Count the rows that embeddings read of one parameter; refuse any other op on its values."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self.storage, self.rows = parameter.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        ours = [
            a
            for a in args
            if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == self.storage
        ]
        if ours and func is torch.ops.aten.embedding.default:
            self.rows += args[1].numel()
        elif ours:
            assert output.untyped_storage().data_ptr() == self.storage, func
        return output


@pytest.mark.parametrize("depth", [0, 3, 8])
def test_inference_reads_depth_plus_one_rows_of_each_tree(depth):
    layer = ultra(depth=depth).eval()
    for parameter in layer.parameters():
        with torch.no_grad(), RowsRead(parameter) as reader:
            layer(tokens(7))
        assert reader.rows == 7 * 3 * (depth + 1)


def test_inference_touches_the_path_only():
    layer, x = ultra().eval(), tokens(1)[0]
    expected = layer(x).hidden
    with torch.no_grad():
        for p, visited in enumerate(paths(layer, x)):
            off = [n for n in range(layer.num_nodes) if n not in visited]
            for parameter in layer.parameters():
                parameter[p, off] = torch.nan
    assert torch.equal(layer(x).hidden, expected)


def test_counts_are_of_the_bottom_neurons():
    layer = ultra(depth=2)
    mask = torch.arange(20) < 15
    stats = layer(tokens(), mask=mask).stats
    expected = torch.zeros(3, 4, dtype=torch.int64)
    for x in tokens()[:15]:
        for p, visited in enumerate(paths(layer, x)):
            expected[p, visited[-1] - 3] += 1
    assert torch.equal(stats["expert_counts"], expected.flatten())
    assert stats["tokens"] == 15
    assert "expert_counts" not in ultra(depth=11)(tokens(2)).stats


@pytest.mark.parametrize(
    ("d_model", "num_trees", "depth"), [(768, 1, 11), (24, 1, 6), (768, 128, 4), (8, 99, 0)]
)
def test_default_depth_is_the_least_that_is_as_wide_as_the_dense_block(d_model, num_trees, depth):
    with torch.device("meta"):
        layer = UltraFastFFF(d_model, num_trees=num_trees)
    assert layer.depth == depth
    assert num_trees * layer.num_nodes >= 4 * d_model
    assert depth == 0 or num_trees * (2**depth - 1) < 4 * d_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trees": 0}, "num_trees: 0 is out of range"),
        ({"depth": -1}, "depth: -1 is out of range"),
        ({"activation": "gel"}, "activation: .*did you mean 'gelu'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        UltraFastFFF(D, **arguments)
