"""Carving: a dense block's own neurons, cut into shared and routed experts, without training.

CMoE (Pei et al. 2025, arXiv:2502.04416) as its authors' code computes it, with its parts to choose
from, and by default our own: clusters by contribution, a ridge router, a least-squares refit.
"""

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.carving import Carved, carve_block, prune_block
from moezoo.convert.carve.layer import carved_layer
from moezoo.convert.carve.options import CarveOptions

__all__ = ["Block", "CarveOptions", "Carved", "carve_block", "carved_layer", "prune_block"]
