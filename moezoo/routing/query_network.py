"""The queries of product keys: a linear map and a norm (Lample et al. 2019, arXiv:1907.05242).

Shapes: T tokens, D d_model, H heads, C d_key, F = H C features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import check_choice, check_int
from moezoo.routing.losses import world_size
from moezoo.routing.product_key import KEY_INITS, KeyInit
from moezoo.training_state import TrainingState
from moezoo_kernels.linear import Linear, linear

QueryNorm = Literal["batch", "layer", "qk", "none"]

QUERY_NORMS = ("batch", "layer", "qk", "none")

_EPS = 1e-5
_MOMENTUM = 0.1
_COUNT, _MEAN, _VAR = "query_count", "query_mean", "query_var"


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
        self.proj = Linear(d_model, features, bias=bias)
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
        """Return the same queries, the norm written out over the real tokens picked out."""
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
    def step(self, progress: float | None = None) -> None:
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
            x_TF = linear(hidden_TD.to(dtype), self.proj.weight.to(dtype), bias)
            x_THC = x_TF.unflatten(-1, (self.num_heads, self.d_key))
            if self.norm == "batch":
                if self._in_one_pass(x_TF, mask_T, brute_force):
                    return self._fused_batch_norm(x_TF, stats).unflatten(-1, x_THC.shape[1:])
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
        unbiased_F = batch_var_F.detach() * count / (count - 1).clamp(min=1)
        self._found(count, batch_mean_F.detach(), unbiased_F, stats)
        return centred_TF * scale_F

    def _in_one_pass(self, x_TF: Tensor, mask_T: Tensor | None, brute_force: bool) -> bool:
        """Return whether torch's own norm does: all tokens are real, and all of them are here.

        Written out, the norm makes six tensors of this size, gradients included, and the time of
        a large batch goes into the first touch of their memory.
        """
        here = self.training and mask_T is None and world_size() == 1
        return here and not brute_force and len(x_TF) > 1 and x_TF.device.type == "cpu"

    def _fused_batch_norm(self, x_TF: Tensor, stats: dict[str, Tensor] | None) -> Tensor:
        """Normalise over the batch, and apply gain and shift."""
        assert self.gain is not None
        assert self.shift is not None
        # Running averages that forget all but this batch: its mean and its unbiased variance.
        mean_F, var_F = x_TF.new_zeros(2, x_TF.shape[1]).unbind()
        gain_F, shift_F = self.gain.to(x_TF.dtype), self.shift.to(x_TF.dtype)
        x_TF = F.batch_norm(x_TF, mean_F, var_F, gain_F, shift_F, True, momentum=1.0, eps=_EPS)
        self._found(_count(x_TF, None), mean_F, var_F, stats)
        return x_TF

    def _found(
        self, count: Tensor, mean_F: Tensor, var_F: Tensor, stats: dict[str, Tensor] | None
    ) -> None:
        """Hand a batch's mean and unbiased variance to what keeps running averages."""
        found = {_COUNT: count, _MEAN: mean_F, _VAR: var_F}
        if self.deferred:
            if stats is not None:
                stats.update(found)
        elif not _recomputing():
            _move((self.running_mean, self.running_var), found)

    def _batch_norm_reference(self, x_TF: Tensor, mask_T: Tensor | None) -> Tensor:
        real = x_TF if mask_T is None else x_TF[mask_T]
        mean_F, var_F = self.running_mean.to(x_TF.dtype), self.running_var.to(x_TF.dtype)
        if not self.training or len(real) < 2:
            return (x_TF - mean_F) / (var_F + _EPS).sqrt()
        normed = (real - real.mean(dim=0)) / (real.var(dim=0, unbiased=False) + _EPS).sqrt()
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
