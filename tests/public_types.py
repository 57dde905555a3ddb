"""The types of the public API, for `make lint` to check. Nothing runs this file."""

import numpy as np
from torch import Tensor
from typing_extensions import assert_type

import scclip_fast as sf
from scclip_fast import dropin
from scclip_fast.clip import SCCLIPConfig
from scclip_fast.segment import Segmenter
from scclip_fast.sklearn import LocalOutlierFactor

Pair = tuple[Tensor, Tensor]


def ops(x: Tensor, mask: Tensor, grid: tuple[int, int]) -> None:
    with sf.backend("torch"):
        assert_type(sf.knn(x, 5, check_finite=True), Pair)
        assert_type(sf.knn(x, 5, x, "cosine"), Pair)
        assert_type(sf.lof(x, n_neighbors=5, contamination=0.1, variant="breunig"), Pair)
        assert_type(sf.lof_scores(x, 5, backend=None), Tensor)
        assert_type(sf.norm_scores(x, check_finite=False), Tensor)
        assert_type(sf.outlier_mask(x, 0.1), Tensor)
        assert_type(sf.repair(x, mask, grid), Tensor)
        assert_type(sf.similarity(x, beta=0.4, normalize=False), Tensor)
        assert_type(sf.aggregate(x, x, 0.4, backend="triton"), Tensor)
        assert_type(sf.adaptive_aggregate(x, x), Tensor)
        assert_type(sf.content_attention(x, x, 3.0, ("mean", 1.2)), Tensor)
        assert_type(sf.blended_attention(x, x, x, x, 3.0, 0.5, scale=None), Tensor)
        assert_type(sf.upsampled_labels(x, (6, 8), backend=None), Pair)


def published(x: Tensor) -> None:
    assert_type(dropin.lof_pytorch(x, n_neighbors=30, contamination=0.05), Pair)
    assert_type(dropin.detect_outlier_patches(x), Pair)
    assert_type(dropin.adaptively_aggregate(x, x), Tensor)
    assert_type(dropin.adaptive_aggregate(x, similarity_matrix=x), Tensor)
    assert_type(dropin.mean_interpolation(x, [(0, 1)]), Tensor)


def classes(segmenter: Segmenter, image: Tensor, array: np.ndarray) -> None:
    assert_type(segmenter.probabilities(image), Tensor)
    assert_type(segmenter.classes, list[str])
    assert_type(SCCLIPConfig().repair, bool)
    estimator = LocalOutlierFactor(20, metric="cosine", novelty=True).fit(array)
    assert_type(estimator, LocalOutlierFactor)
    assert_type(estimator.n_neighbors, int)
