"""Local Outlier Factor and the nearest neighbours under it: k = 30, 5 % outliers."""

from __future__ import annotations

from functools import cache, partial

import harness
import pytest
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

K = 30
CONTAMINATION = 0.05
PARAMETERS = {"n_neighbors": K, "contamination": CONTAMINATION}


def published(x: Tensor) -> tuple[Tensor, Tensor]:
    """SC-CLIP's function, which takes one image, on each of them."""
    outliers, scores = zip(*map(published_image, x), strict=True)
    return torch.cat(outliers), torch.stack(scores)


def published_image(x: Tensor) -> tuple[Tensor, Tensor]:
    """LOF from the explicit difference (N, N, D)."""
    distances = torch.norm(x[:, None] - x[None, :], dim=2, p=2) ** 2
    distances, indices = torch.topk(distances, K + 1, largest=False)
    distances, indices = distances[:, 1:], indices[:, 1:]
    reachability = torch.max(distances, distances[:, -1:].expand_as(distances))
    density = K / torch.nan_to_num(reachability.mean(dim=1), nan=1e-6)
    scores = (density[indices] / density.unsqueeze(1)).mean(dim=1)
    threshold = torch.quantile(scores.to(torch.float32), 1 - CONTAMINATION)
    return torch.where(scores > threshold)[0], scores


def cdist_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(x, x)
    distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    distances, indices = distances.topk(K, largest=False)
    return distances.square(), indices


def matmul_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    """||x_i - x_j||^2 = ||x_i||^2 + ||x_j||^2 - 2 x_i x_j, whose first term ranks nothing."""
    norms = x.square().sum(dim=-1)
    partial_distances = torch.baddbmm(norms.unsqueeze(1), x, x.mT, alpha=-2)
    partial_distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    distances, indices = partial_distances.topk(K, largest=False)
    return distances + norms.unsqueeze(-1), indices


def sklearn_neighbors(x: Tensor) -> tuple[Tensor, Tensor]:
    neighbors = pytest.importorskip("sklearn.neighbors")
    search = neighbors.NearestNeighbors(n_neighbors=K, algorithm="brute")
    found = [search.fit(image).kneighbors() for image in x.numpy()]
    distances, indices = (torch.stack([torch.from_numpy(f[i]) for f in found]) for i in (0, 1))
    return distances.square(), indices


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
    mask, scores = _compiled(matmul_topk, x)
    return mask.nonzero(), scores


def self_product(x: Tensor) -> Tensor:
    """No answer: the one matrix product that all others contain."""
    return x @ x.mT


_compiled = torch.compile(mask_from, dynamic=False, fullgraph=True)

LOF = {
    "scclip_fast torch": partial(sf.lof, backend="torch", **PARAMETERS),
    "x @ x.T": self_product,
    "published": published,
    "matmul + topk": partial(lof_from, matmul_topk),
    "cdist + topk": partial(lof_from, cdist_topk),
    "torch.compile": compiled_lof,
}
BREUNIG = {
    "scclip_fast torch, Breunig": partial(sf.lof, backend="torch", variant="breunig", **PARAMETERS),
    "scikit-learn": sklearn_lof,
}
LOF_PROVIDERS = {
    "cpu": LOF | BREUNIG,
    "cuda": {"scclip_fast triton": partial(sf.lof, backend="triton", **PARAMETERS)} | LOF,
}

KNN = {
    "scclip_fast torch": partial(sf.knn, k=K, backend="torch"),
    "matmul + topk": matmul_topk,
    "cdist + topk": cdist_topk,
}
KNN_PROVIDERS = {
    "cpu": KNN | {"scikit-learn": sklearn_neighbors},
    "cuda": {"scclip_fast triton": partial(sf.knn, k=K, backend="triton")} | KNN,
}

# N x N matrices held at once: topk takes up to one more, and a round of x @ x.T starts while the
# answer of the last one is still there.
MATRICES = {"x @ x.T": 2, "matmul + topk": 2, "cdist + topk": 2, "torch.compile": 2}


def extra_bytes(provider: str, shape: harness.Shape, dtype: str) -> int:
    if provider == "published":  # the difference and its norm, of one image
        return harness.matrices(shape[2] + 1, (1, *shape[1:]), dtype)
    return harness.matrices(MATRICES.get(provider, 0), shape, dtype)


@cache
def outliers(device: str, shape: harness.Shape, variant: str) -> tuple[Tensor, Tensor]:
    x = harness.tokens(device, shape, "float32")
    return sf.lof(x, variant=variant, backend="torch", **PARAMETERS)


@cache
def neighbors(device: str, shape: harness.Shape) -> Tensor:
    return sf.knn(harness.tokens(device, shape, "float32"), K, backend="torch")[1]


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(LOF_PROVIDERS, "float32"))
def test_lof(device, shape, dtype, provider, race):
    x = harness.tokens(device, shape, dtype)

    def check(found):
        variant = "breunig" if provider in BREUNIG else "scclip"
        harness.assert_same_outliers(found, outliers(device, shape, variant))

    race(
        partial(LOF_PROVIDERS[device][provider], x),
        check=None if provider == "x @ x.T" else check,
        extra_bytes=extra_bytes(provider, shape, dtype),
    )


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(KNN_PROVIDERS, "float32"))
def test_knn(device, shape, dtype, provider, race):
    x = harness.tokens(device, shape, dtype)

    def check(found):
        harness.assert_same_neighbors(found[1], neighbors(device, shape), x)

    race(
        partial(KNN_PROVIDERS[device][provider], x),
        check=check,
        extra_bytes=extra_bytes(provider, shape, dtype),
    )
