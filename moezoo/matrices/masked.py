"""Matrices of which a mask lets a part count.

A mask is a buffer, and part of every checkpoint: a resumed run has the one it had, and does not
choose it anew. It changes in :meth:`Matrix.step` alone, after an optimizer step. Under FSDP2 rows
of the weights lie on several processes; each then gathers one matrix and chooses the same mask.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from moezoo.cost import Cost
from moezoo.matrices import rules
from moezoo.matrices.matrix import Matrix
from moezoo.matrices.options import NM, SoftNM, Transposable
from moezoo.matrices.packing import Packed, Packing, Pattern, settled
from moezoo.matrices.sampling import reference_linear, sampled_linear
from moezoo.matrices.schedules import leak, stages
from moezoo.parallel import whole
from moezoo_kernels.linear import linear
from moezoo_kernels.sparse_linear import sparse_linear


def times(latent: Tensor, factor: Tensor, passed: Tensor | None = None) -> Tensor:
    """Return ``factor * W``, with W's gradient that of the product where ``passed``, else zero.

    Args:
        latent: W, ``(O, I)``.
        factor: of the same shape.
        passed: bool, of the same shape; None: everywhere, straight through.
    """
    zero = latent - latent.detach()
    return latent.detach() * factor + (zero if passed is None else zero * passed)


class Latent(Matrix):
    """A matrix that is computed from one of the same shape, which is what learns."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.latent = nn.Parameter(torch.empty(out_features, in_features))
        self._packing = Packing()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by :meth:`dense`; in evaluation without its zeros, where that is faster."""
        packed = self.packed(x)
        if packed is not None:
            return sparse_linear(x, packed, self.bias)
        made_of = self._settled(x)
        whole = self.dense() if made_of is None else self._packing.whole(made_of, self.dense)
        return linear(x, whole, self.bias)

    def packed(self, x: Tensor) -> Packed | None:
        """Return the matrix without its zeros, if it is faster for these tokens; else None.

        It is None in training, where the weights want a gradient, under autocast, in a graph that
        is compiled, and where weights are sharded.
        """
        zeros = self._zeros()
        if zeros is None or x.dtype != self.latent.dtype:
            return None
        made_of = self._settled(x)
        if made_of is None or torch.is_autocast_enabled(x.device.type):
            return None
        return self._packing.get(made_of, x.numel() // self.in_features, zeros, self.dense)

    def _settled(self, x: Tensor) -> list[Tensor] | None:
        """Return what the matrix is computed from where copies of it may be kept, else None."""
        return settled(self, x, [self.latent, *self.buffers()])

    def _zeros(self) -> Pattern | None:
        """Return where the matrix has zeros; None if nowhere that products could skip."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Forget the copies in training, which changes the weights."""
        if mode:
            self._packing.clear()
        return super().train(mode)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights as a dense matrix has them, and find what depends on them."""
        super().reset_parameters(std)
        nn.init.normal_(self.latent, std=std)

    def _kept(self, n: int, m: int) -> Cost:
        """Return the cost where N of M weights count, in products that are computed dense."""
        numbers = self.in_features * self.out_features
        return self._cost(numbers, numbers * n // m, numbers)


class Masked(Latent):
    """A matrix with a mask over its weights.

    Args:
        in_features: as of :class:`Matrix`, and likewise out_features and bias.
        out_features: as there.
        bias: as there.
        decay: λ on the weights that do not count.
    """

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, decay: float = 0.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.decay = decay
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool))

    def losses(self) -> dict[str, Tensor]:
        """Return ``λ/2 Σ w²`` over the weights that do not count, whose gradient is ``λ w``.

        As a loss it is scaled and averaged with the others, however many micro-batches there are.
        """
        if not self.decay:
            return {}
        others = self.latent.to(torch.promote_types(self.latent.dtype, torch.float32))
        return {
            "masked_decay": 0.5 * self.decay * others.masked_fill(self.mask, 0.0).square().sum()
        }


class NMMatrix(Masked):
    """N of every M inputs of a neuron."""

    progress: Tensor
    stage: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, options: NM) -> None:
        super().__init__(in_features, out_features, bias, options.decay)
        self.options = options
        if options.leak is not None:
            self.register_buffer("progress", torch.zeros((), dtype=torch.float32))
        if options.stages is not None:
            self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def dense(self) -> Tensor:
        """Multiply the weights by the mask, and by what leaks outside of it."""
        factor = self.mask.to(self.latent.dtype)
        if self.options.leak is not None:
            rule = self.options
            factor = factor + ~self.mask * leak(self.progress, rule.start, rule.end, self._leak)
        return times(self.latent, factor.to(self.latent.dtype))

    @property
    def _leak(self) -> str:
        return str(self.options.leak)

    def _zeros(self) -> Pattern:
        return Pattern(n=self.options.n, m=self.options.m)

    def cost(self) -> Cost:
        """N of M weights count."""
        return self._kept(self.options.n, self.options.m)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights, and choose the mask of the start."""
        super().reset_parameters(std)
        if self.options.leak is not None:
            nn.init.zeros_(self.progress)
        if self.options.stages is not None:
            nn.init.zeros_(self.stage)
        self._choose(self._pattern(self._stage_of(0.0)))

    @property
    def scheduled(self) -> bool:
        """Whether there are stages, or a leak."""
        return self.options.scheduled

    @torch.no_grad()
    def step(self, progress: float | None = None) -> None:
        """Choose the mask by the weights as they are now; no stage and no leak comes back."""
        super().step(progress)
        stage = 0
        if progress is not None and self.options.leak is not None:
            self.progress.clamp_(min=progress)
        elif progress is not None and self.options.stages is not None:
            stage = max(int(self.stage), self._stage_of(progress))
            self.stage.fill_(stage)
        self._choose(self._pattern(stage))

    def _stage_of(self, progress: float) -> int:
        """Return the number of the stage, from 1; 0 before the first."""
        rule = self.options
        if rule.stages is None or progress < rule.start:
            return 0
        count = len(stages(rule.n, rule.m, rule.stages))
        return min(int((progress - rule.start) / (rule.end - rule.start) * count), count - 1) + 1

    def _pattern(self, stage: int) -> tuple[int, int] | None:
        """Return the N and M of a stage; None where all weights count."""
        rule = self.options
        if rule.stages is None:
            return rule.n, rule.m
        return stages(rule.n, rule.m, rule.stages)[stage - 1] if stage else None

    @torch.no_grad()
    def _choose(self, pattern: tuple[int, int] | None) -> None:
        if pattern is None:
            self.mask.fill_(True)
        else:
            self.mask.copy_(rules.best_of_group(whole(self.latent).abs(), *pattern))


class Sampled(Latent):
    """A matrix whose weights' gradient is sampled in training, if its options say so."""

    options: Transposable | SoftNM

    def _exact(self) -> Tensor:
        """Return whether the gradient is exact now, a scalar bool: where nothing is sparse."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; in training with the weights' gradient sampled, while the matrix is sparse."""
        if not (self.training and self.options.sampled):
            return super().forward(x)
        output = sampled_linear(x, self.dense(), self._exact())
        return output if self.bias is None else output + self.bias

    def reference(self, x: Tensor) -> Tensor:
        """Do the same row by row."""
        if not (self.training and self.options.sampled):
            return super().reference(x)
        output = reference_linear(x, self.dense(), self._exact())
        return output if self.bias is None else output + self.bias


class TransposableMatrix(Sampled, Masked):
    """Two of four in rows and in columns."""

    options: Transposable
    steps: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, options: Transposable
    ) -> None:
        super().__init__(in_features, out_features, bias, options.decay)
        self.options = options
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def dense(self) -> Tensor:
        """Multiply the weights by the mask."""
        return times(self.latent, self.mask)

    def _zeros(self) -> Pattern:
        return Pattern(n=2, m=4)

    def _exact(self) -> Tensor:
        return self.mask.all()

    def cost(self) -> Cost:
        """Half of the weights count, while it is sparse."""
        return self._kept(2, 4)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights, and choose the mask."""
        super().reset_parameters(std)
        with torch.no_grad():
            self.steps.zero_()
            self.mask.copy_(rules.transposable(self.latent.abs()))

    @property
    def scheduled(self) -> bool:
        """Whether it is dense in the end."""
        return self.options.dense_from is not None

    @torch.no_grad()
    def step(self, progress: float | None = None) -> None:
        """Choose the mask anew every so many steps, until the matrix is dense."""
        super().step(progress)
        self.steps += 1
        dense_from = self.options.dense_from
        if dense_from is not None and progress is not None and progress >= dense_from:
            self.mask.fill_(True)
        elif int(self.steps) % self.options.every == 0 and not self.mask.all():
            self.mask.copy_(rules.transposable(whole(self.latent).abs()))


class SoftNMMatrix(Sampled):
    """N of M by a threshold that is subtracted: continuous in the weights."""

    options: SoftNM
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, options: SoftNM) -> None:
        super().__init__(in_features, out_features, bias)
        self.options = options
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def dense(self) -> Tensor:
        """Subtract the thresholds; the gradient reaches the weights as it is."""
        with torch.no_grad():
            value = self.scale.to(self.latent.dtype) * self._shrunk(self.latent)
        return value + (self.latent - self.latent.detach())

    def _zeros(self) -> Pattern:
        return Pattern(n=self.options.n, m=self.options.m)

    def _shrunk(self, latent: Tensor) -> Tensor:
        """Return ``sign(w) relu(|w| - t)``."""
        size = latent.abs()
        threshold = rules.next_of_group(size, self.options.n, self.options.m)
        return latent.sign() * (size - threshold).clamp(min=0.0)

    def _exact(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=self.latent.device)

    def cost(self) -> Cost:
        """N of M weights count."""
        return self._kept(self.options.n, self.options.m)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights, and find the scale by which they are best met: ``⟨w, s⟩ / ⟨s, s⟩``."""
        super().reset_parameters(std)
        with torch.no_grad():
            wide = self.latent.to(torch.promote_types(self.latent.dtype, torch.float32))
            shrunk = self._shrunk(wide)
            self.scale.copy_((wide * shrunk).sum() / shrunk.square().sum())
