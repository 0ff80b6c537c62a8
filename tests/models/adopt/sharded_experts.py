"""A process of two that share the experts of an adopted model, and compare it with the whole."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moezoo

sys.path.insert(0, str(Path(__file__).parent))

from test_adopt import batch, close, model_of


def main() -> None:
    """Compare logits, gradients, names and tensors."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole = model_of("DeepseekV3")
    shared = copy.deepcopy(whole)
    adopted = moezoo.adopt(shared)
    adopted.shard_experts(mesh)
    rows = batch()
    mine = {name: v[rank : rank + 1] if name != "use_cache" else v for name, v in rows.items()}
    theirs, ours = whole(**rows).logits, shared(**mine).logits
    close(ours, theirs[rank : rank + 1])

    # Each process has the mean over its own tokens; their mean is that over all.
    (theirs**2).mean().backward()
    (ours**2).mean().backward()
    assert list(shared.state_dict()) == list(whole.state_dict())
    expected = dict(whole.named_parameters())
    split = 0
    for name, parameter in shared.named_parameters():
        gradient = parameter.grad
        if hasattr(parameter, "full_tensor"):
            split += 1
            assert parameter.shape == expected[name].shape
            assert torch.equal(parameter.full_tensor(), expected[name])
            close(gradient.full_tensor(), expected[name].grad, 1e-5)
        else:
            dist.all_reduce(gradient)
            close(gradient / 2, expected[name].grad, 1e-5)
    assert split == 2 * len(adopted.layers)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
