"""The published settings of SC-CLIP, and the rule that scales them to other depths."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..calibration import Settings, check_settings, scaled_index, stage_names
from ..ops import _check


@dataclass(frozen=True)
class SCCLIPConfig(Settings):
    """Settings of SC-CLIP (Bai et al., arXiv 2411.15869); the defaults are those for ViT-B.

    Layer indices are 0-based. Index i stands for the output of block i, and the output of the last
    block has no index.

    Attributes:
        outlier_n_neighbors: k of the Local Outlier Factor; images of no more than k patches are not
            repaired. More than k similar artefacts are a cluster of their own, in which LOF finds
            no outlier.
        outlier_contamination: share of the tokens that are marked as outliers, in (0, 0.5].
        outlier_score: "lof", as published; "norm", for the norm of a token over the median norm,
            which finds similar artefacts however many there are; "either", for the outliers of
            both.
        pre_adjust_idx: the layer whose similarity aggregates the tokens before the last block and
            guides the attention of the last block.
        post_adjust_idx: the layer whose similarity aggregates the tokens after the last block.
        multi_start_idx, multi_end_idx: the auxiliary branch sums layers start, ..., end - 1.
        beta: smallest cosine similarity at which tokens are aggregated.
        res_cls: weight of the class token that is added to every patch token.
        gamma: sharpness of the content attention, >= 0.
        alpha: share of the content attention in the last block, in [0, 1].
        self_attention: "kk" for the keys with the keys, as published; "qk" for queries with keys.
        repair: replace outlier tokens by the mean of their neighbours.
        pre_aggregate: aggregate before the last block.
        content_attention: blend the content attention with the self-attention of the last block;
            without it the last block has its self-attention alone.
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

        12 blocks are the published ViT-B, 24 the authors' ViT-L/14 (issue 5 of their repository).
        No settings were published for other depths. There each index is scaled from the nearer of
        the two: `multi_start_idx` as the number of blocks before the auxiliary branch, the others
        by `scaled_index`.

        Raises:
            ValueError: there are fewer than two blocks, so that no block comes before the last.
        """
        if layers < 2:
            raise ValueError(f"SC-CLIP needs at least 2 blocks, got a tower of {layers}")
        depth, published = (12, cls()) if layers < 18 else (24, _VIT_L)
        start = min(round(published.multi_start_idx * layers / depth), layers - 2)
        return replace(
            published,
            pre_adjust_idx=scaled_index(published.pre_adjust_idx, depth, layers),
            post_adjust_idx=scaled_index(published.post_adjust_idx, depth, layers),
            multi_start_idx=start,
            multi_end_idx=max(scaled_index(published.multi_end_idx - 1, depth, layers), start) + 1,
        )

    def check(self, layers: int) -> None:
        """Raise unless every setting fits a vision transformer of that many blocks.

        Raises:
            TypeError: a setting has another type.
            ValueError: a setting is out of its range.
        """
        check_settings(self, layers, f"{layers} blocks")
        _check.choice("self_attention", self.self_attention, ("kk", "qk"))
        _check.number("beta", self.beta)
        _check.number("res_cls", self.res_cls)
        _check.number("alpha", self.alpha, 0, 1)


STAGES = stage_names(SCCLIPConfig)
_VIT_L = SCCLIPConfig(
    pre_adjust_idx=16, post_adjust_idx=6, multi_start_idx=8, multi_end_idx=19, res_cls=0.1
)
