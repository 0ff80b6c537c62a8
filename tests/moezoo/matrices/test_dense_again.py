"""Pruned matrices whose weights all learn again, and later runs that go on from there."""

import pytest
import torch

from moezoo.matrices import Pruned, build_matrix

SIZE = (24, 16)


def make(options):
    torch.manual_seed(0)
    matrix = build_matrix(options, *SIZE, False).double().train()
    matrix.reset_parameters(SIZE[0] ** -0.5)
    return matrix


def train(matrix, progresses):
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.01)
    x = torch.randn(11, SIZE[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for progress in progresses:
        optimizer.zero_grad()
        (matrix(x) ** 2).sum().backward()
        optimizer.step()
        matrix.step(progress)
        yield


@pytest.mark.parametrize("growth", [0.0, 0.3])
def test_they_are_not_pruned_again(growth):
    options = Pruned(
        sparsity=0.75, start=0.1, end=0.4, growth=growth, every=1, dense_from=0.5, scope="matrix"
    )
    matrix = make(options)
    for _ in train(matrix, (0.1, 0.2, 0.3, 0.4)):
        pass
    assert int(matrix.mask.sum()) == SIZE[0] * SIZE[1] // 4
    for _ in train(matrix, (0.5,)):
        assert matrix.mask.all()
    again = make(options)
    again.load_state_dict(matrix.state_dict())
    # The run was made longer, and stands before dense_from once more.
    for _ in train(again, (0.05, 0.3, 0.45, 0.6)):
        assert again.mask.all()
        assert not again.state_dict().get("listening", torch.tensor(False))
    assert (again.latent.grad != 0).all()
