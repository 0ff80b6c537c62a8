"""Thresholds for a dense block: which of its inputs, gates and hidden values a token may skip.

Pure functions of a block and its inputs on calibration tokens; :class:`moezoo.SelectiveFFN` holds
what they find, and ``moezoo sparsify`` finds it for a checkpoint.
"""

from moezoo.convert.select.allocate import allocate, can_leave, check_share
from moezoo.convert.select.budget import METHODS, SelectMethod, read_share, uniform, work_share
from moezoo.convert.select.calibrate import LayerThresholds, calibrate, threshold
from moezoo.convert.select.curves import Curves, error_curves
from moezoo.convert.select.keys import Keys, keys_of

__all__ = [
    "METHODS",
    "Curves",
    "Keys",
    "LayerThresholds",
    "SelectMethod",
    "allocate",
    "calibrate",
    "can_leave",
    "check_share",
    "error_curves",
    "keys_of",
    "read_share",
    "threshold",
    "uniform",
    "work_share",
]
