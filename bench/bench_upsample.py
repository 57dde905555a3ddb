"""Labels of a photo from small maps of its classes: (classes, side of the maps, of the photo)."""

from __future__ import annotations

from functools import partial

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scclip_fast as sf

SHAPES = ((21, 72, 1000), (151, 72, 1000), (151, 288, 2000))


def interpolate_argmax(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Holds all classes at the photo's size."""
    values, labels = F.interpolate(maps[None], size, mode="bilinear")[0].max(dim=0)
    return labels, values


COMMON = {
    "scclip_fast torch": partial(sf.upsampled_labels, backend="torch"),
    "interpolate + argmax": interpolate_argmax,
}
PROVIDERS = {
    "cpu": COMMON,
    "cuda": {"scclip_fast triton": partial(sf.upsampled_labels, backend="triton")} | COMMON,
}


def scores(device: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Draws probabilities (classes, h, w)."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return drawn.to(device, getattr(torch, dtype))


def same_values(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts values alone, because the rounding of positions decides labels of near ties."""
    harness.assert_close(found[1], expected[1].to(found[1].dtype))


@pytest.mark.parametrize(
    harness.ARGUMENTS, harness.cases(PROVIDERS, "float32", "float16", shapes=SHAPES)
)
def test_upsampled_labels(device, shape, dtype, provider, race):
    classes, source, side = shape
    maps, size = scores(device, (classes, source, source), dtype), (side, side)
    # The peer also holds the photo's values of every class.
    everything = maps.itemsize * classes * side**2 if provider == "interpolate + argmax" else 0
    race(
        partial(PROVIDERS[device][provider], maps, size),
        check=lambda out: same_values(out, sf.upsampled_labels(maps.float(), size)),
        extra_bytes=everything,
    )
