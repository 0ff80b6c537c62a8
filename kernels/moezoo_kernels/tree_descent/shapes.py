"""The shape of a complete binary tree."""

from __future__ import annotations


def depth_of(num_nodes: int) -> int:
    """Count the levels of a complete binary tree of 2^levels - 1 nodes."""
    return num_nodes.bit_length()
