"""SC-CLIP around a ViT-B/16: the cost beside plain CLIP, and the gain of windows in one batch.

Shapes are (B, H, W): images and their sides in pixels. The weights are random, which does not
change the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import harness
import numpy as np
import published_clip
import published_lof
import pytest
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast.clip import SCCLIP, create_model
from scclip_fast.segment import Segmenter, cosines

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


def published(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """Encodes one image after the other, with every matrix in memory."""
    encode = published_clip.encode_dense
    return torch.stack([encode(encoder.model, image, encoder.config) for image in pixels])


def published_with_product(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """Does the same with LOF from a matrix product, where the (N, N, D) differences do not fit."""
    lof_mask = partial(published_lof.lof_mask, squared_distances=published_lof.product_distances)
    with mock.patch.object(published_clip, "lof_mask", lof_mask):
        return published(encoder, pixels)


def ours(backend: str, encoder: SCCLIP, pixels: Tensor) -> Tensor:
    with sf.backend(backend):
        return encoder.encode_dense(pixels)


def forward(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """Runs plain CLIP's whole vision tower."""
    return SCCLIP(encoder.model, method="clip").encode_dense(pixels)


COMMON = {
    "scclip_fast torch": partial(ours, "torch"),
    "plain CLIP": forward,
    "published": published,
    "published, matmul distances": published_with_product,
}
PROVIDERS = {"cpu": COMMON, "cuda": {"scclip_fast triton": partial(ours, "triton")} | COMMON}


def extra_bytes(provider: str, shape: harness.Shape, dtype: str) -> int:
    """Counts the differences of all pairs and their squares, or only the matrices of the heads."""
    tokens = (1, shape[1] * shape[2] // PATCH**2, WIDTH)
    count = {"published": 2 * WIDTH, "published, matmul distances": 40}
    return harness.matrices(count.get(provider, 0), tokens, dtype)


def check(provider: str, device: str, shape: harness.Shape, dtype: str) -> Callable | None:
    """Returns a comparison with the published SC-CLIP, for float32 images of up to 224 pixels."""
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
    with mock.patch.object(cosines, "MAX_WINDOWS", batch):
        return segmenter(image)


SLIDES = {
    "scclip_fast torch": partial(slide, cosines.MAX_WINDOWS),
    "windows one by one": partial(slide, 1),
}


@pytest.mark.parametrize(
    harness.ARGUMENTS,
    harness.cases({"cpu": SLIDES, "cuda": SLIDES}, "float16", shapes=((1, 336, 448),)),
)
def test_segment(device, shape, dtype, provider, race):
    """Segments in six windows of 224 pixels, 112 apart, as published."""
    segmenter = Segmenter(*loaded(device, dtype), CLASSES)
    image = np.random.default_rng(0).integers(0, 256, (*shape[1:], 3), np.uint8)
    race(partial(SLIDES[provider], segmenter, image), check=None)
