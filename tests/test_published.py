"""PublishedSegmenter agrees with the published evaluation, written out step by step here."""

import math

import numpy as np
import published_segment
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.evaluate import PublishedSegmenter, resize_uint8
from scclip_fast.segment import Segmenter

NAMES = ["sky", "person", "man", "tree", "a red car", "grass", "dog", "house", "road", "sand"]
CLASSES = ["sky", "person, man", *NAMES[3:]]
OWNERS = [0, 1, 1, 2, 3, 4, 5, 6, 7, 8]
TEMPLATES = ["a photo of a {}.", "the {} in a scene."]
# Sizes (height, width) of photos, and their sizes after resizing to a short side of 48 pixels.
SIZES = {(96, 128): (48, 64), (131, 97): (65, 48), (113, 200): (48, 85), (30, 44): (48, 70)}
SMALL = dict(short_side=48, slide_crop=32, slide_stride=16)


def coefficients(source, target):
    """Returns the first neighbour and the weights, in 1/2048, of each pixel, as OpenCV's loop."""
    scale, rows = 1.0 / (float(target) / source), []
    for d in range(target):
        f = np.float32((d + 0.5) * scale - 0.5)
        s = math.floor(f)
        f = np.float32(f - np.float32(s))
        weights = (np.float32(1) - f, f)
        rows.append((s, *(int(np.rint(w * np.float32(2048))) for w in weights)))
    return rows


def opencv_resize(image, size):
    """Resizes an image (H, W, 3), uint8, as cv2.resize with INTER_LINEAR, pixel by pixel."""
    source = image.astype(int)
    height, width = source.shape[:2]
    columns = np.empty((height, size[1], 3), int)
    for x, (s, a0, a1) in enumerate(coefficients(width, size[1])):
        if s < 0 or s >= width - 1:
            columns[:, x] = source[:, min(max(s, 0), width - 1)] * 2048
        else:
            columns[:, x] = source[:, s] * a0 + source[:, s + 1] * a1
    out = np.empty((*size, 3), np.uint8)
    for y, (s, b0, b1) in enumerate(coefficients(height, size[0])):
        s0, s1 = (columns[min(max(row, 0), height - 1)] for row in (s, s + 1))
        out[y] = ((b0 * (s0 >> 4) >> 16) + (b1 * (s1 >> 4) >> 16) + 2) >> 2
    return out


def neighbours(x, dilation, centre):
    """Returns the neighbours (B, K, P, H, W) by a convolution, plus the pixel times `centre`."""
    kernel = torch.zeros(8, 1, 3, 3, dtype=x.dtype)
    for i, place in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
        kernel[i, 0, place // 3, place % 3] = 1
        kernel[i, 0, 1, 1] = centre
    batch, channels, height, width = x.shape
    flat = F.pad(x.reshape(-1, 1, height, width), [dilation] * 4, mode="replicate")
    return F.conv2d(flat, kernel, dilation=dilation).view(batch, channels, 8, height, width)


def published_pamr(image, maps, steps):
    """Runs PAMR by the published convolutions, at SC-CLIP's dilations."""

    def around(x, centre):
        return torch.cat([neighbours(x, d, centre) for d in (8, 16)], dim=2)

    pixel = image[:, :, None].expand(-1, -1, 2, -1, -1)  # once for each dilation
    deviation = torch.cat([around(image, 0), pixel], dim=2).std(dim=2, keepdim=True)
    weights = (-around(image, -1).abs() / (1e-8 + 0.1 * deviation)).mean(1, keepdim=True)
    weights = weights.softmax(dim=2)
    for _ in range(steps):
        maps = (around(maps, 0) * weights).sum(dim=2)
    return maps


def published(encoder, image, size, steps, scale=40.0):
    """Returns the label map of a photo (H, W, 3) by the steps of the published code."""
    resized = torch.from_numpy(opencv_resize(image, size)).double()
    # As in mmsegmentation's SegDataPreProcessor, with SC-CLIP's numbers.
    mean = torch.tensor([122.771, 116.746, 104.094]).double()
    std = torch.tensor([68.501, 66.632, 70.323]).double()
    pixels = ((resized - mean) / std).permute(2, 0, 1)[None]
    text = published_segment.text_features(encoder, NAMES, TEMPLATES)
    maps = published_segment.maps(encoder, text, pixels, 32, 16)[None]
    maps = F.interpolate(maps, image.shape[:2], mode="bilinear")
    if steps:
        guide = F.interpolate(pixels, image.shape[:2], mode="bilinear")
        maps = published_pamr(guide, maps, steps)
    return published_segment.probabilities(maps[0], OWNERS, scale).argmax(dim=0)


@pytest.fixture(scope="module")
def encoder():
    """A model in float64, where rounding does not decide which tokens are similar."""
    return SCCLIP(tiny_clip(layers=3).double())


def agreement(encoder, kind, steps):
    """Returns the share of pixels, over all photos, that have the published label."""
    segmenter = kind(encoder, tokenizer(), CLASSES, templates=TEMPLATES, pamr_steps=steps, **SMALL)
    same = []
    for size, resized in SIZES.items():
        image = photo(*size)
        labels = published(encoder, image.numpy(), resized, steps)
        assert len(labels.unique()) > 1
        same.append((segmenter(image) == labels).flatten())
    return torch.cat(same).double().mean().item()


@pytest.mark.parametrize("steps", [0, 3])
def test_label_maps_are_the_published_ones(encoder, steps):
    """Resizing in floating point, or PAMR along the edges of the original, would fail here."""
    assert agreement(encoder, PublishedSegmenter, steps) >= 0.9999


@pytest.mark.parametrize("steps", [0, 3])
def test_the_published_pixels_decide_labels(encoder, steps):
    """`Segmenter` has other labels on the same photos, so the test above can fail."""
    assert 0.9 < agreement(encoder, Segmenter, steps) < 0.9999


SHAPES = [((96, 128), (48, 64)), ((131, 97), (65, 48)), ((30, 44), (48, 70)), ((7, 5), (7, 5))]
SHAPES += [((142, 60), (1120, 60))]  # float32 rounds positions to another weight here
SHAPES += [((1, 9), (3, 4)), ((9, 1), (4, 3)), ((1, 1), (2, 2)), ((50, 60), (1, 1))]


@pytest.mark.parametrize(("size", "target"), SHAPES, ids=str)
def test_resize_is_opencvs_arithmetic(size, target):
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    found = resize_uint8(image.permute(2, 0, 1), target).permute(1, 2, 0)
    assert found.dtype == torch.uint8
    assert np.array_equal(found, opencv_resize(image.numpy(), target))


def test_resize_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    for size, target in SHAPES:
        image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
        found = resize_uint8(image.permute(2, 0, 1), target).permute(1, 2, 0)
        expected = cv2.resize(image.numpy(), target[::-1], interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(found, expected), (size, target)


def test_resize_by_hand():
    """The weights are 0.25 and 0.75, values are rounded half up, and the border is kept."""
    row = torch.tensor([[0, 10, 255]], dtype=torch.uint8)
    assert resize_uint8(row, (1, 6)).tolist() == [[0, 3, 8, 71, 194, 255]]
    assert resize_uint8(row.T, (6, 1)).T.tolist() == [[0, 3, 8, 71, 194, 255]]
    square = torch.tensor([[1, 2], [2, 2]], dtype=torch.uint8)
    assert resize_uint8(square, (1, 1)).item() == 2  # rounded from 1.75


def test_resize_takes_whole_numbers_alone():
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        resize_uint8(torch.rand(3, 4, 4), (2, 2))
