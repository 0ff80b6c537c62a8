"""PEER against PEER-pytorch: same retrieval, same numbers, weights copied across.

Its defaults are not the paper's: ``non_competing_scores`` silently keeps the best expert of each
head and weights it by ReLU, which here is ``top_k=1, score_fn="relu"``.
"""

import pytest
import torch

from moezoo import PEER

PEER_pytorch = pytest.importorskip("PEER_pytorch", reason="pip install PEER-pytorch")

D, HEADS, HALF = 32, 3, 10


def pair(competing: bool) -> tuple[PEER, torch.nn.Module]:
    torch.manual_seed(0)
    theirs = PEER_pytorch.PEER(
        D,
        heads=HEADS,
        num_experts=11**2,
        num_experts_per_head=5,
        dim_key=HALF,
        non_competing_scores=not competing,
    )
    ours = PEER(
        D,
        num_experts=11**2,
        num_heads=HEADS,
        top_k=5 if competing else 1,
        d_key=2 * HALF,
        score_fn="softmax" if competing else "relu",
        query_norm="none",
        share_keys=False,
    )
    with torch.no_grad():
        theirs.keys.normal_()  # theirs start so small that scores hardly differ
        query = theirs.to_queries[0].weight.view(2, HEADS, HALF, D)
        ours.query.proj.weight.copy_(query.transpose(0, 1).reshape(-1, D))
        ours.keys.keys.copy_(theirs.keys.transpose(1, 2))
        ours.experts.u.copy_(theirs.weight_down_embed.weight)
        ours.experts.v.copy_(theirs.weight_up_embed.weight)
    return ours.double(), theirs.double()


@pytest.mark.parametrize("competing", [True, False])
def test_output_and_gradients_agree(competing):
    ours, theirs = pair(competing)
    hidden, direction = torch.randn(2, 3, 43, D, dtype=torch.float64)
    found = []
    for call in (lambda x: ours(x).hidden, theirs):
        x = hidden.clone().requires_grad_()
        output = call(x)
        (output * direction).sum().backward()
        found.append((output.detach(), x.grad))
    (output, grad), (their_output, their_grad) = found
    query = theirs.to_queries[0].weight.grad.view(2, HEADS, HALF, D).transpose(0, 1)
    pairs = {
        "output": (output, their_output),
        "hidden": (grad, their_grad),
        "query": (ours.query.proj.weight.grad, query.reshape(-1, D)),
        "keys": (ours.keys.keys.grad, theirs.keys.grad.transpose(1, 2)),
        "u": (ours.experts.u.grad, theirs.weight_down_embed.weight.grad),
        "v": (ours.experts.v.grad, theirs.weight_up_embed.weight.grad),
    }
    for name, (mine, other) in pairs.items():
        assert other.abs().max() > 0, name
        assert (mine - other).abs().max() <= 1e-12 * other.abs().max(), name
