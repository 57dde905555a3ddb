"""Calibrated features for a frozen SAM3, installed by `calibrate` and removed at any time.

The model is transformers' (5.0 or newer, the extra `sam3`) or that of Meta's package `sam3`.
Neither package needs the other.
"""

from .calibrate import Calibration, calibrate, to_seed_dict
from .config import Sam3CalibrationConfig

__all__ = ["Calibration", "Sam3CalibrationConfig", "calibrate", "to_seed_dict"]
