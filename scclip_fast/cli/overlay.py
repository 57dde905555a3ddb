"""The pictures of `scclip-fast segment`: photos in the colours of their classes, with a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from . import fonts

LONG_SIDE = 2048  # pixels; larger photos are drawn smaller
MAX_CLASSES = 256  # of a palette
_OPACITY = 0.6  # of the colours
_COLOR_OF_PHOTO = 0.2  # what is left of the photo's own, which would mix with those of the classes
_LINE = 0.8  # opacity of the outlines
_OUTLIER = (213, 94, 0)
_INK, _GREY = (34, 34, 34), (110, 110, 110)

# Okabe and Ito's, which the colour-blind can tell apart, then Paul Tol's indigo and wine, and grey.
_FIRST_COLORS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (51, 34, 136),
    (136, 34, 85),
    (153, 153, 153),
)


@cache
def palette() -> np.ndarray:
    """Colours (256, 3), uint8, of class 0, 1, ...; each is as far from all before as can be."""
    steps = np.linspace(0, 255, 17).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (chroma > 0.06) & (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93)  # white is for the outlines
    candidates, lab = candidates[vivid], lab[vivid]
    colors = [np.array(color, float) for color in _FIRST_COLORS]
    taken = _oklab(np.array(colors))
    distance = np.linalg.norm(lab[:, None] - taken, axis=2).min(axis=1)
    while len(colors) < MAX_CLASSES:
        farthest = distance.argmax()
        colors.append(candidates[farthest])
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=1))
    return np.array(colors).astype(np.uint8)


def draw(
    photo: Image.Image, labels: np.ndarray, names: list[str], font: Path | None = None
) -> Image.Image:
    """The photo in the colours of its classes, and beside or below it a legend with their shares.

    Args:
        photo: RGB.
        labels: (H, W), uint8, indices into names; of the photo's size.
        names: of the classes; one that no font can draw is given by its number.
        font: a file to draw names with, as far as it has their characters; see `fonts.faces`.
    """
    small = _fitted(photo, LONG_SIDE)
    blended = blend(small, _resized(labels, small.size))
    return _with_legend(blended, _em(small), names, font, labels)


def compare(
    photo: Image.Image,
    outliers: np.ndarray | None,
    before: np.ndarray,
    after: np.ndarray,
    names: list[str],
    font: Path | None = None,
) -> Image.Image:
    """The photo with its outlier tokens, then as `draw` has it frozen and calibrated.

    Args:
        photo: RGB.
        outliers: (h, w), bool, of a grid of tokens over the photo; None where none were sought.
        before, after: as labels of `draw`.
        names, font: as of `draw`.
    """
    small = _fitted(photo, LONG_SIDE // 2)
    masks = {"frozen": before, "calibrated": after}
    panels = {name: blend(small, _resized(mask, small.size)) for name, mask in masks.items()}
    if outliers is not None:
        title = f"outliers: {outliers.sum()} of {outliers.size} tokens"
        panels = {title: _marked(small, _resized(outliers, small.size))} | panels
    em = _em(small)
    return _with_legend(_row(panels, fonts.DEFAULT.sized(em)), em, names, font, before, after)


def _fitted(photo: Image.Image, long_side: int) -> Image.Image:
    scale = min(1, long_side / max(photo.size))
    size = tuple(max(round(side * scale), 1) for side in photo.size)
    return photo.resize(size, Image.Resampling.LANCZOS)


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def _em(photo: Image.Image) -> int:
    """The size of letters in pixels."""
    return min(max(round(0.026 * math.sqrt(photo.width * photo.height)), 13), 40)


def _with_legend(
    picture: Image.Image, em: int, names: list[str], font: Path | None, *labels: np.ndarray
) -> Image.Image:
    """The legend tells the share of each class in each of the labels."""
    found = ranked(*labels)
    shares = [" → ".join(map(percent, each)) for each in found.values()]
    legend = _Legend(em, _texts(found, names, font, em), shares)
    place = legend.place(picture.size)
    canvas = Image.new("RGB", place.canvas, "white")
    canvas.paste(picture, (em, em))
    legend.draw(canvas, place, [tuple(color) for color in palette()[[*found]].tolist()])
    return canvas


def _texts(
    found: Iterable[int], names: list[str], file: Path | None, em: int
) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """What the legend has for each class that was found, and the font to draw it with."""
    chosen = [(index, names[index]) for index in found]
    texts = []
    for (index, name), face in zip(
        chosen, fonts.faces([name for _, name in chosen], file), strict=True
    ):
        text = f"class {index} (no font has its name)" if face is None else name
        texts.append((text, (face or fonts.DEFAULT).sized(em)))
    return texts


def ranked(*labels: np.ndarray) -> dict[int, list[float]]:
    """The classes in all labels (H, W), uint8, the largest first, and the share in each of them."""
    counts = np.array([np.bincount(mask.ravel(), minlength=MAX_CLASSES) for mask in labels])
    total = counts.sum(axis=0)
    found = (int(index) for index in np.argsort(-total, kind="stable") if total[index])
    return {index: (counts[:, index] / labels[0].size).tolist() for index in found}


def _row(panels: dict[str, Image.Image], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Panels of one size beside each other, each under its title."""
    (width, height), em = next(iter(panels.values())).size, font.size
    row = Image.new("RGB", (len(panels) * (width + em) - em, height + 2 * em), "white")
    pen = ImageDraw.Draw(row)
    for index, (title, panel) in enumerate(panels.items()):
        left = index * (width + em)
        pen.text((left, em), _shortened(title, font, width), _INK, font, anchor="lm")
        row.paste(panel, (left, 2 * em))
    return row


def _marked(photo: Image.Image, outliers: np.ndarray) -> Image.Image:
    marked = _muted(photo)
    marked.paste(_OUTLIER, mask=Image.fromarray((255 * _LINE * outliers).astype(np.uint8)))
    return marked


def _muted(photo: Image.Image) -> Image.Image:
    return Image.blend(photo.convert("L").convert("RGB"), photo, _COLOR_OF_PHOTO)


def blend(photo: Image.Image, labels: np.ndarray) -> Image.Image:
    """The photo, RGB, in the colours of labels (H, W), uint8, with white lines between them."""
    colored = Image.blend(_muted(photo), Image.fromarray(palette()[labels]), _OPACITY)
    width = max(1, round(math.sqrt(labels.size) / 450))
    colored.paste((255, 255, 255), mask=_outlines(labels, width))
    return colored


def _outlines(labels: np.ndarray, width: int) -> Image.Image:
    """Opacity of the lines between classes, that many pixels wide, with soft sides."""
    lines = np.zeros(labels.shape, bool)
    lines[1:] |= labels[1:] != labels[:-1]
    lines[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    for step in range(width - 1):  # to the left and up, then to the right and down
        here, there = (slice(None, -1), slice(1, None))[:: 1 if step % 2 == 0 else -1]
        before = lines.copy()
        lines[here] |= before[there]
        lines[:, here] |= before[:, there]
    mask = Image.fromarray((255 * _LINE * lines).astype(np.uint8))
    return mask.filter(ImageFilter.GaussianBlur(0.3 * width))


class _Place(NamedTuple):
    """A layout; sizes and corners in pixels, (x, y)."""

    canvas: tuple[int, int]
    corner: tuple[int, int]  # of the legend
    rows: int  # of a column


class _Legend:
    """A swatch, a name in its font and a share for each class, in columns."""

    def __init__(
        self, em: int, names: list[tuple[str, ImageFont.FreeTypeFont]], shares: list[str]
    ) -> None:
        self.font, self.em = fonts.DEFAULT.sized(em), em
        self.names = [(_shortened(name, font, 20 * em), font) for name, font in names]
        self.shares = shares
        self.row = round(1.75 * self.em)
        self.gap = 2 * self.em  # between columns
        self.name_width = math.ceil(max(font.getlength(name) for name, font in self.names))
        self.share_width = math.ceil(max(map(self.font.getlength, ["100.0 %", *shares])))
        self.column = round(1.6 * self.em) + self.name_width + self.em + self.share_width

    def place(self, photo: tuple[int, int]) -> _Place:
        """Beside or below the photo, in as many columns as make all small and no narrow strip."""
        width, height = photo
        em, places = self.em, []
        for columns in range(1, len(self.names) + 1):
            rows = math.ceil(len(self.names) / columns)
            legend = columns * (self.column + self.gap) - self.gap, rows * self.row
            beside = width + legend[0] + 3 * em + em // 2, max(height, legend[1]) + 2 * em
            below = max(width, legend[0]) + 2 * em, height + legend[1] + 2 * em + em // 2
            places.append(_Place(beside, (width + 2 * em + em // 2, em), rows))
            places.append(_Place(below, (em, height + em + em // 2), rows))
        return min(places, key=lambda place: _cost(*place.canvas))

    def draw(self, canvas: Image.Image, place: _Place, colors: list[tuple[int, ...]]) -> None:
        pen, em = ImageDraw.Draw(canvas), self.em
        for index, color in enumerate(colors):
            column, row = divmod(index, place.rows)
            x = place.corner[0] + column * (self.column + self.gap)
            middle = place.corner[1] + row * self.row + self.row // 2
            top = middle - em // 2
            pen.rounded_rectangle((x, top, x + em, top + em), radius=em // 4, fill=color)
            text = x + round(1.6 * em)
            name, font = self.names[index]
            pen.text((text, middle), name, _INK, font, anchor="lm")
            pen.text((x + self.column, middle), self.shares[index], _GREY, self.font, anchor="rm")


def _cost(width: int, height: int) -> float:
    return width * height * max(max(width, height) / min(width, height), 1.6)


def _shortened(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}…") > width:
        name = name[:-1].rstrip()
    return f"{name}…"


def percent(share: float) -> str:
    """12.3 %."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab (Ottosson, 2020), where distances are about what eyes see, of sRGB (N, 3) to 255."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
