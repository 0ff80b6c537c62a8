"""Which inputs and neurons of a dense block a token reads: rules, and the state they keep."""

from moezoo.selection.options import Predictor, Selection, Thresholds
from moezoo.selection.predictor import PredictorSelector
from moezoo.selection.selector import Kept, Selector, Shares, kept
from moezoo.selection.thresholds import ThresholdSelector, passes

__all__ = [
    "Kept",
    "Predictor",
    "PredictorSelector",
    "Selection",
    "Selector",
    "Shares",
    "ThresholdSelector",
    "Thresholds",
    "kept",
    "passes",
]
