"""A frozen SAM3 with calibrated features, installed and removed at will.

Of transformers (5.0 or newer, the extra `sam3`) or of Meta's package `sam3`; neither needs the
other.
"""

from .calibrate import Calibration, calibrate
from .config import Sam3CalibrationConfig
from .seed import to_seed_dict

__all__ = ["Calibration", "Sam3CalibrationConfig", "calibrate", "to_seed_dict"]
