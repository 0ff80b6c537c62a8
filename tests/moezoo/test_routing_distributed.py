"""Two processes against one: losses and biases are those of the global batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moezoo import BalanceOptions, RouterOptions, SparseMoE
from moezoo.feed_forward import FeedForwardOutput

D = 12
REAL = (17, 31)  # real tokens per rank, of 40: ranks need not hold the same number


ROUTERS = {
    "softmax": RouterOptions(),
    "sigmoid": RouterOptions(score="sigmoid", selection_bias=True),
    "quantile": RouterOptions(score="sigmoid", selection_bias=True, bias_rule="quantile"),
    "threshold": RouterOptions(choice="threshold", normalize=False),
    "relu": RouterOptions(score="relu", normalize=False),
    "relu of model": RouterOptions(score="relu", normalize=False),
}


def layer(kind: str) -> SparseMoE:
    torch.manual_seed(0)
    router = ROUTERS[kind]
    by_tokens = {"load_balancing": 0.0 if router.is_ragged else 1.0}
    scope = "model" if kind == "relu of model" else "layer"
    of_relu = {"sparsity": 1.0, "sparsity_scope": scope}
    balance = BalanceOptions(**(of_relu if router.score == "relu" else by_tokens))
    return SparseMoE(D, num_experts=4, router=router, balance=balance).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(80, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    position = torch.arange(40)
    return hidden, torch.cat([position < REAL[0], position < REAL[1]])


def loss_of(output: FeedForwardOutput, processes: int) -> torch.Tensor:
    """Return a loss whose mean over processes is that of all tokens."""
    outputs = processes * output.hidden.square().sum()
    return next(iter(output.losses.values()), outputs)


def run_rank(rank: int, path: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    module = layer(kind)
    hidden, mask = (x[40 * rank : 40 * rank + 40] for x in batch())
    output = module(hidden, mask=mask)
    loss = loss_of(output, 2)
    loss.backward()
    gradient = module.gate.weight.grad.clone()
    for tensor in (gradient, loss.detach()):
        dist.all_reduce(tensor)
    module.observe(output.stats)
    module.step()
    state = {"gradient": gradient / 2, "loss": loss.detach() / 2}
    state |= module.gate.named_buffers()
    if rank == 0:
        torch.save(state, path + ".result")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTERS)
def test_two_ranks_equal_one(server, kind: str, tmp_path: Path):
    path = str(tmp_path / "rendezvous")
    server.call_ranks(2, run_rank, path, kind, folder=tmp_path)
    two = torch.load(path + ".result", weights_only=True)

    module = layer(kind)
    hidden, mask = batch()
    output = module(hidden, mask=mask)
    loss = loss_of(output, 1)
    loss.backward()
    module.observe(output.stats)
    module.step()
    torch.testing.assert_close(two["loss"], loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(two["gradient"], module.gate.weight.grad, rtol=1e-10, atol=1e-15)
    before = dict(layer(kind).gate.named_buffers())
    for name, buffer in module.gate.named_buffers():
        assert torch.equal(two[name], buffer)
        assert not torch.equal(buffer, before[name])
    assert bool(before) == (kind != "softmax")
