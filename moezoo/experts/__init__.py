"""What experts compute: the stores that routed layers share."""

from moezoo.experts.mlp import MLPExperts

__all__ = ["MLPExperts"]
