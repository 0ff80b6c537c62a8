"""Two processes that share the rows of sparse weights have the masks that one would have."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moezoo import DenseFFN
from moezoo.matrices import NM, Pruned, Transposable

D, F = 12, 20
METHODS = {
    "rigl": Pruned(sparsity=0.5, growth=0.5, every=2),
    "whole": Pruned(sparsity=0.5, growth=0.5, every=2, scope="matrix"),
    "n_m": NM(),
    "transposable": Transposable(every=2, sampled=False, decay=0.0),
}


def trained(wrap=lambda layer: layer, share=slice(None), gather=lambda tensor: tensor):
    found = {}
    for name, options in METHODS.items():
        torch.manual_seed(0)
        layer = DenseFFN(D, F, matrices=options).double().train()
        layer = wrap(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        x = torch.randn(6, 8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for step in range(4):
            optimizer.zero_grad()
            layer(x[step][share]).hidden.square().mean().backward()
            optimizer.step()
            layer.step((step + 1) / 8)
        found |= {f"{name}.{k}": gather(v).clone() for k, v in layer.state_dict().items()}
    return found


def run_rank(rank: int, path: str) -> None:
    from torch.distributed.fsdp import fully_shard

    from moezoo.parallel import whole

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    found = trained(
        lambda layer: fully_shard(layer, mesh=mesh), slice(4 * rank, 4 * rank + 4), whole
    )
    torch.save(found, f"{path}.{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_rows_get_the_masks_of_whole_matrices(tmp_path: Path):
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=2)
    expected = trained()
    moved = 0
    for rank in range(2):
        found = torch.load(tmp_path / f"store.{rank}", weights_only=True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)
            else:
                assert torch.equal(found[name], tensor), name
            moved += name.endswith("mask")
    assert moved == 2 * 3 * len(METHODS)
