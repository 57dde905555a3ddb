"""The size of the model's input, its windows, and upsampling in bands."""

import published_segment
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scclip_fast.segment import image as images


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((336, 448), 224, 112),
        ((336, 449), 224, 112),
        ((336, 2048), 224, 112),
        ((100, 300), 224, 112),
        ((224, 224), 224, 112),
        ((50, 51), 7, 3),
        ((10, 10), 4, 4),
        ((5, 3), 1, 1),
    ],
)
def test_places_of_windows(size, crop, stride):
    places = [(y.start, y.stop, x.start, x.stop) for y, x in images.windows(size, crop, stride)]
    clipped = [(t, min(b, size[0]), le, min(r, size[1])) for t, b, le, r in places]
    assert clipped == published_segment.windows(size, crop, stride)
    covered = torch.zeros(size)
    for top, bottom, left, right in clipped:
        covered[top:bottom, left:right] = 1
    assert covered.all()
    if size == (336, 448):
        assert len(places) == 6


@pytest.mark.parametrize(
    ("size", "short", "resized"),
    [
        ((336, 448), 336, (336, 448)),
        ((500, 375), 336, (448, 336)),
        ((375, 500), 336, (336, 448)),
        ((1024, 2048), 560, (560, 1120)),
        ((333, 500), 336, (336, 505)),  # 504.504..., rounded half up
        ((10, 4), 5, (13, 5)),  # 12.5 too, where Python's round would give 12
        ((336, 2048), 336, (336, 2048)),
        ((100, 1000), 336, (205, 2048)),  # the long side decides
        ((1, 5000), 336, (1, 2048)),
        ((5000, 1), 336, (2048, 1)),
        ((3000, 4000), 3000, (2250, 3000)),  # mmseg sorts 2048 and 3000, so the long side has 3000
        ((7, 9), None, (7, 9)),
    ],
)
def test_the_size_of_the_input(size, short, resized):
    assert images.input_size(size, short) == resized


sides = st.integers(1, 60)


@given(sides, sides, st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_windows_of_any_size(height, width, crop, data):
    """Windows cover the image, are of one size, and none could be left out at the border."""
    stride = data.draw(st.integers(1, crop))
    places = images.windows((height, width), crop, stride)
    assert len(set(map(str, places))) == len(places)
    covered = torch.zeros(height, width)
    for rows, columns in places:
        assert rows.stop - rows.start == columns.stop - columns.start == crop
        assert rows.start >= 0 and rows.stop <= max(height, crop)
        covered[rows, columns] += 1
    assert covered.all()
    along = -(-max(height - crop, 0) // stride) + 1, -(-max(width - crop, 0) // stride) + 1
    assert len(places) == along[0] * along[1]


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 2048))
@settings(deadline=None)
def test_resized_sides(height, width, short):
    """The short side is the one asked for, unless the long one would exceed 2048 pixels."""
    resized = images.input_size((height, width), short)
    exact = min(short / min(height, width), 2048 / max(height, width))
    for new, old in zip(resized, (height, width), strict=True):
        assert new == 1 or abs(new - exact * old) <= 0.5 + 1e-6
    assert max(resized) <= 2048 and (min(resized) == short or max(resized) == 2048)


PLACES = {
    "overlapping": ((20, 27), 8, 4),
    "apart": ((16, 24), 8, 8),
    "a step that does not divide": ((23, 31), 9, 4),
    "far apart": ((23, 31), 9, 7),
    "one": ((8, 8), 8, 4),
    "larger than the picture": ((5, 7), 8, 4),
}


@pytest.mark.parametrize("band", [1, 3, 100])
@pytest.mark.parametrize(("size", "crop", "stride"), PLACES.values(), ids=PLACES.keys())
def test_rows_of_windows_are_means_of_upsampled_maps(size, crop, stride, band):
    """A pixel has the mean over its windows, in bands of any height and in any order."""
    places = images.windows(size, crop, stride)
    maps = [torch.randn(3, 2, 3) for _ in places]
    total, count = torch.zeros(3, *size), torch.zeros(size)
    for (rows, columns), window_maps in zip(places, maps, strict=True):
        shape = count[rows, columns].shape
        total[:, rows, columns] += F.interpolate(window_maps[None], shape, mode="bilinear")[0]
        count[rows, columns] += 1
    expected, found = total / count, torch.full((3, *size), float("nan"))
    windows = images.WindowMaps(maps, places, size)
    assert windows.shape == (3, *size)
    for top in reversed(range(0, size[0], band)):
        found[:, top : top + band] = windows.rows(top, min(top + band, size[0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for scaled in (size, (2 * size[0], 3 * size[1])):
        whole = F.interpolate(expected[None], scaled, mode="bilinear")[0]
        bands = torch.cat(list(images.upsampled(windows, scaled)), dim=1)
        torch.testing.assert_close(bands, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(60, 80), (12, 16), (5, 7), (1, 1), (13, 16)], ids=str)
@pytest.mark.parametrize("band", [1, 2000, 2**26])
def test_upsampling_in_bands_is_torchs(size, band, monkeypatch):
    monkeypatch.setattr(images, "_BAND_BYTES", band)
    maps = torch.randn(3, 12, 16)
    found = torch.cat(list(images.upsampled(maps, size)), dim=1)
    torch.testing.assert_close(found, F.interpolate(maps[None], size, mode="bilinear")[0])


@pytest.mark.parametrize("whole", [0, 2**28], ids=["bands", "whole"])
@pytest.mark.parametrize("scaled", [(20, 27), (40, 81), (13, 9)], ids=str)
def test_the_largest_map(whole, scaled, monkeypatch):
    monkeypatch.setattr(images, "_WHOLE_BYTES", whole)
    monkeypatch.setattr(images, "LABEL_ROWS", 7)
    monkeypatch.setattr(images, "_BAND_BYTES", 3 * 4 * 5 * scaled[1])
    places = images.windows((20, 27), 8, 4)
    windows = images.WindowMaps([torch.randn(5, 2, 3) for _ in places], places, (20, 27))
    expected = torch.cat(list(images.upsampled(windows, scaled)), dim=1).argmax(dim=0)
    for maps in (windows, windows.rows(0, 20)):
        bands = list(images.largest(maps, scaled))
        assert len(bands) > 1 and len(expected.unique()) == 5
        assert torch.equal(torch.cat(bands), expected)
