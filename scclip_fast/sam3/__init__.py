"""A frozen SAM3 of transformers with calibrated features, installed and removed at will.

Needs the extra `sam3` (transformers 5.0 or newer).
"""

from ..extras import needs
from .config import Sam3CalibrationConfig

with needs("sam3"):
    from .output import to_seed_dict
    from .plugin import Calibration, calibrate

__all__ = ["Calibration", "Sam3CalibrationConfig", "calibrate", "to_seed_dict"]
