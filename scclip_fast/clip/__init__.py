"""Frozen open_clip models with calibrated dense features: SC-CLIP and the baselines it improves on.

Needs the extra `clip`.
"""

from ..extras import needs
from .config import SCCLIPConfig

with needs("clip"):
    from .loading import create_model
    from .model import METHODS, SCCLIP

__all__ = ["METHODS", "SCCLIP", "SCCLIPConfig", "create_model"]
