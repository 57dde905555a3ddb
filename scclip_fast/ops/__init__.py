"""The ops, pure functions of tensors. Each checks its arguments, picks a backend and calls it."""

from .aggregate import aggregate
from .attention import blended_attention, content_attention
from .knn import knn
from .lof import lof, lof_scores, norm_scores, outlier_mask
from .repair import repair
from .similarity import adaptive_aggregate, similarity
from .upsample import upsampled_labels

__all__ = [
    "adaptive_aggregate",
    "aggregate",
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
