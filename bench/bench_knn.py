"""The nearest neighbours under the Local Outlier Factor: k = 30."""

from __future__ import annotations

from functools import cache, partial

import harness
import pytest
import torch
from torch import Tensor

import scclip_fast as sf

K = 30


def cdist_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(x, x)
    distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    distances, indices = distances.topk(K, largest=False)
    return distances.square(), indices


def matmul_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks by ||x_j||^2 - 2 x_i x_j, which is the squared distance less ||x_i||^2."""
    norms = x.square().sum(dim=-1)
    partial_distances = torch.baddbmm(norms.unsqueeze(1), x, x.mT, alpha=-2)
    partial_distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    distances, indices = partial_distances.topk(K, largest=False)
    return distances + norms.unsqueeze(-1), indices


def sklearn_neighbors(x: Tensor) -> tuple[Tensor, Tensor]:
    neighbors = pytest.importorskip("sklearn.neighbors")
    search = neighbors.NearestNeighbors(n_neighbors=K, algorithm="brute")
    results = [search.fit(image).kneighbors() for image in x.numpy()]
    distances, indices = (torch.stack([torch.from_numpy(r[i]) for r in results]) for i in (0, 1))
    return distances.square(), indices


COMMON = {
    "scclip_fast torch": partial(sf.knn, k=K, backend="torch"),
    "matmul + topk": matmul_topk,
    "cdist + topk": cdist_topk,
}
PROVIDERS = {
    "cpu": COMMON | {"scikit-learn": sklearn_neighbors},
    "cuda": {"scclip_fast triton": partial(sf.knn, k=K, backend="triton")} | COMMON,
}

MATRICES = {"matmul + topk": 2, "cdist + topk": 2}  # N x N: the distances, and one more for topk


@cache
def expected(device: str, shape: harness.Shape) -> Tensor:
    return sf.knn(harness.tokens(device, shape, "float32"), K, backend="torch")[1]


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float32"))
def test_knn(device, shape, dtype, provider, race):
    x = harness.tokens(device, shape, dtype)
    race(
        partial(PROVIDERS[device][provider], x),
        check=lambda out: harness.assert_same_neighbors(out[1], expected(device, shape), x),
        extra_bytes=harness.matrices(MATRICES.get(provider, 0), shape, dtype),
    )
