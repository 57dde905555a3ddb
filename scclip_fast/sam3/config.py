"""The settings of the calibration of a SAM3, and the rule for trunks of other depths."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import SCORES
from ..ops import _check

TRUNK_STAGES = ("trunk_repair", "trunk_aggregate", "trunk_attention", "trunk_fusion")
OTHER_STAGES = ("cross_attention", "decoder_calibration", "mask_repair", "mask_threshold")
STAGES = TRUNK_STAGES + OTHER_STAGES


@dataclass(frozen=True)
class Sam3CalibrationConfig:
    """Settings of SC-CLIP's stages (Bai et al., arXiv 2411.15869) in a SAM3; `stages.py` runs them.

    Layer indices are 0-based: feature i is what layer i of the trunk gives. The defaults are for
    SAM3's 32 layers, the fractions of the depth that SC-CLIP uses: repair after layer 30, where the
    last layer, 31, begins. Nothing was published for SAM3.

    Attributes:
        outlier_n_neighbors: k of the Local Outlier Factor; images of no more than k tokens are not
            repaired, and no more than k queries not calibrated. More than k artefacts that are
            alike are a cluster of their own, in which LOF finds none.
        outlier_contamination: share of the tokens taken for outliers, in (0, 0.5].
        outlier_score: "lof", as published; "norm", for the norm of a token over the median norm,
            which finds alike artefacts however many; "either", for the outliers of both.
        pre_adjust_idx: the layer whose similarity aggregates before the last layer and guides its
            attention.
        post_adjust_idx: the layer whose similarity aggregates after it.
        multi_start_idx, multi_end_idx: the layers start, ..., end - 1 make the fused branch.
        similarity_beta: cosine similarity, in [-1, 1], from which on tokens or queries are
            aggregated and, with mask_threshold, a pixel keeps its logit.
        residual_weight: how far every stage of the trunk, and cross_attention, moves its tokens,
            in [0, 1]: what follows was trained on the frozen trunk. At 0 the trunk is the frozen
            one, bit for bit.
        gamma: sharpness of the content attention.
        decoder_layers: after which layers of the DETR decoder queries are calibrated; -1 is the
            last, whose queries refine no boxes of later layers.
        mask_grid: "pixels" repairs the pixel features that meet the queries (82,944 of them at
            1008 pixels), "tokens" the 72 x 72 tokens that the pixel decoder starts from.
        trunk_repair: replace outlier tokens before the last layer by their neighbours.
        trunk_aggregate: aggregate before and after the last layer.
        trunk_attention: blend the content attention into the last layer's.
        trunk_fusion: blend in what the last layer makes of the mean of the middle layers.
        cross_attention: in every layer of the DETR encoder, average the attention of an image token
            to the prompt with that of the tokens that look like it.
        decoder_calibration: aggregate object queries, where there are outliers among them. It takes
            from the queries some of their diversity, which a detector without NMS lives on.
        mask_repair: repair outliers of the mask head's features.
        mask_threshold: a logit becomes 0 where the cosine of query and pixel is below beta. The
            design document compares the raw dot product with beta, which depends on the lengths of
            both. A logit of 0 is a probability of one half: background rises to it and foreground
            is lost, so it is for experiments only.
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
        """The defaults, scaled from 32 layers, counted when they are finished, to that many.

        Raises:
            ValueError: fewer than two layers, so that there is no feature before the last.
        """
        if layers < 2:
            raise ValueError(f"the calibration needs at least 2 layers, got a trunk of {layers}")
        last = layers - 2

        def index(of_32: int) -> int:
            return min(max(round((of_32 + 1) * layers / 32) - 1, 0), last)

        start = index(cls.multi_start_idx)
        return cls(
            pre_adjust_idx=index(cls.pre_adjust_idx),
            post_adjust_idx=index(cls.post_adjust_idx),
            multi_start_idx=start,
            multi_end_idx=max(index(cls.multi_end_idx - 1), start) + 1,
        )

    @property
    def calibrates_trunk(self) -> bool:
        return self.residual_weight > 0 and any(getattr(self, name) for name in TRUNK_STAGES)

    @property
    def taps(self) -> dict[str, range]:
        """What the trunk's last layer reads of others: the output of one, the sum of several."""
        pre, post = self.pre_adjust_idx, self.post_adjust_idx
        taps = {}
        if self.trunk_aggregate or self.trunk_attention:
            taps["pre"] = range(pre, pre + 1)
        if self.trunk_aggregate:
            taps["post"] = range(post, post + 1)
        if self.trunk_fusion:
            taps["levels"] = range(self.multi_start_idx, self.multi_end_idx)
        return taps

    @property
    def repaired_grid(self) -> str | None:
        return self.mask_grid if self.mask_repair else None

    def check(self, layers: int, decoder_layers: int) -> None:
        """Raise unless every setting fits a trunk and a DETR decoder of that many layers.

        Raises:
            TypeError: a setting of another type.
            ValueError: one out of its range.
        """
        features = layers - 1
        why = f" for a trunk of {layers} layers (for_depth({layers}) gives indices that fit)"
        for name in ("pre_adjust_idx", "post_adjust_idx", "multi_start_idx"):
            _check.integer(name, getattr(self, name), 0, features - 1, why)
        start = self.multi_start_idx
        why = f" for {layers} layers and multi_start_idx={start}"
        _check.integer("multi_end_idx", self.multi_end_idx, start + 1, features, why)
        if not isinstance(self.decoder_layers, tuple):
            raise TypeError(f"decoder_layers must be a tuple, got {self.decoder_layers!r}")
        for index in self.decoder_layers:
            _check.integer("decoder_layers", index, -decoder_layers, decoder_layers - 1)
        _check.choice("mask_grid", self.mask_grid, ("pixels", "tokens"))
        _check.integer("outlier_n_neighbors", self.outlier_n_neighbors, 1)
        _check.contamination(self.outlier_contamination, "outlier_contamination")
        _check.choice("outlier_score", self.outlier_score, SCORES)
        _check.number("similarity_beta", self.similarity_beta, -1, 1)
        _check.number("residual_weight", self.residual_weight, 0, 1)
        _check.number("gamma", self.gamma, 0)
        for name in STAGES:
            _check.switch(name, getattr(self, name))
