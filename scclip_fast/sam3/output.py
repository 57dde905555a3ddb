"""transformers' outputs with what the calibration found, and the design document's dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        lof_scores: (B, h, w) float32.
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


def to_seed_dict(output: CalibratedSegmentationOutput) -> dict[str, Any]:
    """The dictionary that the design document (10.1) asks for, of a calibrated model's output.

    Returns:
        pred_logits: (L, B, 200, 256), the object queries after each of the L = 6 decoder layers
            (`query_features`); SAM3's classification logits (B, 200) are `output.pred_logits`.
        pred_boxes: (L, B, 200, 4), the reference boxes of each decoder layer as (cx, cy, w, h) in
            [0, 1]; the final boxes, as corners, are `output.pred_boxes`.
        pred_masks: (B, 200, 288, 288) logits.
        semantic_seg: (B, 1, 288, 288) logits.
        presence_logit: (B, 1).
        outlier_indices: (M, 2) rows of (image, token), or None without `trunk_repair`.
        calibrated_features: (B, 5184, 1024), or None where the trunk is not calibrated.

    Raises:
        TypeError: the output is not that of a calibrated model.
    """
    if not isinstance(output, CalibratedSegmentationOutput):
        raise TypeError(
            f"output must be that of a calibrated Sam3Model, got {type(output).__name__}; call "
            "calibrate(model) first"
        )
    return dict(
        pred_logits=output.query_features,
        pred_boxes=output.decoder_reference_boxes,
        pred_masks=output.pred_masks,
        semantic_seg=output.semantic_seg,
        presence_logit=output.presence_logits,
        outlier_indices=output.outlier_indices,
        calibrated_features=output.calibrated_features,
    )
