"""Matrices of feed-forward blocks: products of factors, and sparse ones.

A dense block whose ``matrices`` are given computes the same MLP with each projection a
:class:`Matrix`. What differs is how a matrix is stored, which of its numbers count, and how they
learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moezoo.matrices.composed import DopedMatrix, FactorizedMatrix, ParallelMatrix
from moezoo.matrices.factored import BlockDenseMatrix, BlockShuffleMatrix, LowRankMatrix
from moezoo.matrices.masked import NMMatrix, SoftNMMatrix, TransposableMatrix
from moezoo.matrices.matrix import Matrix
from moezoo.matrices.options import (
    NM,
    BlockDense,
    BlockShuffle,
    Doped,
    Factorized,
    LowRank,
    Matrices,
    Parallel,
    Pixelfly,
    Pruned,
    SoftNM,
    Transposable,
)
from moezoo.matrices.pixelfly import PixelflyMatrix
from moezoo.matrices.pruned import PrunedMatrix

_CLASSES: dict[type, Callable[[int, int, bool, Any], Matrix]] = {
    LowRank: LowRankMatrix,
    BlockDense: BlockDenseMatrix,
    BlockShuffle: BlockShuffleMatrix,
    Pixelfly: PixelflyMatrix,
    NM: NMMatrix,
    Transposable: TransposableMatrix,
    SoftNM: SoftNMMatrix,
    Pruned: PrunedMatrix,
    Factorized: FactorizedMatrix,
    Doped: DopedMatrix,
    Parallel: PrunedMatrix,
}


def build_matrix(
    options: Matrices,
    in_features: int,
    out_features: int,
    bias: bool,
    *,
    reads_hidden: bool = False,
) -> Matrix:
    """Build a matrix, not initialized.

    Args:
        options: which one.
        in_features: width of what it reads.
        out_features: width of what it returns.
        bias: whether a bias is added.
        reads_hidden: whether it reads hidden neurons; parallel ones are added up there.

    Raises:
        InputError: the options are out of range, or do not fit the size.
    """
    options.check(in_features, out_features)
    if isinstance(options, Parallel) and reads_hidden:
        return ParallelMatrix(in_features, out_features, bias, options)
    return _CLASSES[type(options)](in_features, out_features, bias, options)


__all__ = [
    "NM",
    "BlockDense",
    "BlockShuffle",
    "Doped",
    "Factorized",
    "LowRank",
    "Matrices",
    "Matrix",
    "Parallel",
    "Pixelfly",
    "Pruned",
    "SoftNM",
    "Transposable",
    "build_matrix",
]
