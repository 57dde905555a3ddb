"""SC-CLIP around a ViT-B/16: what it adds to the forward pass, and what windows in one batch save.

Shapes are (B, H, W): images and their sides in pixels. Random weights, which take as long as any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import harness
import numpy as np
import plain_clip
import pytest
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast.clip import SCCLIP, create_model
from scclip_fast.segment import Segmenter, clip

NAME, WIDTH, PATCH = "ViT-B-16-quickgelu", 768, 16
CLASSES = ["sky", "tree", "building", "road", "person"]
DENSE = ((1, 224, 224), (32, 224, 224), (1, 448, 448), (1, 1008, 1008))


@cache
def loaded(device: str, dtype: str) -> tuple[SCCLIP, Callable]:
    torch.manual_seed(0)
    precision = {"float32": "fp32", "float16": "fp16"}[dtype]
    return create_model(NAME, precision=precision, device=device)


@cache
def images(device: str, shape: harness.Shape) -> Tensor:
    b, height, width = shape
    return torch.randn(b, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)


def published_outliers(x: Tensor, k: int, contamination: float) -> Tensor:
    """By a matrix product, where the published (N, N, D) differences do not fit."""
    norms = x.square().sum(dim=1)
    distances = torch.addmm(norms, x, x.T, alpha=-2).add_(norms[:, None]).fill_diagonal_(torch.inf)
    nearest, neighbors = distances.topk(k, largest=False)
    scores = (nearest[:, -1:] / nearest[:, -1][neighbors]).mean(dim=1)
    return scores > torch.quantile(scores, 1 - contamination)


def published(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """One image after the other, every matrix in memory."""
    return torch.stack([plain_clip.encode_dense(encoder.model, p, encoder.config) for p in pixels])


def published_with_product(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    with mock.patch.object(plain_clip, "lof_outliers", published_outliers):
        return published(encoder, pixels)


def ours(backend: str, encoder: SCCLIP, pixels: Tensor) -> Tensor:
    with sf.backend(backend):
        return encoder.encode_dense(pixels)


def forward(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """All of plain CLIP's vision tower."""
    return SCCLIP(encoder.model, method="clip").encode_dense(pixels)


COMMON = {
    "scclip_fast torch": partial(ours, "torch"),
    "plain CLIP": forward,
    "published": published,
    "published, matmul distances": published_with_product,
}
PROVIDERS = {"cpu": COMMON, "cuda": {"scclip_fast triton": partial(ours, "triton")} | COMMON}


def extra_bytes(provider: str, shape: harness.Shape, dtype: str) -> int:
    """The differences of all pairs, and their squares; or only the matrices of the heads."""
    tokens = (1, shape[1] * shape[2] // PATCH**2, WIDTH)
    count = {"published": 2 * WIDTH, "published, matmul distances": 40}
    return harness.matrices(count.get(provider, 0), tokens, dtype)


def check(provider: str, device: str, shape: harness.Shape, dtype: str) -> Callable | None:
    """Against plain float32 SC-CLIP, where it is small enough to wait for."""
    if provider == "plain CLIP" or dtype != "float32" or shape[0] > 1 or shape[1] > 224:
        return None
    encoder, _ = loaded(device, dtype)
    return partial(harness.assert_close, expected=published(encoder, images(device, shape)))


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float16", shapes=DENSE))
@torch.inference_mode()
def test_encode_dense(device, shape, dtype, provider, race):
    encoder, _ = loaded(device, dtype)
    race(
        partial(PROVIDERS[device][provider], encoder, images(device, shape)),
        check=check(provider, device, shape, dtype),
        extra_bytes=extra_bytes(provider, shape, dtype),
    )


def slide(batch: int, segmenter: Segmenter, image: np.ndarray) -> Tensor:
    with mock.patch.object(clip, "_MAX_WINDOWS", batch):
        return segmenter(image)


SLIDES = {
    "scclip_fast torch": partial(slide, clip._MAX_WINDOWS),
    "windows one by one": partial(slide, 1),
}


@pytest.mark.parametrize(
    harness.ARGUMENTS,
    harness.cases({"cpu": SLIDES, "cuda": SLIDES}, "float16", shapes=((1, 336, 448),)),
)
def test_segment(device, shape, dtype, provider, race):
    """Six windows of 224 pixels, 112 apart, as published."""
    segmenter = Segmenter(*loaded(device, dtype), CLASSES)
    image = np.random.default_rng(0).integers(0, 256, (*shape[1:], 3), np.uint8)
    race(partial(SLIDES[provider], segmenter, image), check=None)
