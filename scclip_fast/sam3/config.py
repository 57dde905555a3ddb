"""The settings of the calibration of a SAM3, and the rule that scales them to other depths."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import Settings, check_settings, scaled_index, stage_names
from ..ops import _check


@dataclass(frozen=True)
class Sam3CalibrationConfig(Settings):
    """Settings of SC-CLIP's stages (Bai et al., arXiv 2411.15869) in a SAM3; `stages.py` runs them.

    Layer indices are 0-based. Index i stands for the output of layer i of the trunk. The defaults
    are for SAM3's 32 layers, at the relative depths that SC-CLIP uses: the repair comes after layer
    30, before the last layer, 31. Nothing was published for SAM3.

    Attributes:
        outlier_n_neighbors: k of the Local Outlier Factor; images of no more than k tokens are not
            repaired, and no more than k queries are not calibrated. More than k similar artefacts
            are a cluster of their own, in which LOF finds no outlier.
        outlier_contamination: share of the tokens that are marked as outliers, in (0, 0.5].
        outlier_score: "lof", as published; "norm", for the norm of a token over the median norm,
            which finds similar artefacts however many there are; "either", for the outliers of
            both.
        pre_adjust_idx: the layer whose similarity aggregates the tokens before the last layer and
            guides the attention of the last layer.
        post_adjust_idx: the layer whose similarity aggregates the tokens after the last layer.
        multi_start_idx, multi_end_idx: the fused branch is the mean of layers start, ..., end - 1.
        similarity_beta: smallest cosine similarity, in [-1, 1], at which tokens or queries are
            aggregated and, with mask_threshold, at which a pixel keeps its logit.
        residual_weight: weight, in [0, 1], of the calibrated tokens in every blend of the trunk and
            of cross_attention. It is small because the modules after the trunk were trained on the
            frozen trunk. At 0 the trunk is the frozen one, bit for bit.
        gamma: sharpness of the content attention, >= 0.
        decoder_layers: the layers of the DETR decoder after which queries are calibrated; -1 is the
            last, whose queries refine no boxes of later layers.
        mask_grid: "pixels" repairs the pixel features that are multiplied with the queries (82,944
            of them at 1008 pixels), "tokens" the 72 x 72 tokens that enter the pixel decoder.
        trunk_repair: replace outlier tokens before the last layer by the mean of their neighbours.
        trunk_aggregate: aggregate before and after the last layer.
        trunk_attention: blend the content attention into the attention of the last layer.
        trunk_fusion: blend in the output of the last layer for the fused branch.
        cross_attention: in every layer of the DETR encoder, average the attention of an image token
            to the prompt over the image tokens that are similar to it.
        decoder_calibration: aggregate the object queries of images that have outliers among them.
            The queries lose some of their diversity, which a detector without non-maximum
            suppression depends on.
        mask_repair: repair outliers of the mask head's features.
        mask_threshold: set a logit to 0 where the cosine of query and pixel is below
            similarity_beta. The design document compares the raw dot product, which depends on the
            lengths of both. A logit of 0 is a probability of one half: background rises to it and
            foreground is lost, so the stage is for experiments only.
    """

    outlier_n_neighbors: int = 30
    outlier_contamination: float = 0.05
    outlier_score: str = "lof"
    pre_adjust_idx: int = 23
    post_adjust_idx: int = 7
    multi_start_idx: int = 15
    multi_end_idx: int = 24
    similarity_beta: float = 0.4
    residual_weight: float = 0.3
    gamma: float = 3.0
    decoder_layers: tuple[int, ...] = (-1,)
    mask_grid: str = "pixels"
    trunk_repair: bool = True
    trunk_aggregate: bool = True
    trunk_attention: bool = True
    trunk_fusion: bool = True
    cross_attention: bool = False
    decoder_calibration: bool = False
    mask_repair: bool = False
    mask_threshold: bool = False

    @classmethod
    def seed(cls) -> Sam3CalibrationConfig:
        """The literal indices of the design document: layers 6, 2 and 2 to 7 of the trunk."""
        return cls(pre_adjust_idx=6, post_adjust_idx=2, multi_start_idx=2, multi_end_idx=8)

    @classmethod
    def for_depth(cls, layers: int) -> Sam3CalibrationConfig:
        """The defaults, scaled by `scaled_index` from 32 layers to a trunk of that many.

        Raises:
            ValueError: there are fewer than two layers, so that no layer comes before the last.
        """
        if layers < 2:
            raise ValueError(f"the calibration needs at least 2 layers, got a trunk of {layers}")
        start = scaled_index(cls.multi_start_idx, 32, layers)
        return cls(
            pre_adjust_idx=scaled_index(cls.pre_adjust_idx, 32, layers),
            post_adjust_idx=scaled_index(cls.post_adjust_idx, 32, layers),
            multi_start_idx=start,
            multi_end_idx=max(scaled_index(cls.multi_end_idx - 1, 32, layers), start) + 1,
        )

    @property
    def calibrates_trunk(self) -> bool:
        """Whether a stage changes the trunk."""
        return self.residual_weight > 0 and any(getattr(self, name) for name in TRUNK_STAGES)

    @property
    def pre_layer(self) -> int | None:
        """`pre_adjust_idx`, or None if no stage reads that layer."""
        return self.pre_adjust_idx if self.trunk_aggregate or self.trunk_attention else None

    @property
    def post_layer(self) -> int | None:
        """`post_adjust_idx`, or None if no stage reads that layer."""
        return self.post_adjust_idx if self.trunk_aggregate else None

    @property
    def fused_layers(self) -> range:
        """Layers whose mean is the fused branch; none without `trunk_fusion`."""
        return range(self.multi_start_idx, self.multi_end_idx) if self.trunk_fusion else range(0)

    @property
    def kept_layers(self) -> set[int]:
        """Layers of the trunk whose outputs are kept for the last layer."""
        return {self.pre_layer, self.post_layer, *self.fused_layers} - {None}

    @property
    def repaired_grid(self) -> str | None:
        """`mask_grid`, or None without `mask_repair`."""
        return self.mask_grid if self.mask_repair else None

    def check(self, layers: int, decoder_layers: int) -> None:
        """Raise unless every setting fits a trunk and a DETR decoder of that many layers.

        Raises:
            TypeError: a setting has another type.
            ValueError: a setting is out of its range.
        """
        hint = f" (for_depth({layers}) gives indices that fit)"
        check_settings(self, layers, f"a trunk of {layers} layers", hint)
        if not isinstance(self.decoder_layers, tuple):
            raise TypeError(f"decoder_layers must be a tuple, got {self.decoder_layers!r}")
        for index in self.decoder_layers:
            _check.integer("decoder_layers", index, -decoder_layers, decoder_layers - 1)
        _check.choice("mask_grid", self.mask_grid, ("pixels", "tokens"))
        _check.number("similarity_beta", self.similarity_beta, -1, 1)
        _check.number("residual_weight", self.residual_weight, 0, 1)


STAGES = stage_names(Sam3CalibrationConfig)
TRUNK_STAGES = tuple(name for name in STAGES if name.startswith("trunk_"))
