"""The attention of one token per sequence: weights, keys and values as decoding wants them.

Shapes: B sequences, L positions, D hidden_size, H query heads, G key-value heads, C head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.token_step import Cache
from moezoo_models.decoding.in_place import InPlaceLayer
from moezoo_models.model.attention import Attention
from moezoo_models.model.joint_attention import joint_attention
from moezoo_models.model.norm import RMSNorm
from moezoo_models.model.persistent import JoinedSlots

_ROUNDED = (torch.bfloat16, torch.float16)


class Attending:
    """The attention of one block, on a cache of fixed size.

    Args:
        attention: the block's attention; its weights are read, and q, k and v copied into one
            matrix if ``fuse``.
        slots: what takes the place of the block's feed-forward layer, if that is persistent slots.
        cache: keys and values ``(B, G, L, C)``, and which positions are real.
        fuse: whether the three projections are one product.
    """

    def __init__(
        self,
        attention: Attention,
        slots: JoinedSlots | None,
        cache: Cache,
        fuse: bool,
    ) -> None:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._projections: list[tuple[Tensor, Tensor | None]] = [
            (part.weight, part.bias) for part in parts
        ]
        if fuse:
            weights = torch.cat([part.weight for part in parts])
            biased = parts[0].bias is not None
            bias = torch.cat([part.bias for part in parts]) if biased else None
            self._projections = [(weights, bias)]
        weight = attention.o_proj.weight
        self._out, self._out_bias = weight, attention.o_proj.bias
        self._out_transposed = weight.t()
        self._slots = None if slots is None else slots.slots
        self._window, self._scale = attention.sliding_window, attention.scaling
        batch, kv_heads, _, width = cache.keys.shape
        self._heads = attention.q_proj.out_features // width
        self._split = (batch, self._heads + 2 * kv_heads, width)
        self._grouped = (batch, kv_heads, self._heads // kv_heads, width)
        self._norms = (attention.q_norm, attention.k_norm)
        self._over_all = attention.norms_projections
        self._norm_weight: Tensor | None = None
        of_q, of_k = attention.q_norm, attention.k_norm
        if isinstance(of_q, RMSNorm) and isinstance(of_k, RMSNorm) and not self._over_all:
            rows = of_q.weight.expand(self._heads, -1), of_k.weight.expand(kv_heads, -1)
            self._norm_weight = torch.cat(rows)
            self._eps = of_q.eps
        self.keys, self.values, _ = cache

    def remember(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Fill the cache with the prompt's keys and values, ``(B, G, at most length, C)``.

        A layer with a window may have kept the last ones only.
        """
        kept = keys.shape[2]
        self.keys[:, :, length - kept : length] = keys
        self.values[:, :, length - kept : length] = values

    def in_place(self, begin: int) -> InPlaceLayer:
        """Return the cache as the model's own forward pass writes to it, from a place on."""
        return InPlaceLayer(self.keys, self.values, begin, self._window)

    def step(
        self,
        residual: Tensor,
        normed: Tensor,
        at: int,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Attend from one position to all up to it, and add the answer to the residual stream.

        Args:
            residual: ``(B, D)``.
            normed: ``(B, D)``, what attention reads.
            at: where in the cache the position is.
            rotary: cosines, and sines with the sign of :func:`half_turned`, ``(B or 1, 1, R)``, of
                R numbers of each head that are turned.
            mask: ``(B, L)`` bool, true at real tokens; None if all are.
        """
        projected = [F.linear(normed, *part) for part in self._projections]
        states = (projected[0] if len(projected) == 1 else torch.cat(projected, -1)).view(
            self._split
        )
        heads, (batch, kv_heads, _, width) = self._heads, self._grouped
        plain = states[:, : heads + kv_heads]  # queries and keys
        if self._over_all or self._norm_weight is not None:
            plain = self._normalized(plain)
        turned = _turned(plain, *rotary)
        self.keys.select(2, at).copy_(turned[:, heads:])
        self.values.select(2, at).copy_(states[:, heads + kv_heads :])
        first = 0 if self._window is None else max(0, at + 1 - self._window)
        keys = self.keys.narrow(2, first, at + 1 - first)
        values = self.values.narrow(2, first, at + 1 - first)
        if mask is not None:
            mask = mask[:, None, None, first : at + 1]
        if self._slots is None:
            # Queries that share keys stand where several queries of one head would.
            attended = F.scaled_dot_product_attention(
                turned[:, :heads].view(self._grouped), keys, values, mask, scale=self._scale
            )
        else:
            alone = (batch, heads, 1, width)
            attended, _, _ = joint_attention(
                self._slots,
                plain[:, :heads].reshape(alone),
                turned[:, :heads].reshape(alone),
                keys,
                values,
                mask,
                "sdpa",
                scaling=self._scale,
                dropout=0.0,
            )
        return self._added(residual, attended.reshape(batch, heads * width))

    def _normalized(self, x: Tensor) -> Tensor:
        if self._over_all:
            parts = x.split((self._heads, x.shape[1] - self._heads), dim=1)
            both = zip(self._norms, parts, strict=True)
            return torch.cat([norm(part.flatten(1)).view_as(part) for norm, part in both], dim=1)
        assert self._norm_weight is not None
        if x.dtype == torch.float64:  # whose statistics are taken in fp32
            of_q, of_k = self._norms
            return torch.cat((of_q(x[:, : self._heads]), of_k(x[:, self._heads :])), dim=1)
        return F.rms_norm(x, x.shape[-1:], None, self._eps) * self._norm_weight

    def _added(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Project the answer and add it, in one product where that rounds no otherwise."""
        if self._out_bias is None and attended.dtype not in _ROUNDED:
            return torch.addmm(residual, attended, self._out_transposed)
        return residual + F.linear(attended, self._out, self._out_bias)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads by their angles; where these are fewer than dimensions, the others stay."""
    if (width := cos.shape[-1]) < x.shape[-1]:
        first, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((_turned(first, cos, sin), rest), dim=-1)
    return x * cos + half_turned(x) * sin


def half_turned(x: Tensor) -> Tensor:
    """Swap the halves of the last dimension; the sign of a quarter turn is that of the sines."""
    return x.roll(x.shape[-1] // 2, -1)


def signed(sin: Tensor) -> Tensor:
    """Negate the first half of the sines, which a quarter turn multiplies with ``-second``."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)
