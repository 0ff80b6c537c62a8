"""σ-MoE against its paper: no competition, its init, its regulariser, its dropout."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moezoo import InputError, RouterOptions, SigmaMoE, SparseMoE
from moezoo.routing import losses

D = 16


def make(**arguments) -> SigmaMoE:
    torch.manual_seed(0)
    return SigmaMoE(D, **{"num_experts": 8, "top_k": 3, "d_expert": 8, **arguments}).double()


def tokens(count: int = 64) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_equals_the_formula_token_by_token():
    layer = make().eval()
    up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    for x, y in zip(tokens(20), layer(tokens(20)).hidden, strict=True):
        s = 1 / (1 + torch.exp(-(layer.gate.weight @ x)))
        chosen = sorted(range(8), key=lambda e: -s[e])[:3]
        expected = sum(s[e] * down[e] @ (up[e] @ x).clamp(min=0) for e in chosen)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("competing", [False, True])
def test_an_expert_that_is_not_chosen_does_not_change_the_answer(competing):
    """Raise the least logit, still below the chosen ones: only softmax gates notice."""
    router = RouterOptions(normalize=False)
    layer = SparseMoE(D, num_experts=8, top_k=3, router=router).double() if competing else make()
    layer.eval()
    x = tokens(1)
    logits = layer.gate.weight @ x[0]
    order = logits.argsort()
    before = layer(x)
    with torch.no_grad():
        raised = (logits[order[4]] - logits[order[0]]) * 0.9
        layer.gate.weight[order[0]] += raised * x[0] / x[0].square().sum()
    after = layer(x)
    assert (layer.gate.weight @ x[0])[order[0]] > logits[order[0]] + 0.1
    assert torch.equal(after.stats["expert_counts"], before.stats["expert_counts"])
    assert torch.equal(after.hidden, before.hidden) is not competing


@pytest.mark.parametrize("num_layers", [1, 12])
def test_initialisation_is_the_papers(num_layers):
    torch.manual_seed(0)
    layer = SigmaMoE(128, num_experts=16, d_expert=64)
    layer.reset_parameters(num_layers)
    d_ff = 16 * 64
    for weight, fan_in in ((layer.experts.gate_up_proj, 128), (layer.experts.down_proj, d_ff)):
        variance = 2 / (fan_in * num_layers)
        torch.testing.assert_close(weight.var().item(), variance, rtol=0.02, atol=0)
        assert abs(weight.mean()) < 4 * (variance / weight.numel()) ** 0.5
    lengths = layer.gate.weight.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((16,), (2 / num_layers) ** 0.5))
    torch.testing.assert_close(
        layer.gate.weight.std().item(), layer.experts.gate_up_proj.std().item(), rtol=0.01, atol=0
    )


def test_sizes_by_default_are_the_papers():
    layer = SigmaMoE(512)
    assert (layer.num_experts, layer.top_k, layer.d_expert) == (16, 4, 128)


def test_entropy_loss_equals_the_formula():
    layer = make(entropy=0.3)
    mask = torch.arange(64) % 3 > 0
    logits = tokens() @ layer.gate.weight.t()
    for chosen, given in ((slice(None), None), (mask, mask)):
        p = logits[chosen].softmax(-1).mean(0)
        expected = 0.3 * (p * p.log()).sum()
        actual = layer(tokens(), mask=given).losses["entropy"]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert layer(tokens(), mask=torch.zeros(64, dtype=torch.bool)).losses["entropy"] == 0
    assert make(entropy=0.0)(tokens()).losses == {}


def test_entropy_loss_is_least_when_even_and_finite_when_collapsed():
    even = torch.zeros(5, 8)
    assert losses.negative_entropy(even, None, False).item() == pytest.approx(-math.log(8))
    collapsed = torch.zeros(5, 8)
    collapsed[:, 2] = 300.0  # every other probability underflows in fp32
    collapsed.requires_grad_()
    loss = losses.negative_entropy(collapsed, None, False)
    loss.backward()
    assert abs(loss) < 1e-6
    assert collapsed.grad.isfinite().all()
    tilted = torch.zeros(5, 8)
    tilted[:, 2] = 2.0
    tilted.requires_grad_()
    losses.negative_entropy(tilted, None, False).backward()
    assert (tilted.grad[:, 2] > 0).all()  # descent lowers the favourite
    assert (tilted.grad[:, :2] < 0).all()


def test_dropout_zeroes_scores_per_token_and_expert_without_rescaling():
    layer = make(num_experts=8, top_k=8, expert_dropout=0.25)
    hidden = tokens(4000)
    clean = layer.eval().gate(hidden)
    dropped = layer.train().gate(hidden)
    kept = torch.zeros(4000, 8, dtype=torch.float64)
    kept.scatter_(1, dropped.indices, dropped.weights)
    full = torch.zeros_like(kept).scatter_(1, clean.indices, clean.weights)
    survives = kept > 0
    assert torch.equal(kept[survives], full[survives])
    assert (dropped.indices >= 0).all()  # the dropped may still be chosen, at weight 0
    rate = 1 - survives.double().mean(dim=0)
    assert ((rate - 0.25).abs() < 5 * (0.25 * 0.75 / 4000) ** 0.5).all()
    assert survives.sum(dim=-1).unique().numel() > 3  # not one mask for the whole batch


def test_dropout_lets_others_take_the_place_and_is_off_in_evaluation():
    layer = make(top_k=1, expert_dropout=0.5)
    hidden = tokens()
    assert torch.equal(layer.eval()(hidden).hidden, layer.eval()(hidden).hidden)
    best = layer.gate(hidden).indices
    layer.train()
    assert (layer.gate(hidden).indices != best).double().mean() > 0.3
    assert not make(expert_dropout=1.0)(hidden).hidden.any()


def test_dropped_experts_get_no_gradient():
    layer = make(expert_dropout=1.0, entropy=0.0)
    layer(tokens()).hidden.sum().backward()
    assert not layer.gate.weight.grad.any()
    assert not layer.experts.gate_up_proj.grad.any()


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"top_k: 9 is more than num_experts=8"):
        make(top_k=9)
    with pytest.raises(InputError, match=r"expert_dropout: 2 is out of range"):
        make(expert_dropout=2)
    with pytest.raises(InputError, match=r"router.expert_dropout: is defined for sigmoid"):
        SparseMoE(D, router=RouterOptions(expert_dropout=0.1))


def run_rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    layer = make(entropy=1.0)
    mask = torch.arange(32) < (9, 25)[rank]  # ranks need not hold the same number
    loss = layer(tokens()[32 * rank : 32 * rank + 32], mask=mask).losses["entropy"]
    loss.backward()
    gradient = layer.gate.weight.grad.clone()
    dist.all_reduce(gradient)
    torch.save({"loss": loss.detach(), "gradient": gradient / 2}, f"{path}.{rank}")
    dist.barrier()  # whoever leaves first may abort the other
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_entropy_of_the_whole_batch(server, tmp_path: Path):
    path = str(tmp_path / "rendezvous")
    server.call_ranks(2, run_rank, path, folder=tmp_path)
    layer = make(entropy=1.0)
    mask = torch.cat([torch.arange(32) < 9, torch.arange(32) < 25])
    loss = layer(tokens(), mask=mask).losses["entropy"]
    loss.backward()
    for rank in range(2):
        found = torch.load(f"{path}.{rank}", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            found["gradient"], layer.gate.weight.grad, rtol=1e-10, atol=1e-15
        )
