"""Experts: the stores of parameters that routed layers share."""

from moezoo.experts.mlp import MLPExperts
from moezoo.experts.norms import ExpertNormOptions
from moezoo_kernels.activations import GLUOptions

__all__ = ["ExpertNormOptions", "GLUOptions", "MLPExperts"]
