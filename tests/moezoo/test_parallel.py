"""Layers whose experts two processes share, against the same layers in one process."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import parallel_layers as layers  # also a program of its own

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory) -> Path:
    """Return where two processes left what they computed."""
    folder = tmp_path_factory.mktemp("parallel")
    for ended in server.run_ranks(2, folder, folder=folder, program=layers.__file__):
        assert ended.code == 0, ended.output[-5000:]
    return folder


@pytest.mark.parametrize("sizes", layers.SIZES)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_two_ranks_compute_what_one_does(folder, name, sizes):
    if name in ("expert choice", "rounding", "n-grams") and sizes != "none on one":
        pytest.skip("experts choose, or round, and texts begin, among the tokens of one rank")
    ranks = [torch.load(folder / f"{name}, {sizes}, {r}.pt", weights_only=True) for r in (0, 1)]
    layer = layers.build(name)
    alone = layers.compute(layer, sizes, slice(None))
    close = {"rtol": 1e-10, "atol": 1e-10}
    for what, expected in alone.items():
        torch.testing.assert_close(torch.cat([r[what] for r in ranks]), expected, **close)
    torch.testing.assert_close(torch.cat([r["reference"] for r in ranks]), alone["output"], **close)
    for key, parameter in layer.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = expected.to_dense() if expected.is_sparse else expected
        for rank in ranks:
            torch.testing.assert_close(rank[key], expected, **close)


def test_one_expert_leaves_a_rank_without_tokens():
    hidden, ids, _ = layers.inputs("one expert")
    routing = layers.build("hash").route(hidden, ids)
    assert len(set((routing.indices // 2).flatten().tolist())) == 1


def test_what_ranks_can_not_share_is_refused(folder):
    for rank in (0, 1):
        lines = (folder / f"refused {rank}.txt").read_text().splitlines()
        assert lines == [
            "num_experts: 3 is not a multiple of the 2 ranks that share it; change it, or the "
            "strategy's expert_parallel",
            "sparse: tables that ranks share have no sparse gradients; set false",
            "offload: what ranks share lies on their devices; set it to false",
        ]
