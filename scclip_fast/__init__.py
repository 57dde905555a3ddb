"""Training-free dense vision, fast: SC-CLIP's operations without N x N memory.

Ops are functions of tensors (N, D) or (B, N, D), float16 to float64, on a CPU or a GPU. `backend`
chooses the implementation that runs them.
"""

from .backend import backend
from .ops import (
    adaptive_aggregate,
    aggregate,
    blended_attention,
    content_attention,
    knn,
    lof,
    lof_scores,
    norm_scores,
    outlier_mask,
    repair,
    similarity,
    upsampled_labels,
)

__version__ = "0.1.0"

__all__ = [
    "adaptive_aggregate",
    "aggregate",
    "backend",
    "blended_attention",
    "content_attention",
    "knn",
    "lof",
    "lof_scores",
    "norm_scores",
    "outlier_mask",
    "repair",
    "similarity",
    "upsampled_labels",
]
