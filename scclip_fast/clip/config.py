"""The published settings of SC-CLIP, and the rule for models that it was not published for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..calibration import SCORES
from ..ops import _check


@dataclass(frozen=True)
class SCCLIPConfig:
    """Settings of SC-CLIP (Bai et al., arXiv 2411.15869); the defaults are those for ViT-B.

    Layer indices are 0-based: feature i is what block i gives, and the last block gives none.

    Attributes:
        outlier_n_neighbors: k of the Local Outlier Factor; images of no more than k patches are not
            repaired. More than k artefacts that are alike are a cluster of their own, in which LOF
            finds none.
        outlier_contamination: share of the tokens taken for outliers, in (0, 0.5].
        outlier_score: "lof", as published; "norm", for the norm of a token over the median norm,
            which finds alike artefacts however many; "either", for the outliers of both.
        pre_adjust_idx: the layer whose similarity aggregates before the last block and guides its
            attention.
        post_adjust_idx: the layer whose similarity aggregates after it.
        multi_start_idx, multi_end_idx: the layers start, ..., end - 1 make the auxiliary branch.
        beta: cosine similarity from which on tokens are aggregated.
        res_cls: weight of the class token that is added to every patch token.
        gamma: sharpness of the content attention, >= 0.
        alpha: share of the content attention in the last block, in [0, 1].
        self_attention: "kk" for the keys with the keys, as published; "qk" for queries with keys.
        repair: replace outlier tokens by their neighbours.
        pre_aggregate: aggregate before the last block.
        content_attention: blend the content attention in; without it the last block sees only its
            self-attention.
        post_aggregate: aggregate after the last block.
        multi_level: add the auxiliary branch.
    """

    outlier_n_neighbors: int = 30
    outlier_contamination: float = 0.05
    outlier_score: str = "lof"
    pre_adjust_idx: int = 8
    post_adjust_idx: int = 3
    multi_start_idx: int = 3
    multi_end_idx: int = 10
    beta: float = 0.4
    res_cls: float = 0.3
    gamma: float = 3.0
    alpha: float = 0.5
    self_attention: str = "kk"
    repair: bool = True
    pre_aggregate: bool = True
    content_attention: bool = True
    post_aggregate: bool = True
    multi_level: bool = True

    @classmethod
    def for_depth(cls, layers: int) -> SCCLIPConfig:
        """The settings for a vision transformer of that many blocks.

        12 is the published ViT-B, 24 the authors' ViT-L/14 (issue 5 of their repository). Nothing
        was published for other depths: there each index, counted in finished blocks, is scaled from
        the nearer of the two.

        Raises:
            ValueError: fewer than two blocks, so that there is no feature before the last.
        """
        if layers < 2:
            raise ValueError(f"SC-CLIP needs at least 2 blocks, got a tower of {layers}")
        depth, published = (12, cls()) if layers < 18 else (24, _VIT_L)
        if layers == depth:
            return published

        def scaled(blocks: int) -> int:
            return round(blocks * layers / depth)

        last = layers - 2
        start = min(scaled(published.multi_start_idx), last)
        return replace(
            published,
            pre_adjust_idx=min(max(scaled(published.pre_adjust_idx + 1) - 1, 0), last),
            post_adjust_idx=min(max(scaled(published.post_adjust_idx + 1) - 1, 0), last),
            multi_start_idx=start,
            multi_end_idx=min(max(scaled(published.multi_end_idx), start + 1), last + 1),
        )

    def check(self, layers: int) -> None:
        """Raise unless every setting fits a vision transformer of that many blocks.

        Raises:
            TypeError: a setting of another type.
            ValueError: one out of its range.
        """
        features = layers - 1
        for name in ("pre_adjust_idx", "post_adjust_idx", "multi_start_idx"):
            _check.integer(name, getattr(self, name), 0, features - 1, f" for {layers} blocks")
        start = self.multi_start_idx
        why = f" for {layers} blocks and multi_start_idx={start}"
        _check.integer("multi_end_idx", self.multi_end_idx, start + 1, features, why)
        _check.choice("self_attention", self.self_attention, ("kk", "qk"))
        _check.integer("outlier_n_neighbors", self.outlier_n_neighbors, 1)
        _check.contamination(self.outlier_contamination, "outlier_contamination")
        _check.choice("outlier_score", self.outlier_score, SCORES)
        _check.number("beta", self.beta)
        _check.number("res_cls", self.res_cls)
        _check.number("gamma", self.gamma, 0)
        _check.number("alpha", self.alpha, 0, 1)
        for field in fields(self):
            if isinstance(field.default, bool):
                _check.switch(field.name, getattr(self, field.name))


_VIT_L = SCCLIPConfig(
    pre_adjust_idx=16, post_adjust_idx=6, multi_start_idx=8, multi_end_idx=19, res_cls=0.1
)
