"""Frozen open_clip models with calibrated dense features: SC-CLIP and the baselines it improves on.

Needs the extra `clip`.
"""

from .config import SCCLIPConfig
from .loading import create_model
from .model import METHODS, SCCLIP

__all__ = ["METHODS", "SCCLIP", "SCCLIPConfig", "create_model"]
