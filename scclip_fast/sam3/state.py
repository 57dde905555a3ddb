"""The tensors that the modules of a calibrated SAM3 pass to each other within one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from .config import Sam3CalibrationConfig

TRUNK_RESULTS = ("outlier_mask", "lof_scores", "calibrated_features")


@dataclass
class ForwardState:
    """One object for all modules of a calibrated model.

    Its tensors are None before and after each forward pass of the model or its vision encoder.

    Attributes:
        config: settings of the calibration.
        pre, post: (B, N, D), outputs of `config.pre_layer` and `config.post_layer`.
        level_sum: (B, N, D), sum of the outputs of `config.fused_layers`.
        content: (B, N, D), features of the content attention. Meta's last block takes no keywords,
            so its attention reads them here.
        outlier_mask: (B, h, w) bool, see `CalibratedVisionOutput`.
        lof_scores: (B, h, w).
        calibrated_features: (B, N, D).
        query_features: (L, B, Q, C), object queries after each layer of the DETR decoder.
        query_norms, pixel_norms: (B, Q) and (B, h, w), for `stages.threshold_logits`.
    """

    config: Sam3CalibrationConfig
    pre: Tensor | None = None
    post: Tensor | None = None
    level_sum: Tensor | None = None
    content: Tensor | None = None
    outlier_mask: Tensor | None = None
    lof_scores: Tensor | None = None
    calibrated_features: Tensor | None = None
    query_features: Tensor | None = None
    query_norms: Tensor | None = None
    pixel_norms: Tensor | None = None

    def keep(self, index: int, output: Tensor) -> Tensor:
        """Keep the output (B, h, w, D) of trunk layer `index`, if the last layer reads it."""
        config, tokens = self.config, output.flatten(1, 2)
        if index == config.pre_layer:
            self.pre = tokens
        if index == config.post_layer:
            self.post = tokens
        if index in config.fused_layers:
            first = index == config.multi_start_idx
            self.level_sum = tokens if first else self.level_sum + tokens
        return output

    def trunk_results(self) -> dict[str, Tensor | None]:
        """The tensors of `TRUNK_RESULTS` by name, for the output of the vision encoder."""
        return {name: getattr(self, name) for name in TRUNK_RESULTS}

    def clear(self) -> None:
        """Drop every tensor. Callers do so after an error, too."""
        for name in _TENSORS:
            setattr(self, name, None)


_TENSORS = tuple(field.name for field in fields(ForwardState) if field.name != "config")
