"""Carving: a dense block's own neurons, cut into shared and routed experts."""

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.carving import Carved, carve_block, prune_block
from moezoo.convert.carve.options import CarveOptions

__all__ = ["Block", "CarveOptions", "Carved", "carve_block", "prune_block"]
