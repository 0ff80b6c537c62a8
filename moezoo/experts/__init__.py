"""Experts: the stores of parameters that routed layers share."""

from moezoo.experts.mlp import MLPExperts
from moezoo_kernels.activations import GLUOptions

__all__ = ["GLUOptions", "MLPExperts"]
