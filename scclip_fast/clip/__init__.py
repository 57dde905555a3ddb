"""Frozen CLIP models with calibrated dense features: SC-CLIP and the baselines it improves on.

Models are open_clip's (the extra `clip`) or transformers'. Neither library needs the other.
"""

from typing import TYPE_CHECKING

from .config import SCCLIPConfig
from .model import METHODS, SCCLIP, NotFiniteError

if TYPE_CHECKING:
    from .loading import create_model

__all__ = ["METHODS", "SCCLIP", "NotFiniteError", "SCCLIPConfig", "create_model"]


def __getattr__(name: str):
    """Imports `create_model` at its first use, because it imports open_clip."""
    if name == "create_model":
        from .loading import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
