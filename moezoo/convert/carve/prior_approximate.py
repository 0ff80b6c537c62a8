"""FactorLLM's prior-approximate loss: a router learns whose output is like the teacher's.

The teacher is the dense block. An expert is good at a token if its output is near the teacher's
share of it; the pseudo label is the softmax of the best experts' indicator, and the router's
softmax is brought near it by Kullback and Leibler's divergence (arXiv:2408.11855, section 3.3). In
the authors' training script the loss is computed and left out of what is optimised.

Shapes: T tokens, D d_model, F neurons, N routed experts, K of them active.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.oracle import top_mask
from moezoo.convert.carve.splits import Partition

_STEPS = 200
_BATCH = 2048
_RATE = 0.02


def expert_errors(
    block: Block, hidden_TF: Tensor, partition: Partition, options: CarveOptions
) -> Tensor:
    """Measure how far each expert's output is from the teacher's share, ``(T, N)`` mean squares.

    The share is ``teacher K / N``, as in the authors' code, unless the options say otherwise; with
    a shared part the teacher is what that part does not output.
    """
    share = options.teacher_share
    share = options.active / options.routed if share is None else share

    def answer(neurons: Tensor) -> Tensor:
        return hidden_TF[:, neurons] @ block.down[:, neurons].t()

    target_TD = torch.zeros_like(hidden_TF[:, :1]).expand(-1, block.d_model)
    for neurons in partition.experts:
        target_TD = target_TD + share * answer(neurons)
    errors = [(answer(e) - target_TD).square().mean(dim=1) for e in partition.experts]
    return torch.stack(errors, dim=1)


def pseudo_labels(errors_TN: Tensor, active: int) -> Tensor:
    """Turn errors into a target distribution: the softmax of the K best experts' indicator."""
    return top_mask(-errors_TN, active).to(errors_TN.dtype).softmax(dim=1)


def prior_approximate_loss(logits_TN: Tensor, labels_TN: Tensor) -> Tensor:
    """Average ``KL(softmax(logits) || labels)`` over tokens: a scalar, 0 where they agree."""
    log_p = logits_TN.log_softmax(dim=1)
    return (log_p.exp() * (log_p - labels_TN.log())).sum(dim=1).mean()


@torch.enable_grad()
def fit_prior_approximate(
    x_TD: Tensor, errors_TN: Tensor, active: int, seed: int, steps: int = _STEPS
) -> tuple[Tensor, Tensor]:
    """Train a linear router with the prior-approximate loss, by Adam, from zero.

    Args:
        x_TD: its inputs; standardised for the training.
        errors_TN: of every expert, from :func:`expert_errors`.
        active: K.
        seed: of the batches.
        steps: of the optimizer.

    Returns:
        Weight ``(N, D)`` and bias ``(N,)``.
    """
    mean_D, std_D = x_TD.mean(dim=0), x_TD.std(dim=0, correction=0).clamp(min=1e-12)
    labels_TN = pseudo_labels(errors_TN, active)
    router = torch.nn.Linear(x_TD.shape[1], errors_TN.shape[1]).to(x_TD)
    torch.nn.init.zeros_(router.weight)
    torch.nn.init.zeros_(router.bias)
    optimizer = torch.optim.Adam(router.parameters(), lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        batch = torch.randint(len(x_TD), (min(_BATCH, len(x_TD)),), generator=generator)
        logits = router((x_TD[batch] - mean_D) / std_D)
        loss = prior_approximate_loss(logits, labels_TN[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight_ND = router.weight.detach() / std_D
    return weight_ND, router.bias.detach() - F.linear(mean_D, weight_ND)
