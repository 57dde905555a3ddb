"""Images: reading files, the size for the model, windows, and upsampling maps to all pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunked.upsample import needed_rows, upsampled_rows
from ..extras import needs
from ..ops import upsampled_labels

with needs("clip"):
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

LONG_SIDE = 2048  # pixels: the most that resizing to a short side makes of the long side
_BAND_BYTES = 16 * 2**20  # of upsampled maps that are in memory at a time
_WHOLE_BYTES = 256 * 2**20  # of maps at the size of the model's input that are averaged at once
LABEL_ROWS = 256  # of int64 labels that are in memory at a time
_BACKGROUND = "white"  # behind transparent images
# Of the files that are taken from folders. Pillow opens more formats, by the files' contents.
_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_PLUGINS = {".heic", ".heif"}  # taken too if a plug-in of Pillow is registered for them
_OPENERS = {  # what opens formats that not every Pillow opens
    ".avif": "Pillow 11.3 or newer opens AVIF",
    ".heic": "pip install pillow-heif, with which Pillow opens HEIC",
    ".heif": "pip install pillow-heif, with which Pillow opens HEIF",
}

ImageLike = Image.Image | np.ndarray | Tensor | str | PathLike[str]


def suffixes() -> set[str]:
    """Returns the suffixes of the image files that are taken from folders, in small letters."""
    return _SUFFIXES | (_PLUGINS & Image.registered_extensions().keys())


class ImageError(ValueError):
    """An image file cannot be read; the message names the file and the reason."""


def read(path: str | PathLike[str], max_pixels: int | None = None) -> Image.Image:
    """Reads an image file of any format that Pillow opens; HEIC needs the package pillow-heif.

    Args:
        path: the file.
        max_pixels: an image with more pixels is refused before it is decoded; None for no limit.

    Returns:
        The first frame, as RGB by `to_rgb`.

    Raises:
        ImageError: the file is missing, damaged, truncated, too large or no image.
    """
    _register_heif()
    try:
        with Image.open(path) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                size = f"{image.width:,} × {image.height:,}"
                raise ValueError(f"{size} pixels; at most {max_pixels / 1e6:.0f} million are taken")
            return to_rgb(image)
    except UnidentifiedImageError:
        hint = _OPENERS.get(Path(path).suffix.lower())
        reason = "not an image, or a damaged one" + (f"; {hint}" if hint else "")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise ImageError(f"{fspath(path)}: {reason.splitlines()[0]}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of any mode as 8-bit RGB, upright by its EXIF orientation.

    Transparent pixels are blended with white. Grey values of more than 8 bits (modes I;16, I and F)
    are divided by a power of two: the bit depth is taken to be the first of 8, 10, 12, ... that
    holds the largest value, so that 12-bit data in a 16-bit file keeps its brightness. Where all
    floating values are at most 1, 1 is white. From 16 bits a colour, Pillow itself keeps the upper
    8.

    Raises:
        ValueError: a value is below 0 or not finite, or Pillow cannot convert the mode.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, _BACKGROUND)
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Returns grey values as uint8; Pillow's own conversion makes all above 255 white."""
    if not np.isfinite(grey).all() or grey.min() < 0:
        raise ValueError("grey values must be finite and not below 0")
    if grey.dtype.kind == "f" and grey.max() <= 1:
        return (255 * grey).round().astype(np.uint8)
    bits = int(grey.max()).bit_length()
    return (grey // 2 ** max(bits + bits % 2 - 8, 0)).astype(np.uint8)


@cache
def _register_heif() -> None:
    """Registers the HEIC decoder of pillow-heif with Pillow, if that package is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def to_tensor(image: ImageLike) -> Tensor:
    """Returns (3, H, W), uint8, of a file, a PIL image or a uint8 array or tensor (H, W, 3).

    A file is read by `read`, and a PIL image is converted by `to_rgb`.
    """
    if isinstance(image, str | PathLike):
        image = read(image)
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a file, a PIL image or a uint8 (H, W, 3), got {kind}")
    if image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3), got {tuple(image.shape)}")
    return image.permute(2, 0, 1)


def input_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Returns the size (h, w) to which an image of size (H, W) is resized for the model.

    The rule is that of mmsegmentation's Resize(scale=(2048, short_side), keep_ratio=True).
    """
    if short_side is None:
        return size
    scale = min(short_side / min(size), max(LONG_SIDE, short_side) / max(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def windows(size: tuple[int, int], crop: int, stride: int) -> list[tuple[slice, slice]]:
    """Returns the rows and columns of windows of crop x crop pixels, row by row.

    Windows start every `stride` pixels. The last of a row or column ends at the image's border. A
    window is larger than an image that has fewer than `crop` rows or columns.
    """
    starts = [
        [min(step * stride, last) for step in range(math.ceil(last / stride) + 1)]
        for last in (max(side - crop, 0) for side in size)
    ]
    return [(slice(y, y + crop), slice(x, x + crop)) for y in starts[0] for x in starts[1]]


class WindowMaps:
    """Maps (C, h, w) at the size of the model's input, each pixel the mean over its windows.

    A window contributes its maps, upsampled to the window's size. Only the small maps of the
    windows are stored, and rows are computed on demand. Bilinear upsampling is separable, so the
    windows of a row are widened and averaged first, and upsampled vertically afterwards. The result
    differs from that of upsampling each window alone by the rounding of the sums.

    Args:
        maps: (C, h', w') for each window.
        places: rows and columns of each window, from `windows`.
        size: (h, w).
    """

    def __init__(
        self, maps: list[Tensor], places: list[tuple[slice, slice]], size: tuple[int, int]
    ) -> None:
        self.shape = (len(maps[0]), *size)
        by_rows = groupby(zip(places, maps, strict=True), key=lambda window: window[0][0])
        # First row, last row + 1, and (columns, maps) of each window, for each row of windows.
        self._window_rows = [
            (rows.start, min(rows.stop, size[0]), [(columns, m) for (_, columns), m in group])
            for rows, group in by_rows
        ]
        self._strips: dict[int, Tensor] = {}

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the maps (C, stop - start, w) of some rows."""
        overlapping = [row for row in self._window_rows if row[0] < stop and row[1] > start]
        # Strips outlive a call, because the next rows mostly lie in the same windows.
        self._strips = {row[0]: self._strip(row[0], row[2]) for row in overlapping}
        first_strip = self._strips[overlapping[0][0]]
        total = first_strip.new_zeros(self.shape[0], stop - start, self.shape[2])
        count = total.new_zeros(stop - start, 1)
        for top, bottom, _ in overlapping:
            first, last = max(start, top), min(stop, bottom)
            strip, target = self._strips[top], slice(first - start, last - start)
            inside = slice(first - top, last - top)
            total[:, target] += upsampled_rows(strip, (bottom - top, self.shape[2]), inside)
            count[target] += 1
        return total.div_(count)

    def _strip(self, top: int, windows: list[tuple[slice, Tensor]]) -> Tensor:
        """Returns mean maps (C, h', w) of a row of windows, of full width but few rows."""
        if (strip := self._strips.get(top)) is not None:
            return strip
        channels, height, _ = windows[0][1].shape
        strip = windows[0][1].new_zeros(channels, height, self.shape[2])
        count = strip.new_zeros(self.shape[2])
        for columns, maps in windows:
            size = (height, len(count[columns]))
            strip[:, :, columns] += F.interpolate(maps[None], size, mode="bilinear")[0]
            count[columns] += 1
        return strip.div_(count)


def upsampled(maps: Tensor | WindowMaps, size: tuple[int, int]) -> Iterator[Tensor]:
    """Upsamples maps (C, h, w) bilinearly to a size (H, W), in bands (C, rows, W)."""
    (channels, source, _), (height, width) = maps.shape, size
    band = max(1, _BAND_BYTES // (4 * channels * width))
    for top in range(0, height, band):
        rows = slice(top, min(top + band, height))
        if isinstance(maps, Tensor):
            yield upsampled_rows(maps, size, rows)
        elif maps.shape[1:] == size:
            yield maps.rows(rows.start, rows.stop)
        else:
            needed = needed_rows(source, height, rows)
            part = maps.rows(needed.start, needed.stop)
            yield upsampled_rows(part, size, rows, first=needed.start, source=source)


def largest(maps: Tensor | WindowMaps, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields the index of the largest of maps (C, h, w) at each pixel of a size (H, W).

    The maps are upsampled bilinearly. The first of equal maps counts. The bands (rows, W) are int64
    and go from top to bottom. Windows whose average would take much memory are upsampled in bands,
    because `upsampled_labels` takes maps of all rows.
    """
    if not isinstance(maps, Tensor) and 4 * math.prod(maps.shape) <= _WHOLE_BYTES:
        maps = maps.rows(0, maps.shape[1])
    if isinstance(maps, Tensor):
        labels, _ = upsampled_labels(maps, size)
        return (rows.long() for rows in labels.split(LABEL_ROWS))
    return (rows.argmax(dim=0) for rows in upsampled(maps, size))
