"""PAMR agrees with a loop over pixels, removes noise and keeps edges."""

import numpy as np
import pytest
import torch

from scclip_fast.segment.pamr import DILATIONS, pamr

OFFSETS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def plain(image, maps, steps, dilations):
    """Refines maps (C, H, W) along an image (K, H, W), float64 arrays, pixel by pixel."""
    height, width = image.shape[1:]

    def neighbors(x, row, column):
        """Returns the neighbours (channels, 8 len(dilations)); the border is repeated outside."""
        places = [(row + d * y, column + d * x) for d in dilations for y, x in OFFSETS]
        return np.stack([x[:, r.clip(0, height - 1), c.clip(0, width - 1)] for r, c in places], 1)

    pixels = [(np.int64(row), np.int64(column)) for row in range(height) for column in range(width)]
    weights = {}
    for row, column in pixels:
        center, others = image[:, row, column, None], neighbors(image, row, column)
        deviation = np.concatenate([others] + [center] * len(dilations), axis=1).std(axis=1, ddof=1)
        score = -(np.abs(others - center) / (1e-8 + 0.1 * deviation[:, None])).mean(axis=0)
        weights[row, column] = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
    for _ in range(steps):
        maps = np.stack([neighbors(maps, *pixel) @ weights[pixel] for pixel in pixels], axis=1)
        maps = maps.reshape(-1, height, width)
    return maps


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("dilations", [(1, 2), (3,), DILATIONS], ids=str)
def test_against_a_loop(dilations, steps):
    image, maps = torch.randn(2, 3, 9, 12).double(), torch.randn(2, 4, 9, 12).double()
    image[:, :, 2:5, 3:8] = 0.5  # a flat area, where all neighbours are equal
    found = pamr(image, maps, steps, dilations)
    for i in range(2):
        expected = plain(image[i].numpy(), maps[i].numpy(), steps, dilations)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=1e-12)


def test_the_dilations_are_sc_clips():
    image, maps = torch.randn(1, 3, 20, 20), torch.randn(1, 2, 20, 20)
    assert torch.equal(pamr(image, maps, 2), pamr(image, maps, 2, (8, 16)))
    assert not torch.allclose(pamr(image, maps, 2), pamr(image, maps, 2, (1, 2)))


def scene(noise):
    """Returns an image of two flat halves, and a noisy map of the right half."""
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 1
    maps = image[:, :1] + noise * torch.randn(1, 1, 40, 40)
    return image, maps


def test_noise_goes_and_edges_stay():
    image, maps = scene(noise=0.5)
    refined = pamr(image, maps, 5)
    for half, value in ((slice(0, 20), 0), (slice(20, 40), 1)):
        before, after = (m[..., half] for m in (maps, refined))
        assert after.std() < before.std() / 4
        assert (after.mean(dim=(1, 2)) - value).abs().max() < 0.2  # the edge included


def test_a_picture_without_edges_only_smooths():
    """All neighbours have the same weight: a bright pixel becomes 1/8 at each of the 8."""
    maps = torch.zeros(1, 1, 5, 5)
    maps[..., 2, 2] = 1
    expected = torch.zeros(1, 1, 5, 5)
    expected[..., 1:4, 1:4] = 1 / 8
    expected[..., 2, 2] = 0
    torch.testing.assert_close(pamr(torch.full((1, 3, 5, 5), 0.3), maps, 1, (1,)), expected)


@pytest.mark.parametrize("scale", [1, 255])
def test_weights_sum_to_one(scale):
    image = scale * torch.rand(2, 3, 17, 23)
    maps = torch.tensor([0.25, -3.0]).view(1, 2, 1, 1).expand(2, 2, 17, 23)
    torch.testing.assert_close(pamr(image, maps, 4), maps)


def test_the_scale_of_a_channel_does_not_matter():
    image, maps = torch.rand(1, 3, 12, 12).double(), torch.rand(1, 2, 12, 12).double()
    scaled = image * torch.tensor([255.0, 0.5, 3.0]).view(3, 1, 1) - 7
    torch.testing.assert_close(pamr(scaled, maps, 2), pamr(image, maps, 2), rtol=0, atol=1e-5)


def test_the_maps_keep_their_dtype():
    image, maps = torch.rand(1, 3, 12, 12), torch.rand(1, 2, 12, 12).half()
    assert pamr(image, maps, 2).dtype == torch.float16


@pytest.mark.parametrize(
    ("image", "maps", "steps", "message"),
    [
        ((3, 4, 4), (1, 2, 4, 4), 1, r"got \(3, 4, 4\) and \(1, 2, 4, 4\)"),
        ((1, 3, 4, 4), (2, 4, 4), 1, r"got \(1, 3, 4, 4\) and \(2, 4, 4\)"),
        ((1, 3, 4, 4), (2, 2, 4, 4), 1, "maps must have the batch and size of image"),
        ((1, 3, 4, 4), (1, 2, 4, 5), 1, "maps must have the batch and size of image"),
        ((1, 3, 4, 4), (1, 2, 4, 4), -1, "steps must be at least 0, got -1"),
    ],
)
def test_errors(image, maps, steps, message):
    with pytest.raises(ValueError, match=message):
        pamr(torch.rand(image), torch.rand(maps), steps)


@pytest.mark.parametrize("dilations", [(), (8, 0)], ids=str)
def test_dilations_that_are_refused(dilations):
    with pytest.raises(ValueError, match="dilations must be at least 1"):
        pamr(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), 1, dilations)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"must be floating, got torch\.uint8"):
        pamr(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.rand(1, 2, 4, 4), 1)
