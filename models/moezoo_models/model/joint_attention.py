"""One softmax over the context and persistent slots, which are attended apart and merged.

``eager`` and ``sdpa`` both do it; the latter by torch's fused operator on a CPU, elsewhere by the
same formulas as the former. Fused, no matrix of scores with the context exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.errors import InputError
from moezoo.experts.slots import PersistentSlots, join
from moezoo.routing.tree import at_least_fp32
from moezoo_models.adapters.torch import flash_attention_cpu, flash_attention_cpu_backward
from moezoo_models.model.attention_backends import repeat_heads

JOINT_BACKENDS = ("sdpa", "eager")


def check_joint_backend(name: str | None, softcap: float | None = None) -> None:
    """Refuse an attention backend that cannot share its softmax, and soft caps on its scores.

    Raises:
        InputError: names the backends that can.
    """
    if name not in JOINT_BACKENDS:
        raise InputError(
            f"attention: '{name}' cannot share its softmax with persistent slots; "
            f"{' and '.join(JOINT_BACKENDS)} can"
        )
    if softcap is not None:
        raise InputError(
            "attn_logit_softcapping: attention that shares its softmax with persistent slots has "
            "no soft cap; choose another layer, or null"
        )


def joint_attention(
    slots: PersistentSlots,
    plain_query: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    backend: str | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attend to context and slots with one softmax.

    Args:
        slots: the slots of its heads.
        plain_query: ``(batch, heads, queries, head_dim)``, without positions, for the slots.
        query: the same with positions, for the context.
        key: ``(batch, kv_heads, keys, head_dim)``.
        value: as ``key``.
        attention_mask: as the backend's mask function made it.
        backend: name of the attention backend.
        scaling: factor on the context's scores.
        dropout: probability of dropping a weight, of context and slots alike.

    Returns:
        ``(batch, queries, heads, head_dim)``; the weights of the context, ``(batch, heads, queries,
        keys)``, from the eager backend only; and their sums, ``(batch, heads, queries)``.

    Raises:
        InputError: the backend cannot share its softmax.
    """
    check_joint_backend(backend)
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    answer, answer_lse = slots(plain_query, dropout)
    causal = backend == "sdpa" and attention_mask is None and queries > 1
    if causal:
        # sdpa's mask function leaves plain causality to the operator; keys beyond the queries are
        # those that an empty static cache has not been given yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if backend == "sdpa" and query.device.type == "cpu" and not dropout:
        if torch.is_autocast_enabled("cpu"):  # bf16 is slower there
            query, key, value, answer = (t.float() for t in (query, key, value, answer))
        mask = None if attention_mask is None else _additive(attention_mask, value)
        joined, context_share, _ = _fused(
            query, key, value, mask, answer, answer_lse, causal, scaling
        )
        return joined.transpose(1, 2), None, context_share.squeeze(-1)

    joined, context_share, _, weights = attend_by_formulas(
        query, key, value, attention_mask, answer, answer_lse, causal, scaling, dropout
    )
    shown = (weights * context_share).to(value.dtype) if backend == "eager" else None
    return joined.transpose(1, 2), shown, context_share.squeeze(-1)


def attend_by_formulas(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    answer: Tensor,
    answer_lse: Tensor,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to the context and merge with an answer, one operator after the other.

    Returns:
        The merged answer, the context's share, the joint log-sum-exp, and the weights of the
        context among themselves, in fp32 at least.
    """
    scores = at_least_fp32(query @ key.mT) * scaling
    if causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + _additive(mask, scores)
    weights = F.dropout(scores.softmax(-1), dropout)
    lse = scores.logsumexp(-1, keepdim=True)
    context = weights.to(value.dtype) @ value
    joined, context_share = join(context, lse, answer, answer_lse)
    return joined, context_share, torch.logaddexp(lse, answer_lse), weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Hide keys by the least finite number: a row of padding must not become NaN."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    hidden = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return hidden.masked_fill(~mask, torch.finfo(like.dtype).min)


@torch.library.custom_op("moezoo::joint_attention_cpu", mutates_args=(), device_types="cpu")
def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    answer: Tensor,
    answer_lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend by torch's fused operator for CPUs and merge; give the joint log-sum-exp as well."""
    context, lse = flash_attention_cpu(query, key, value, mask=mask, causal=causal, scale=scaling)
    lse = lse.unsqueeze(-1)
    joined, context_share = join(context, lse, answer, answer_lse)
    joint_lse = torch.logaddexp(lse, answer_lse)
    return joined.contiguous(), context_share.contiguous(), joint_lse.contiguous()


@_fused.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    answer: Tensor,
    answer_lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = query.shape[:-1]
    context_share, lse = (answer_lse.new_empty(*shape, 1) for _ in range(2))
    return query.new_empty(*shape, value.shape[-1]), context_share, lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, mask, answer, answer_lse, causal, scaling = inputs
    joined, context_share, joint_lse = output
    ctx.options = {"causal": causal, "scale": scaling}
    ctx.save_for_backward(query, key, value, mask, answer, answer_lse, joined, joint_lse)
    ctx.mark_non_differentiable(context_share, joint_lse)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the joint softmax by the operator's own backward pass.

    It recomputes a weight as ``exp(score - lse)`` and subtracts the row's ``grad · output``. Given
    the joint log-sum-exp and the merged output, both are the joint softmax's, as in ring attention
    block by block (Liu et al. 2023, arXiv:2310.01889).
    """
    query, key, value, mask, answer, answer_lse, joined, joint_lse = ctx.saved_tensors
    d_query, d_key, d_value = flash_attention_cpu_backward(
        grad, query, key, value, joined, joint_lse.squeeze(-1), mask=mask, **ctx.options
    )
    share = (answer_lse - joint_lse).exp()
    d_answer_lse = share * (grad * (answer - joined)).sum(-1, keepdim=True)
    return d_query, d_key, d_value, None, (share * grad).to(answer.dtype), d_answer_lse, None, None


_fused.register_autograd(_differentiate, setup_context=_save)
