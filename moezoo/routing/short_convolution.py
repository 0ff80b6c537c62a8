"""A short causal convolution of each feature with itself, within documents.

``y_t = SiLU(Σ_j w_j ⊙ RMSNorm(v)_{t - j n})`` with j from 0 to the number of taps less one, and n
the dilation (Cheng et al. 2026, arXiv:2601.07372, section 2.3, of four taps that are as far apart
as the longest n-gram is long). Tokens of other documents, and padding, count as zeros.

Shapes: B sequences, S tokens, E earlier ones that a cache holds, L >= S of which token ids are
known, D features, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.token_context import History
from moezoo_kernels.dtypes import at_least_fp32


class ShortConvolution(nn.Module):
    """Taps of a depthwise, dilated, causal convolution, and the norm before it.

    Args:
        width: number of features D.
        kernel: number of taps K.
        dilation: how many tokens apart they are.

    Attributes:
        reach: how many tokens before one change its output.
    """

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.reach = (kernel - 1) * dilation
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.weight = nn.Parameter(torch.empty(kernel, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the taps to zero, so that a fresh convolution adds nothing."""
        self.norm.reset_parameters()
        nn.init.zeros_(self.weight)

    def forward(
        self,
        values_BSD: Tensor,
        ends_BL: Tensor | None,
        history: History | None,
        brute_force: bool = False,
    ) -> Tensor:
        """Return the convolution ``(B, S, D)``, in the dtype of the values.

        Args:
            values_BSD: of the tokens of this call.
            ends_BL: true at tokens of which later ones see nothing, and nothing before them; with
                those of earlier tokens; None where there is none.
            history: gives the normalised values of earlier tokens.
            brute_force: multiply by a matrix over all tokens for each tap.
        """
        normed = normalised(self.norm, values_BSD).to(values_BSD.dtype)
        length = normed.shape[1]
        if history is not None:
            normed = history(normed, self.reach)
        u_BRD = at_least_fp32(normed)
        documents = None if ends_BL is None else _documents(ends_BL)
        total = self._by_matrix if brute_force else self._by_shifts
        return F.silu(total(u_BRD, length, documents)).to(values_BSD.dtype)

    def _by_shifts(self, u_BRD: Tensor, length: int, documents_BL: Tensor | None) -> Tensor:
        """Sum the values, moved by each tap's distance; R = E + S tokens are there."""
        weight_KD = self.weight.to(u_BRD.dtype)
        missing = self.reach + length - u_BRD.shape[1]
        if missing > 0:
            u_BRD = F.pad(u_BRD, (0, 0, missing, 0))
        u_BRD = u_BRD[:, -(self.reach + length) :]
        total_BSD = u_BRD[:, self.reach :] * weight_KD[0]
        if documents_BL is not None:
            missing = self.reach + length - documents_BL.shape[1]
            documents_BL = F.pad(documents_BL, (max(missing, 0), 0), value=-1)
            documents_BL = documents_BL[:, -(self.reach + length) :]
        for tap in range(1, self.kernel):
            begin = self.reach - tap * self.dilation
            moved_BSD = u_BRD[:, begin : begin + length]
            if documents_BL is not None:
                same_BS = documents_BL[:, begin : begin + length] == documents_BL[:, self.reach :]
                moved_BSD = moved_BSD * same_BS.unsqueeze(-1)
            total_BSD = torch.addcmul(total_BSD, moved_BSD, weight_KD[tap])
        return total_BSD

    def _by_matrix(self, u_BRD: Tensor, length: int, documents_BL: Tensor | None) -> Tensor:
        """Multiply the values of all tokens by a matrix of zeros and ones for each tap."""
        there = u_BRD.shape[1]
        to_S = torch.arange(there - length, there, device=u_BRD.device)
        from_R = torch.arange(there, device=u_BRD.device)
        total_BSD = torch.zeros_like(u_BRD[:, :length])
        for tap in range(self.kernel):
            seen = (to_S[:, None] - from_R == tap * self.dilation)[None]
            if documents_BL is not None:
                known_BR = documents_BL[:, documents_BL.shape[1] - there :]
                seen = seen & (known_BR[:, -length:, None] == known_BR[:, None])
            read_BSD = seen.to(u_BRD.dtype).expand(len(u_BRD), -1, -1) @ u_BRD
            total_BSD = total_BSD + read_BSD * self.weight[tap].to(u_BRD.dtype)
        return total_BSD

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.weight.shape[1]}, kernel={self.kernel}, dilation={self.dilation}"


def normalised(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Return ``RMSNorm(x)`` in fp32 at least, whatever autocast is on."""
    x = at_least_fp32(x)
    weight = norm.weight.to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, norm.eps)


def _documents(ends_BL: Tensor) -> Tensor:
    """Number the documents of each sequence; what ends one belongs to it."""
    ended_BL = ends_BL.long().cumsum(dim=-1)
    return ended_BL - ends_BL.long()
