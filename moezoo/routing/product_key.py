"""Product keys: the exact best of n² keys for the price of 2 n (Lample et al. 2019).

A key of slot ``i n + j`` is the concatenation of half-keys ``K1_i`` and ``K2_j``, so its score is
``q1·K1_i + q2·K2_j`` for the halves ``q1, q2`` of a query (arXiv:1907.05242, section 3.2). The k
best sums lie among the k best of each half: were ``i`` not among the first half's best, k other
rows would score at least as high beside the same ``j``. Rounding keeps that order, so this holds
in floating point too, where of equal sums the one with the better first half comes first.

Shapes: T tokens, D d_model, H heads, C d_key, n half-keys per codebook, K choices per head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int
from moezoo_kernels import product_key_top_k

KeyInit = Literal["lample", "berges"]

KEY_INITS = ("lample", "berges")


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
