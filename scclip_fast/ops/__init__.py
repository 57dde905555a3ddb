"""The ops, pure functions of tensors: validate the arguments, pick a backend, call it."""

from .aggregation import adaptive_aggregate, aggregate, similarity
from .attention import blended_attention
from .outliers import knn, lof, lof_scores, norm_scores, outlier_mask
from .repair import repair

__all__ = [
    "adaptive_aggregate",
    "aggregate",
    "blended_attention",
    "knn",
    "lof",
    "lof_scores",
    "norm_scores",
    "outlier_mask",
    "repair",
    "similarity",
]
