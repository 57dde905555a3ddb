"""Local Outlier Factor: k = 30, 5 % outliers."""

from __future__ import annotations

from functools import cache, partial

import bench_knn
import harness
import published_lof
import pytest
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

K = bench_knn.K
CONTAMINATION = 0.05
PARAMETERS = {"n_neighbors": K, "contamination": CONTAMINATION}


def published(x: Tensor) -> tuple[Tensor, Tensor]:
    """Applies SC-CLIP's function, which takes one image, to one image after the other."""
    outliers, scores = zip(*(published_lof.lof(image, **PARAMETERS) for image in x), strict=True)
    return torch.cat(outliers), torch.stack(scores)


def sklearn_lof(x: Tensor) -> tuple[Tensor, Tensor]:
    neighbors = pytest.importorskip("sklearn.neighbors")
    detector = neighbors.LocalOutlierFactor(K, algorithm="brute", contamination=CONTAMINATION)
    outliers, scores = [], []
    for image in x.numpy():
        outliers.append(torch.from_numpy(detector.fit_predict(image)).eq(-1).nonzero())
        scores.append(torch.from_numpy(-detector.negative_outlier_factor_))
    return torch.cat(outliers), torch.stack(scores)


def lof_from(search, x: Tensor) -> tuple[Tensor, Tensor]:
    mask, scores = mask_from(search, x)
    return mask.nonzero(), scores


def mask_from(search, x: Tensor) -> tuple[Tensor, Tensor]:
    distances, indices = search(x)
    scores = reference.simplified_lof(distances[..., -1], indices)
    return reference.outlier_mask(scores, CONTAMINATION), scores


def compiled_lof(x: Tensor) -> tuple[Tensor, Tensor]:
    mask, scores = _compiled(bench_knn.matmul_topk, x)
    return mask.nonzero(), scores


def self_product(x: Tensor) -> Tensor:
    """Computes the one matrix product that all others contain, as a scale; finds no outliers."""
    return x @ x.mT


_compiled = torch.compile(mask_from, dynamic=False, fullgraph=True)

COMMON = {
    "scclip_fast torch": partial(sf.lof, backend="torch", **PARAMETERS),
    "x @ x.T": self_product,
    "published": published,
    "matmul + topk": partial(lof_from, bench_knn.matmul_topk),
    "cdist + topk": partial(lof_from, bench_knn.cdist_topk),
    "torch.compile": compiled_lof,
}
BREUNIG = {
    "scclip_fast torch, Breunig": partial(sf.lof, backend="torch", variant="breunig", **PARAMETERS),
    "scikit-learn": sklearn_lof,
}
PROVIDERS = {
    "cpu": COMMON | BREUNIG,
    "cuda": {"scclip_fast triton": partial(sf.lof, backend="triton", **PARAMETERS)} | COMMON,
}

# N x N matrices held at once: topk takes up to one more, and a round of x @ x.T starts while the
# result of the last round is still there.
MATRICES = bench_knn.MATRICES | {"x @ x.T": 2, "torch.compile": 2}


def extra_bytes(provider: str, shape: harness.Shape, dtype: str) -> int:
    if provider == "published":  # the difference and its norm, of one image
        return harness.matrices(shape[2] + 1, (1, *shape[1:]), dtype)
    return harness.matrices(MATRICES.get(provider, 0), shape, dtype)


@cache
def expected(device: str, shape: harness.Shape, variant: str) -> tuple[Tensor, Tensor]:
    x = harness.tokens(device, shape, "float32")
    return sf.lof(x, variant=variant, backend="torch", **PARAMETERS)


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float32"))
def test_lof(device, shape, dtype, provider, race):
    def check(out):
        variant = "breunig" if provider in BREUNIG else "scclip"
        harness.assert_same_outliers(out, expected(device, shape, variant))

    race(
        partial(PROVIDERS[device][provider], harness.tokens(device, shape, dtype)),
        check=None if provider == "x @ x.T" else check,
        extra_bytes=extra_bytes(provider, shape, dtype),
    )
