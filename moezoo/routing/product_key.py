"""Product keys: the exact best of n² keys for the price of 2 n (Lample et al. 2019).

A key of slot ``i n + j`` is the concatenation of half-keys ``K1_i`` and ``K2_j``, so its score is
``q1·K1_i + q2·K2_j`` for the halves ``q1, q2`` of a query (arXiv:1907.05242, section 3.2). The k
best sums lie among the k best of each half: were ``i`` not among the first half's best, k other
rows would score at least as high beside the same ``j``. Rounding keeps that order, so this holds
in floating point too, where of equal sums the one with the better first half comes first.

Shapes: T tokens, D d_model, H heads, C d_key, n half-keys per codebook, K choices per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int
from moezoo.routing.losses import world_size
from moezoo.training_state import TrainingState
from moezoo_kernels import product_key_top_k

KeyInit = Literal["lample", "berges"]
QueryNorm = Literal["batch", "layer", "qk", "none"]

KEY_INITS = ("lample", "berges")
QUERY_NORMS = ("batch", "layer", "qk", "none")

_EPS = 1e-5
_MOMENTUM = 0.1
_COUNT, _MEAN, _VAR = "query_count", "query_mean", "query_var"


class ProductKeys(nn.Module):
    """Two codebooks of half-keys, per head or shared, and the exact top-k of their n² sums.

    The arithmetic is fp32 whatever autocast says (fp64 for fp64 inputs).

    Args:
        d_key: width C of a query and of a whole key, even.
        num_keys: half-keys n per codebook; there are n² slots.
        num_heads: heads H, each with a query of its own.
        top_k: slots per head, at most n.
        share_keys: one pair of codebooks for all heads (PEER) instead of one per head.
        init: half-keys from ``U(±1/sqrt(d_key/2))`` (lample) or ``U(±1/sqrt(d_key))`` (berges).
        normalize: bring every half-key to length ``sqrt(1/2)`` before it is compared, the keys'
            half of qk-norm; a normalised query then scores about N(0, 1).
    """

    def __init__(
        self,
        d_key: int,
        num_keys: int,
        *,
        num_heads: int,
        top_k: int,
        share_keys: bool = False,
        init: KeyInit = "lample",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.d_key = check_int("d_key", d_key, minimum=2)
        if d_key % 2:
            raise InputError(f"d_key: {d_key} is odd; a key has two halves of equal width")
        self.num_keys = check_int("num_keys", num_keys)
        self.num_heads = check_int("num_heads", num_heads)
        self.top_k = check_int("top_k", top_k)
        if top_k > num_keys:
            raise InputError(
                f"top_k: {top_k} is more than num_keys={num_keys}, of which each half takes its "
                "best; lower top_k or raise num_keys"
            )
        self.share_keys = share_keys
        self.init = check_choice("init", init, KEY_INITS)
        self.normalize = normalize
        codebooks = 1 if share_keys else num_heads
        self.keys = nn.Parameter(torch.empty(codebooks, 2, num_keys, d_key // 2))
        self.reset_parameters()

    @property
    def num_slots(self) -> int:
        """Number of whole keys, n²."""
        return self.num_keys**2

    def reset_parameters(self) -> None:
        """Draw all half-keys anew."""
        bound = (self.d_key // 2 if self.init == "lample" else self.d_key) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)

    def forward(self, queries_THC: Tensor) -> tuple[Tensor, Tensor]:
        """Find the K best of the n² slots for every query.

        Returns:
            Scores ``(T, H, K)``, best first, and slots ``i n + j``, ``(T, H, K)`` int64; for what
            comes first of equal scores see :func:`moezoo_kernels.product_key_top_k`.
        """
        with torch.autocast(queries_THC.device.type, enabled=False):
            halves_2THn = self._half_scores(*self._promote(queries_THC))
            return product_key_top_k(halves_2THn, self.top_k)

    def reference(self, queries_THC: Tensor) -> tuple[Tensor, Tensor]:
        """Compare every query with every one of the n² whole keys."""
        with torch.autocast(queries_THC.device.type, enabled=False):
            queries_THC, keys_H2nC = self._promote(queries_THC)
            n = self.num_keys
            first = keys_H2nC[:, 0].unsqueeze(2).expand(-1, n, n, -1)
            second = keys_H2nC[:, 1].unsqueeze(1).expand(-1, n, n, -1)
            keys_HNC = torch.cat([first, second], dim=-1).flatten(1, 2)
            keys_HNC = keys_HNC.expand(self.num_heads, -1, -1)
            return torch.einsum("thc,hnc->thn", queries_THC, keys_HNC).topk(self.top_k, dim=-1)

    def flops_per_token(self) -> int:
        """Return a token's forward FLOPs: each head compares both halves with n half-keys."""
        return 2 * self.num_heads * self.num_keys * self.d_key

    def _promote(self, queries_THC: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(queries_THC.dtype, torch.float32)
        keys = self.keys.to(dtype)
        if self.normalize:
            keys = F.normalize(keys, dim=-1) * 0.5**0.5
        return queries_THC.to(dtype), keys

    def _half_scores(self, queries_THC: Tensor, keys_H2nC: Tensor) -> Tensor:
        """Score each half-query against its codebook: ``(2, T, H, n)``."""
        tokens, heads, _ = queries_THC.shape
        halves_TH2C = queries_THC.unflatten(-1, (2, -1))
        if self.share_keys:  # one product over the tokens of all heads
            stacked = halves_TH2C.permute(2, 0, 1, 3).flatten(1, 2)
            return torch.bmm(stacked, keys_H2nC[0].mT).unflatten(1, (tokens, heads))
        # In the order of the codebooks in memory, so that neither operand is copied.
        stacked = halves_TH2C.permute(1, 2, 0, 3).flatten(0, 1)
        halves_H2Tn = torch.bmm(stacked, keys_H2nC.flatten(0, 1).mT).unflatten(0, (heads, 2))
        return halves_H2Tn.permute(1, 2, 0, 3)


class QueryNetwork(TrainingState):
    """One query per token and head: a linear map and a normalisation.

    - ``batch``: each of the H C features over the batch (Lample et al., section 3.2). Padding is
      excluded; the statistics are those of all ranks; ``eval()`` uses running averages. A batch
      of fewer than two tokens has no variance and is normalised by the running averages too.
    - ``layer``: each query by its own mean and variance.
    - ``qk``: each query by its root mean square; goes with normalised keys.
    - ``none``: not at all.

    All but ``none`` have a learned gain per feature, batch and layer also a shift. The arithmetic
    is fp32 whatever autocast says (fp64 for fp64 inputs).

    Args:
        d_model: width D of what is read.
        num_heads: queries H per token.
        d_key: width C of a query.
        norm: batch, layer, qk or none.
        bias: whether the linear map has a bias.
        init: its weight from torch's default ``U(±1/sqrt(D))`` (lample), or Xavier's uniform
            distribution (berges).

    Attributes:
        deferred: whether running averages wait for :meth:`observe` and :meth:`step`; else a
            training forward pass moves them.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_key: int,
        *,
        norm: QueryNorm = "batch",
        bias: bool = False,
        init: KeyInit = "lample",
    ) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model)
        self.num_heads = check_int("num_heads", num_heads)
        self.d_key = check_int("d_key", d_key)
        self.norm = check_choice("norm", norm, QUERY_NORMS)
        self.init = check_choice("init", init, KEY_INITS)
        features = num_heads * d_key
        self.proj = nn.Linear(d_model, features, bias=bias)
        self.gain: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        if norm != "none":
            self.gain = nn.Parameter(torch.empty(features))
        if norm in ("batch", "layer"):
            self.shift = nn.Parameter(torch.empty(features))
        if norm == "batch":
            self.register_buffer("running_mean", torch.empty(features, dtype=torch.float32))
            self.register_buffer("running_var", torch.empty(features, dtype=torch.float32))
        self.deferred = False
        self._observed: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projection anew; unit gain, no shift, running averages of N(0, 1)."""
        if self.init == "lample":
            bound = self.d_model**-0.5
            nn.init.uniform_(self.proj.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        if self.gain is not None:
            nn.init.ones_(self.gain)
        if self.shift is not None:
            nn.init.zeros_(self.shift)
        if self.norm == "batch":
            nn.init.zeros_(self.running_mean)
            nn.init.ones_(self.running_var)
        self._observed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A running average in bf16 stops moving: let it change device, and dtype only upwards.
        names = ("running_mean", "running_var") if self.norm == "batch" else ()
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if torch.promote_types(new.dtype, torch.float32) != new.dtype:
                kept = new.float() if old.is_meta else old.float().to(new.device)
                setattr(self, name, kept)
        return self

    def forward(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None = None,
        stats: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the queries, ``(T, H, C)``; those of padding mean nothing.

        In training with ``norm="batch"`` this moves the running averages, as
        :class:`torch.nn.BatchNorm1d` does, but not in a recomputation, nor once they are deferred.

        Args:
            hidden_TD: what is read.
            mask_T: true at real tokens.
            stats: gets what :meth:`observe` needs, if running averages are deferred.
        """
        return self._compute(hidden_TD, mask_T, stats, brute_force=False)

    def reference(self, hidden_TD: Tensor, mask_T: Tensor | None = None) -> Tensor:
        """Return the same queries by torch's own norms, over the real tokens picked out."""
        return self._compute(hidden_TD, mask_T, None, brute_force=True)

    @torch.no_grad()
    def observe(self, stats: Mapping[str, Tensor]) -> None:
        """Move copies of the running averages by one micro-batch's statistics."""
        if not (self.deferred and _COUNT in stats):
            return
        if self._observed is None:
            self._observed = (self.running_mean.clone(), self.running_var.clone())
        _move(self._observed, stats)

    @torch.no_grad()
    def step(self) -> None:
        """Take the copies over."""
        if self._observed is not None:
            self.running_mean.copy_(self._observed[0])
            self.running_var.copy_(self._observed[1])
        self._observed = None

    def discard(self) -> None:
        """Forget the copies."""
        self._observed = None

    def defer_state(self) -> None:
        """Leave the running averages to :meth:`observe` and :meth:`step`."""
        self.deferred = True

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: the linear map."""
        return 2 * self.proj.weight.numel()

    def _compute(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None,
        stats: dict[str, Tensor] | None,
        brute_force: bool,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
            bias = None if self.proj.bias is None else self.proj.bias.to(dtype)
            x_TF = F.linear(hidden_TD.to(dtype), self.proj.weight.to(dtype), bias)
            x_THC = x_TF.unflatten(-1, (self.num_heads, self.d_key))
            if self.norm == "batch":
                if brute_force:
                    x_TF = self._batch_norm_reference(x_TF, mask_T)
                else:
                    x_TF = self._batch_norm(x_TF, mask_T, stats)
                x_THC = x_TF.unflatten(-1, (self.num_heads, self.d_key))
            elif self.norm == "layer":
                x_THC = F.layer_norm(x_THC, (self.d_key,), eps=_EPS)
            elif self.norm == "qk":
                x_THC = F.rms_norm(x_THC, (self.d_key,), eps=_EPS)
            if self.gain is None:
                return x_THC
            gain_HC = self.gain.to(dtype).unflatten(0, (self.num_heads, self.d_key))
            if self.shift is None:
                return x_THC * gain_HC
            shift_HC = self.shift.to(dtype).unflatten(0, (self.num_heads, self.d_key))
            return torch.addcmul(shift_HC, x_THC, gain_HC)

    def _batch_norm(
        self, x_TF: Tensor, mask_T: Tensor | None, stats: dict[str, Tensor] | None
    ) -> Tensor:
        mean_F = self.running_mean.to(x_TF.dtype)
        var_F = self.running_var.to(x_TF.dtype)
        if not self.training:
            return (x_TF - mean_F) * (var_F + _EPS).rsqrt()
        count = _count(x_TF, mask_T)
        enough, safe = count > 1, count.clamp(min=1)
        batch_mean_F = _sum_over_ranks(_zero_padding(x_TF, mask_T).sum(dim=0)) / safe
        centred_TF = x_TF - torch.where(enough, batch_mean_F, mean_F)
        squares_TF = _zero_padding(centred_TF, mask_T).square()
        batch_var_F = _sum_over_ranks(squares_TF.sum(dim=0)) / safe
        # The averages moved below must not be the tensors that autograd has saved.
        scale_F = torch.where(enough, batch_var_F, var_F).add(_EPS).rsqrt()
        found = {
            _COUNT: count,
            _MEAN: batch_mean_F.detach(),
            _VAR: batch_var_F.detach() * count / (count - 1).clamp(min=1),  # unbiased
        }
        if self.deferred:
            if stats is not None:
                stats.update(found)
        elif not _recomputing():
            _move((self.running_mean, self.running_var), found)
        return centred_TF * scale_F

    def _batch_norm_reference(self, x_TF: Tensor, mask_T: Tensor | None) -> Tensor:
        real = x_TF if mask_T is None else x_TF[mask_T]
        mean, var = self.running_mean.to(x_TF.dtype), self.running_var.to(x_TF.dtype)
        if not self.training or len(real) < 2:
            return F.batch_norm(x_TF, mean, var, eps=_EPS)
        normed = F.batch_norm(real, None, None, training=True, eps=_EPS)
        return normed if mask_T is None else torch.zeros_like(x_TF).index_put((mask_T,), normed)


@torch.no_grad()
def _move(averages: tuple[Tensor, Tensor], stats: Mapping[str, Tensor]) -> None:
    """Move running averages of mean and variance, in place.

    Not by a batch that has no variance, nor by one that is not finite, which would stay for good.
    """
    count, mean_F, var_F = stats[_COUNT], stats[_MEAN], stats[_VAR]
    sound = (count > 1) & mean_F.isfinite().all() & var_F.isfinite().all()
    for average, value in zip(averages, (mean_F, var_F), strict=True):
        moved = average + (_MOMENTUM * (value - average)).to(average.dtype)
        average.copy_(torch.where(sound, moved, average))


def _recomputing() -> bool:
    """Return whether this is a backward pass, which runs a checkpointed forward pass once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _count(x_TF: Tensor, mask_T: Tensor | None) -> Tensor:
    """Count the real tokens of all ranks, in the dtype of what is divided by it."""
    if mask_T is None:
        return _sum_over_ranks(x_TF.new_full((), float(x_TF.shape[0])))
    return _sum_over_ranks(mask_T.sum().to(x_TF.dtype))


def _zero_padding(x_TF: Tensor, mask_T: Tensor | None) -> Tensor:
    return x_TF if mask_T is None else x_TF.masked_fill(~mask_T.unsqueeze(-1), 0.0)


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks with a gradient: every rank's loss depends on every rank's tokens."""
    if world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce  # loads RPC and its dependencies

    return all_reduce(x)
