"""The dictionary that the design document (10.1) asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def to_seed_dict(output: Mapping[str, Any]) -> dict[str, Any]:
    """The design document's dictionary, of a calibrated model's output.

    Args:
        output: of a calibrated Sam3Model, or of `forward_grounding` of a calibrated Sam3Image.

    Returns:
        pred_logits: (L, B, 200, 256), the object queries after each of the L = 6 decoder layers
            (`query_features`); SAM3's classification logits are `output["pred_logits"]`.
        pred_boxes: (L, B, 200, 4), the reference boxes of each decoder layer as (cx, cy, w, h) in
            [0, 1]; the final boxes are `output["pred_boxes"]`.
        pred_masks: (B, 200, 288, 288) logits.
        semantic_seg: (B, 1, 288, 288) logits.
        presence_logit: (B, 1). These three are None of a Sam3Image that is built without them.
        outlier_indices: (M, 2) rows of (image, token), or None without `trunk_repair`.
        calibrated_features: (B, 5184, 1024), or None where the trunk is not calibrated.

    Raises:
        TypeError: the output is not that of a calibrated model.
    """
    if not isinstance(output, Mapping) or "query_features" not in output:
        raise TypeError(
            "output must be that of a calibrated Sam3Model or Sam3Image, got "
            f"{type(output).__name__}; call calibrate(model) first"
        )
    mask = output.get("outlier_mask")
    return dict(
        pred_logits=output["query_features"],
        pred_boxes=output["decoder_reference_boxes"],
        pred_masks=output.get("pred_masks"),
        semantic_seg=output.get("semantic_seg"),
        presence_logit=output.get("presence_logits", output.get("presence_logit_dec")),
        outlier_indices=None if mask is None else mask.flatten(1).nonzero(),
        calibrated_features=output.get("calibrated_features"),
    )
