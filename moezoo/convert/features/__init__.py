"""Random features in the place of a dense block (SNNK, Sehanobish et al. 2023, arXiv:2310.13225).

A block's output is written as ``Ψ Φ(x)``, where Φ are r features of the input that are drawn at
random, and the weights are in the matrix Ψ alone, ``(D, r)``: ``down``, which follows the
activation, is multiplied into it (the paper's bundling).

- :mod:`~moezoo.convert.features.universal` has features from which the dense weights give Ψ without
  bias, by the Fourier series of the activation; the error falls as r^-1/2.
- :mod:`~moezoo.convert.features.fitted` has ReLU features, and Ψ by least squares.
"""

from moezoo.convert.features.fitted import FittedFeatures, equal_neurons, fit_features
from moezoo.convert.features.universal import Series, UniversalFeatures, fourier_series, universal

__all__ = [
    "FittedFeatures",
    "Series",
    "UniversalFeatures",
    "equal_neurons",
    "fit_features",
    "fourier_series",
    "universal",
]
