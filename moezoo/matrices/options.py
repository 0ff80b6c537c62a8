"""The options of :class:`moezoo.DenseFFN`'s ``matrices``, told apart by ``kind``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number
from moezoo.matrices.checks import check_multiple, check_n_of_m, check_share, check_span


@dataclass(frozen=True)
class LowRank:
    """``W = U V`` (Wei et al. 2024, arXiv:2406.16450, eq. 1).

    Attributes:
        kind: ``low_rank``.
        rank: r, width between U and V; default: a quarter of the narrower side.
        init: ``spectral``, the r largest singular values of a dense draw, as published, which keeps
            the part of its variance that they have; or ``normal``, two draws that keep all of it.
        guide: share of the run in which a dense matrix guides the factors in training, with a
            weight that falls from 1 to 0 (section 3.3; the paper's 0.5); 0 for none.
    """

    kind: Literal["low_rank"] = "low_rank"
    rank: int | None = None
    init: Literal["spectral", "normal"] = "spectral"
    guide: float = 0.0

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_choice("matrices.init", self.init, ("spectral", "normal"))
        check_number("matrices.guide", self.guide, maximum=1.0)
        check_int("matrices.rank", self.rank_of(inputs, outputs), maximum=min(inputs, outputs))

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Return the rank of a matrix of that size."""
        return max(min(inputs, outputs) // 4, 1) if self.rank is None else self.rank


@dataclass(frozen=True)
class BlockDense:
    """``W = U B``, U dense, B of b blocks on its diagonal (arXiv:2406.16450, section 3.1).

    Attributes:
        kind: ``block_dense``.
        blocks: b.
        rank: width between U and B, a multiple of b; default: a quarter of the narrower side.
        guide: as of :class:`LowRank`.
    """

    kind: Literal["block_dense"] = "block_dense"
    blocks: int = 4
    rank: int | None = None
    guide: float = 0.0

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_number("matrices.guide", self.guide, maximum=1.0)
        check_int("matrices.blocks", self.blocks)
        check_multiple("matrices.blocks", self.blocks, inputs)
        rank = self.rank_of(inputs, outputs)
        check_int("matrices.rank", rank)
        if rank % self.blocks:
            raise InputError(
                f"matrices.rank: {rank} is no multiple of blocks, {self.blocks}; give one that is"
            )

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Return the width between the factors of a matrix of that size."""
        if self.rank is not None:
            return self.rank
        return -(-max(min(inputs, outputs) // 4, 1) // self.blocks) * self.blocks


@dataclass(frozen=True)
class BlockShuffle:
    """``W = P' B' P B``, both B of b blocks on their diagonals, P permutations (Wei et al. 2024).

    Attributes:
        kind: ``block_shuffle``.
        blocks: b.
        guide: as of :class:`LowRank`.
    """

    kind: Literal["block_shuffle"] = "block_shuffle"
    blocks: int = 4
    guide: float = 0.0

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_number("matrices.guide", self.guide, maximum=1.0)
        check_int("matrices.blocks", self.blocks)
        check_multiple("matrices.blocks", self.blocks, inputs)
        check_multiple("matrices.blocks", self.blocks, outputs)


@dataclass(frozen=True)
class Pixelfly:
    """``W = γ B + (1 - γ) U V``, B a flat block butterfly (arXiv:2112.00029).

    Attributes:
        kind: ``pixelfly``.
        size: n, a power of two that divides both widths: B is cut into n × n blocks.
        factors: butterfly factors that B is the sum of: so many blocks in every row and column
            beside the one on the diagonal, ``log2 n`` at most.
        rank: width between U and V; default: half as many numbers as B has.
        mix: ``learned``, γ is a number that is trained, from 1/2; ``half``: it stays 1/2.
    """

    kind: Literal["pixelfly"] = "pixelfly"
    size: int = 8
    factors: int = 2
    rank: int | None = None
    mix: Literal["learned", "half"] = "learned"

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        size = check_int("matrices.size", self.size, minimum=2)
        if size & (size - 1):
            raise InputError(f"matrices.size: {size} is no power of two; give e.g. 8 or 16")
        for width in (inputs, outputs):
            check_multiple("matrices.size", size, width)
        check_int("matrices.factors", self.factors, maximum=size.bit_length() - 1)
        check_int("matrices.rank", self.rank_of(inputs, outputs), maximum=min(inputs, outputs))
        check_choice("matrices.mix", self.mix, ("learned", "half"))

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Return the rank of the product beside a butterfly of that size."""
        if self.rank is not None:
            return self.rank
        numbers = inputs * outputs * (self.factors + 1) // self.size
        return max(numbers // (2 * (inputs + outputs)), 1)


@dataclass(frozen=True)
class NM:
    """Of every M consecutive inputs of a neuron, the N weights of largest magnitude count.

    The mask follows the weights after every optimizer step, and all weights learn, by the gradient
    of the masked ones (a straight-through estimator).

    Attributes:
        kind: ``n_m``.
        n: weights that are kept.
        m: of so many.
        decay: λ, which pulls the weights that are not kept to zero: λ/2 of their sum of squares is
            added to the loss (SR-STE, arXiv:2102.04010, eq. 9, where it is 2e-4).
        stages: patterns on the way to N:M, in equal parts of the run from ``start`` to ``end``
            (SDGF, arXiv:2402.04744): ``step``, of M the first M-1, M/2, M/4, …; ``fine``, 8N:8M,
            4N:4M, 2N:2M; None for N:M alone.
        leak: how the factor on weights that are not kept falls from 1 at ``start`` to 0 at ``end``
            (MDGF, arXiv:2402.04744): ``linear`` or ``exponential``; None: it is 0.
        start: share of the run before stages or leak begin, which is trained dense.
        end: share of the run at which they have ended.
    """

    kind: Literal["n_m"] = "n_m"
    n: int = 2
    m: int = 4
    decay: float = 0.0
    stages: Literal["step", "fine"] | None = None
    leak: Literal["linear", "exponential"] | None = None
    start: float = 0.0
    end: float = 1.0

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_n_of_m(self.n, self.m, inputs)
        check_number("matrices.decay", self.decay)
        check_span(self.start, self.end)
        if self.stages is not None:
            check_choice("matrices.stages", self.stages, ("step", "fine"))
            if self.leak is not None:
                raise InputError("matrices.leak: stages and a leak are two methods; leave one out")
            if self.stages == "fine":
                check_multiple("matrices.stages", 8 * self.m, inputs)
        if self.leak is not None:
            check_choice("matrices.leak", self.leak, ("linear", "exponential"))

    @property
    def scheduled(self) -> bool:
        """Whether anything follows the run's progress."""
        return self.stages is not None or self.leak is not None


@dataclass(frozen=True)
class Transposable:
    """Of every 4 × 4 weights two in each row and each column count: 2:4 also in the backward pass.

    FST (Hu et al. 2024, arXiv:2404.01847). All weights learn, as of :class:`NM`.

    Attributes:
        kind: ``transposable``.
        every: optimizer steps between two choices of the mask.
        decay: as of :class:`NM`; in the paper 6e-5 or 2e-4, by size of the model.
        sampled: of the output's gradients of every four tokens, two that are drawn, without bias,
            make the weights' gradient; so the third product is 2:4 too.
        dense_from: share of the run from which all weights count again; None: never.
    """

    kind: Literal["transposable"] = "transposable"
    every: int = 40
    decay: float = 6e-5
    sampled: bool = True
    dense_from: float | None = 5 / 6

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_int("matrices.every", self.every)
        check_number("matrices.decay", self.decay)
        check_flag("matrices.sampled", self.sampled)
        check_share("matrices.dense_from", self.dense_from)
        for width in (inputs, outputs):
            if width % 4:
                raise InputError(f"matrices.kind: transposable masks are 4 × 4, {width} is not 4 n")


@dataclass(frozen=True)
class SoftNM:
    """``β sign(w) relu(|w| - t)``, t the (N+1)-th largest magnitude of M: a continuous N:M.

    S-STE (Hu et al. 2024, arXiv:2409.09099). β is found at initialization and stays.

    Attributes:
        kind: ``soft_n_m``.
        n: weights that are not zero.
        m: of so many consecutive ones.
        sampled: as of :class:`Transposable`.
    """

    kind: Literal["soft_n_m"] = "soft_n_m"
    n: int = 2
    m: int = 4
    sampled: bool = True

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_n_of_m(self.n, self.m, inputs)
        check_flag("matrices.sampled", self.sampled)


@dataclass(frozen=True)
class Pruned:
    """A share of the weights, or of square blocks of them, is zero; which ones may change.

    What is dropped is set to zero, learns nothing, and starts at zero where it is grown again.
    SPDF (arXiv:2303.10464), RigL (arXiv:1911.11134), gradual magnitude pruning (arXiv:1710.01878)
    and BLaST (arXiv:2507.03117) are such rules.

    Attributes:
        kind: ``pruned``.
        sparsity: share of zeros where the schedule ends.
        block: width of the blocks; 1 for single weights.
        start: share of the run at which pruning begins, from dense, along a cubic curve.
        end: share of the run at which ``sparsity`` is reached; 0: from the first step, at random.
        growth: share of what is kept that an update drops beside, by magnitude, and grows elsewhere
            by the gradient's; it falls to 0 along half a cosine. 0: nothing is grown.
        growth_end: share of the run at which it is 0.
        every: optimizer steps between two updates.
        scope: every ``row`` (of blocks) keeps the same number; or the ``matrix`` keeps its best.
        dense_from: share of the run from which all weights learn (SPDF); None: never.
    """

    kind: Literal["pruned"] = "pruned"
    sparsity: float = 0.75
    block: int = 1
    start: float = 0.0
    end: float = 0.0
    growth: float = 0.0
    growth_end: float = 0.75
    every: int = 100
    scope: Literal["row", "matrix"] = "row"
    dense_from: float | None = None

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_number("matrices.sparsity", self.sparsity, maximum=0.999)
        check_int("matrices.block", self.block)
        for width in (inputs, outputs):
            check_multiple("matrices.block", self.block, width)
        if self.end:
            check_span(self.start, self.end)
        elif self.start:
            raise InputError("matrices.start: pruning ends at 0, before it begins; set end")
        check_number("matrices.growth", self.growth, maximum=1.0)
        check_number("matrices.growth_end", self.growth_end, maximum=1.0)
        if self.growth and not self.growth_end:
            raise InputError("matrices.growth_end: growth has ended at 0; give a share of the run")
        check_int("matrices.every", self.every)
        check_choice("matrices.scope", self.scope, ("row", "matrix"))
        check_share("matrices.dense_from", self.dense_from)

    @property
    def moves(self) -> bool:
        """Whether the mask changes before it is dropped."""
        return self.end > 0 or self.growth > 0


@dataclass(frozen=True)
class Factorized(Pruned):
    """``W = U V``, both of them pruned (Sparse-IFT, arXiv:2303.11525, sparse factorized).

    Attributes:
        kind: ``factorized``; all other options but one are those of :class:`Pruned`.
        rank: width between U and V, which may be more than either side; default: such that what
            counts is as much as in a dense matrix, ``in out / ((1 - sparsity) (in + out))``.
    """

    kind: Literal["factorized"] = "factorized"  # type: ignore[assignment]
    rank: int | None = None

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        check_number("matrices.sparsity", self.sparsity, maximum=0.999)
        check_int("matrices.block", self.block)
        rank = check_int("matrices.rank", self.rank_of(inputs, outputs))
        super().check(inputs, rank)
        super().check(rank, outputs)

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Return the width between the factors of a matrix of that size, a multiple of ``block``.

        It is not rounded to a multiple of ``1 / (1 - sparsity)``.
        """
        if self.rank is not None:
            return self.rank
        exact = inputs * outputs / ((1.0 - self.sparsity) * (inputs + outputs))
        return max(round(exact / self.block), 1) * self.block


@dataclass(frozen=True)
class Doped(Pruned):
    """``W = S + U V``, S pruned (Sparse-IFT, arXiv:2303.11525, sparse doped).

    Attributes:
        kind: ``doped``; all other options but one are those of :class:`Pruned`.
        rank: width between U and V; default: such that what counts is as much as in a dense
            matrix, ``sparsity in out / (in + out)``.
    """

    kind: Literal["doped"] = "doped"  # type: ignore[assignment]
    rank: int | None = None

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        super().check(inputs, outputs)
        check_int("matrices.rank", self.rank_of(inputs, outputs))

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Return the rank of the product beside a sparse matrix of that size."""
        if self.rank is not None:
            return self.rank
        return max(round(self.sparsity * inputs * outputs / (inputs + outputs)), 1)


@dataclass(frozen=True)
class Parallel(Pruned):
    """``Σ_j W_j``, each pruned, over k units in parallel (Sparse-IFT, arXiv:2303.11525, section 2).

    The block has k times as many hidden neurons, and what reads them reads sums of k neurons each.

    Attributes:
        kind: ``parallel``; all other options but one are those of :class:`Pruned`.
        branches: k; default: ``1 / (1 - sparsity)``, if whole: as much counts as in dense ones.
    """

    kind: Literal["parallel"] = "parallel"  # type: ignore[assignment]
    branches: int | None = None

    def check(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InputError` unless the options fit a matrix of that size."""
        super().check(inputs, outputs)
        exact = 1.0 / (1.0 - self.sparsity)
        if self.branches is None and abs(self.count - exact) > 1e-3 * exact:
            raise InputError(f"matrices.branches: 1 / (1 - sparsity) is {exact:.3g}; give a number")
        check_int("matrices.branches", self.count)

    @property
    def count(self) -> int:
        """How many there are."""
        return round(1.0 / (1.0 - self.sparsity)) if self.branches is None else self.branches


Matrices: TypeAlias = (
    LowRank
    | BlockDense
    | BlockShuffle
    | Pixelfly
    | NM
    | Transposable
    | SoftNM
    | Pruned
    | Factorized
    | Doped
    | Parallel
)
"""The options of any matrix."""
