"""The adapters of peers that need a GPU, against stand-ins with their layouts.

Each stand-in computes in plain torch what its original computes, as read in its source: ScatterMoE
0.3 (`mlp.py`), MegaBlocks 0.10 (`layers/glu.py`, `layers/mlp.py`), torchtitan 0.3
(`models/common/moe.py`), Liger-Kernel (`transformers/fused_linear_cross_entropy.py`), Apple's
ml-cross-entropy (`cut_cross_entropy/linear_cross_entropy.py`). They cannot show that the originals
run, only that weights and gradients are carried over rightly.
"""

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moezoo.bench.cases import CASES
from moezoo.bench.runner import Options, run_case


def combine(x, indices, weights, expert):
    """Sum each token's experts, one by one."""
    rows = []
    for t in range(len(x)):
        chosen = zip(indices[t].tolist(), weights[t], strict=True)
        rows.append(sum(weight * expert(x[t], e) for e, weight in chosen))
    return torch.stack(rows)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))


class ScatterMLP(nn.Module):
    gated = False

    def __init__(self, input_size, hidden_size, num_experts, top_k, activation):
        super().__init__()
        self.experts, self.output_experts, self.activation = Stack(), Stack(), activation

    def forward(self, x, expert_p, expert_idxs):
        def expert(token, e):
            h = self.experts.weight[e] @ token
            if self.gated:
                h, gates = h.chunk(2)
                h = self.activation(gates) * h
            else:
                h = self.activation(h)
            return self.output_experts.weight[e] @ h

        return combine(x, expert_idxs, expert_p, expert)


class ScatterGLUMLP(ScatterMLP):
    gated = True


class Dropless(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.mlp = args, nn.Module()

    def forward(self, x, scores, expert_weights, top_experts):
        args, mlp = self.args, self.mlp
        assert x.ndim == 3
        assert (args.bias, args.mlp_impl, args.moe_loss_weight) == (False, "grouped", 0.0)

        def expert(token, e):
            rows = slice(e * args.ffn_hidden_size, (e + 1) * args.ffn_hidden_size)
            h = args.activation_fn(mlp.w1[rows] @ token)
            if args.mlp_type == "glu":
                h = h * (mlp.v1[rows] @ token)
            return h @ mlp.w2[rows]

        flat = x.flatten(0, 1)
        return combine(flat, top_experts, expert_weights, expert).unflatten(0, x.shape[:2])


class Titan(nn.Module):
    def __init__(self, inner, dispatcher):
        super().__init__()
        self.inner_experts = nn.Module()
        self.sizes = (inner.num_experts, dispatcher.num_experts)

    def forward(self, x, scores, ids, counts):
        inner = self.inner_experts
        assert counts.sum() == ids.numel()
        assert self.sizes == (len(counts), len(counts))

        def expert(token, e):
            h = F.silu(inner.w1_EFD[e] @ token) * (inner.w3_EFD[e] @ token)
            return inner.w2_EDF[e] @ h

        return combine(x[0], ids[0], scores[0], expert).unsqueeze(0)


def titan_config(*, inner_experts, token_dispatcher):
    return types.SimpleNamespace(build=lambda: Titan(inner_experts, token_dispatcher))


class FusedLoss(nn.Module):
    def forward(self, lin_weight, _input, target):
        return F.cross_entropy(_input @ lin_weight.T, target)


def cut_loss(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


@pytest.fixture
def stand_ins(install_module):
    space = types.SimpleNamespace
    install_module("scattermoe.mlp", MLP=ScatterMLP, GLUMLP=ScatterGLUMLP)
    install_module("megablocks.layers.arguments", Arguments=space)
    install_module("megablocks.layers.dmoe", ParallelDroplessMLP=Dropless)
    install_module("liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=FusedLoss)
    install_module("cut_cross_entropy", linear_cross_entropy=cut_loss)
    install_module(
        "torchtitan.models.common.moe",
        GroupedExperts=space(Config=space),
        RoutedExperts=space(Config=titan_config),
    )
    install_module(
        "torchtitan.models.common.token_dispatcher",
        LocalTokenDispatcher=space(Config=space),
    )


@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("qwen3-30b", {"scattermoe", "megablocks", "torchtitan", "transformers"}),
        ("scatter-k2", {"scattermoe", "megablocks"}),
        ("head-128256", {"liger", "cut-cross-entropy"}),
    ],
)
def test_weights_and_gradients_are_carried_over(stand_ins, name, peers):
    case = next(case for case in CASES if case.name == name)
    assert peers < set(case.peers)
    case = dataclasses.replace(case, device="cpu", dtype=torch.float32)
    options = Options(quick=True, runs=1, budget=0.1, peers=frozenset(peers))
    results = run_case(case, options)
    assert {result.peer for result in results} == peers
    assert {(result.outcome, result.note) for result in results} == {("measured", "")}
