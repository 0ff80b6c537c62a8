"""Fused gather/scatter ops for sparse feed-forward layers.

Every op is a function here and a package of the same name that holds its backends:
``moezoo_kernels.grouped_mlp`` is the function, whether or not the package of that name has been
imported, and ``from moezoo_kernels.grouped_mlp import …`` reaches into the package.
"""

from moezoo_kernels import backends
from moezoo_kernels.backends import use
from moezoo_kernels.grouped_mlp import grouped_mlp
from moezoo_kernels.linear_cross_entropy import linear_cross_entropy
from moezoo_kernels.ngram_rows import ngram_rows
from moezoo_kernels.product_key_top_k import product_key_top_k
from moezoo_kernels.rank_one_experts import rank_one_experts
from moezoo_kernels.selective_mlp import selective_mlp
from moezoo_kernels.sparse_linear import sparse_linear
from moezoo_kernels.statistical_top_k import statistical_top_k
from moezoo_kernels.tree_descent import leaf_mlp, path_neurons, tree_descent
from moezoo_kernels.weighted_bag import weighted_bag

__all__ = [
    "backends",
    "grouped_mlp",
    "leaf_mlp",
    "linear_cross_entropy",
    "ngram_rows",
    "path_neurons",
    "product_key_top_k",
    "rank_one_experts",
    "selective_mlp",
    "sparse_linear",
    "statistical_top_k",
    "tree_descent",
    "use",
    "weighted_bag",
]
