"""transformers' outputs with what the calibration found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)


@dataclass
class CalibratedVisionOutput(Sam3VisionEncoderOutput):
    """`Sam3VisionEncoderOutput` of a calibrated trunk; None where the trunk is not calibrated.

    Attributes:
        outlier_mask: (B, h, w) bool, the outliers among the tokens.
        lof_scores: (B, h, w) float32, None with outlier_score="norm".
        calibrated_features: (B, h w, D), the trunk's output, which is also `last_hidden_state`.
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
        """(M, 2) rows of (image, token), counted row by row; waits for the GPU."""
        return None if self.outlier_mask is None else self.outlier_mask.flatten(1).nonzero()
