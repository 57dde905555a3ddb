"""The scores of `scclip-fast lof` as data: JSON and NumPy's format."""

from __future__ import annotations

import io
import math

import numpy as np
import torch

from .. import __version__
from ..measure import Measurement
from .lof_demo import Comparison


def report(comparisons: list[Comparison], settings: dict) -> dict:
    """All numbers of a run, for `files.encode_json`.

    Rows and columns are those of the patches, from the upper left one on.
    """
    return {
        "settings": settings,
        "versions": {"scclip_fast": __version__, "torch": torch.__version__},
        "sizes": [_size(comparison) for comparison in comparisons],
    }


def _size(comparison: Comparison) -> dict:
    return {
        "size": comparison.size,
        "grid": list(comparison.grid),
        "scores": _grid(comparison).tolist(),
        "outliers": comparison.mask.cpu().unflatten(0, comparison.grid).nonzero().tolist(),
        "scclip_fast": _measured(comparison.ours, comparison.our_error),
        "matmul_topk": _measured(comparison.plain, comparison.plain_error),
        "shared_outliers": comparison.shared_outliers,
    }


def _measured(run: Measurement, error: float) -> dict:
    known = error if math.isfinite(error) else None  # matmul's is NaN where patches are equal
    return {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "largest_relative_error": known}


def encode_npy(comparison: Comparison) -> bytes:
    """The scores (rows, columns), float32, as a .npy file."""
    file = io.BytesIO()
    np.save(file, _grid(comparison))
    return file.getvalue()


def _grid(comparison: Comparison) -> np.ndarray:
    return comparison.scores.float().cpu().unflatten(0, comparison.grid).numpy()
