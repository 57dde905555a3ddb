"""transformers' outputs with the results of the calibration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)


@dataclass
class CalibratedVisionOutput(Sam3VisionEncoderOutput):
    """`Sam3VisionEncoderOutput` with fields that are None if the trunk is not calibrated:

    Attributes:
        outlier_mask: (B, h, w) bool, True for an outlier among the tokens.
        lof_scores: (B, h, w) float32, None with outlier_score="norm".
        calibrated_features: (B, h w, D), the trunk's output, equal to `last_hidden_state`.
    """

    outlier_mask: Tensor | None = None
    lof_scores: Tensor | None = None
    calibrated_features: Tensor | None = None


@dataclass
class CalibratedSegmentationOutput(Sam3ImageSegmentationOutput):
    """`Sam3ImageSegmentationOutput` with the fields of `CalibratedVisionOutput`, and:

    Attributes:
        query_features: (L, B, Q, C), the object queries after each decoder layer, normalised.
    """

    outlier_mask: Tensor | None = None
    lof_scores: Tensor | None = None
    calibrated_features: Tensor | None = None
    query_features: Tensor | None = None

    @property
    def outlier_indices(self) -> Tensor | None:
        """(M, 2) rows of (image, token), with tokens counted row by row. It waits for the GPU."""
        return None if self.outlier_mask is None else self.outlier_mask.flatten(1).nonzero()


def extended(kind: type, out: Any, results: dict[str, Tensor | None]) -> Any:
    """Converts an output of transformers to `kind`, which adds fields. Tuples stay as they are."""
    if isinstance(out, tuple):
        return out
    return kind(**{f.name: getattr(out, f.name) for f in fields(out)}, **results)
