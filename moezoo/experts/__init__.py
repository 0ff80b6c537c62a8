"""Experts: the stores of parameters that routed layers share."""

from moezoo.experts.mlp import MLPExperts

__all__ = ["MLPExperts"]
