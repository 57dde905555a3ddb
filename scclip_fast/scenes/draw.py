"""Scenes of coloured shapes on textured grounds, with captions and exact masks.

A class is a ground ("grass") or a shape in a colour ("red star"). `HELD_OUT` pairs of colour and
shape are drawn for the benchmark alone: the other scenes, on which a model is trained, have the
colour and the shape, but not together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..extras import needs

with needs("clip"):
    import numpy as np

SIZE = (224, 224)  # height and width in pixels
GROUNDS = ("grass", "sand", "water", "brick", "wood", "stone")
COLORS = {
    "red": (200, 40, 40),
    "yellow": (235, 205, 50),
    "blue": (40, 70, 200),
    "purple": (140, 60, 170),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
FINISHES = ("plain", "striped", "dotted")
CLASSES = GROUNDS + tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
HELD_OUT = frozenset(f"{color} {shape}" for color, shape in zip(COLORS, SHAPES, strict=True))
_SPLITS = {"train": 0, "benchmark": 1, "validation": 2}  # first word of the seed
_TILT = np.pi / 8  # largest rotation, small enough that no square looks like a diamond


class Scene(NamedTuple):
    image: np.ndarray  # (H, W, 3), uint8
    labels: np.ndarray  # (H, W), uint8, indices into CLASSES
    phrases: list[str]  # names of the content, shapes first: "striped red star", "grass"


def scene(split: str, index: int, size: tuple[int, int] = SIZE) -> Scene:
    """Draws scene `index` of "train", "validation" or "benchmark". Each call draws the same scene.

    "train" and "validation" have no class of `HELD_OUT`; in "benchmark" every second shape is of
    one, on average.
    """
    rng = np.random.default_rng((_SPLITS[split], index))
    image, labels, grounds = _ground(rng, size)
    shapes = []
    for _ in range(rng.integers(1, 5)):
        color, shape = _pair(rng, held_out=split == "benchmark" and rng.random() < 0.5)
        finish = FINISHES[rng.integers(len(FINISHES))]
        if _add_shape(rng, image, labels, color, shape, finish):
            shapes.append(f"{color} {shape}" if finish == "plain" else f"{finish} {color} {shape}")
    noise = rng.normal(0, 6, image.shape)
    light = 1 + 0.15 * _ramp(rng, size)[..., None]
    pixels = (image * light + noise).clip(0, 255).astype(np.uint8)
    return Scene(pixels, labels, shapes + grounds)


def caption(rng: np.random.Generator, phrases: list[str]) -> str:
    """A caption as a person might write it, of all phrases or, one time in three, of some."""
    if rng.random() < 1 / 3:
        phrases = list(rng.permutation(phrases)[: rng.integers(1, len(phrases) + 1)])
    grounds = [phrase for phrase in phrases if phrase in GROUNDS]
    shapes = list(rng.permutation([phrase for phrase in phrases if phrase not in GROUNDS]))
    ground_text = " and ".join(grounds)
    if not shapes:
        return ground_text
    shape_text = " and ".join(filter(None, (", ".join(shapes[:-1]), shapes[-1])))
    return f"{shape_text} on {ground_text}" if ground_text else shape_text


def _pair(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """Draws a colour and a shape, out of `HELD_OUT` or out of all other pairs."""
    colors = tuple(COLORS)
    while True:
        color, shape = colors[rng.integers(len(colors))], SHAPES[rng.integers(len(SHAPES))]
        if (f"{color} {shape}" in HELD_OUT) == held_out:
            return color, shape


def _ground(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draws one ground, or two on either side of a wavy horizon: image (float), labels, names."""
    count = 1 + (rng.random() < 0.4)
    chosen = rng.choice(len(GROUNDS), count, replace=False)
    image = _TEXTURES[chosen[0]](rng, size)
    labels = np.full(size, chosen[0], np.uint8)
    if count == 2:
        y, x = _pixels(size)
        phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(1, 3)
        horizon = rng.uniform(0.3, 0.7) + rng.uniform(-0.2, 0.2) * (x / size[1] - 0.5)
        horizon = horizon + 0.03 * np.sin(phase + 2 * np.pi * waves * x / size[1])
        below = y / size[0] > horizon
        image = np.where(below[..., None], _TEXTURES[chosen[1]](rng, size), image)
        labels[below] = chosen[1]
    return image, labels, [GROUNDS[i] for i in chosen]


def _add_shape(
    rng: np.random.Generator,
    image: np.ndarray,
    labels: np.ndarray,
    color: str,
    shape: str,
    finish: str,
) -> bool:
    """Draws a shape where there is no other. Returns False if eight tries find no room."""
    height, width = labels.shape
    for _ in range(8):
        radius = rng.uniform(0.11, 0.26) * min(height, width)
        row, column = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
        y0, y1 = int(row - radius), int(row + radius) + 1
        x0, x1 = int(column - radius), int(column + radius) + 1
        if (labels[y0:y1, x0:x1] < len(GROUNDS)).all():
            break
    else:
        return False
    tilt = rng.uniform(-_TILT, _TILT)
    y, x = np.mgrid[y0:y1, x0:x1]
    y, x = (y - row) / radius, (x - column) / radius
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    inside = _OUTLINES[shape](u, v)
    paint = np.array(COLORS[color]) + rng.normal(0, 12, 3)
    contrast = -0.45 if color != "black" else 1.0
    shade = 1 + contrast * _finish(rng, finish, u * radius, v * radius)
    # A finish lightens black by a factor, so black must not be 0.
    painted = (paint.clip(0, 255) + (20 if contrast > 0 and finish != "plain" else 0)) * shade[
        ..., None
    ]
    image[y0:y1, x0:x1][inside] = painted[inside]
    labels[y0:y1, x0:x1][inside] = CLASSES.index(f"{color} {shape}")
    return True


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A star with five points at radius 1 and five notches at radius 0.42."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)  # from the nearest point
    p, q = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch_p, notch_q = 0.42 * np.cos(fifth / 2), 0.42 * np.sin(fifth / 2)
    return (1 - p) * notch_q >= q * (1 - notch_p)


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) <= 0.92,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.78,
    "triangle": lambda u, v: (v <= 0.5) & (np.sqrt(3) * abs(u) - v <= 1),
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.28) & (np.hypot(u, v) <= 0.95),
    "ring": lambda u, v: (np.hypot(u, v) <= 0.95) & (np.hypot(u, v) >= 0.55),
}


def _finish(rng: np.random.Generator, finish: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 on a stripe or a dot of a finish, 0 elsewhere; x and y are in pixels."""
    period, phase = rng.uniform(8, 14), rng.uniform(0, 2 * np.pi, 2)
    across = np.sin(2 * np.pi * x / period + phase[0])
    if finish == "striped":
        return (across > 0).astype(float)
    if finish == "dotted":
        return (across + np.sin(2 * np.pi * y / period + phase[1]) > 0.9).astype(float)
    return np.zeros_like(x)


def _pixels(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.mgrid[: size[0], : size[1]].astype(float)


def _ramp(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A linear ramp from -1 to 1 in a random direction, for the light."""
    y, x = _pixels(size)
    angle = rng.uniform(0, 2 * np.pi)
    return np.cos(angle) * (2 * x / size[1] - 1) + np.sin(angle) * (2 * y / size[0] - 1)


def _blotches(rng: np.random.Generator, size: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
    """Noise (H, W) of unit variance that is smooth over cells of `cell` pixels."""
    rows, columns = -(-size[0] // cell[0]) + 2, -(-size[1] // cell[1]) + 2
    coarse = rng.normal(size=(rows, columns))
    y, x = np.arange(size[0]) / cell[0], np.arange(size[1]) / cell[1]
    i, j = y.astype(int), x.astype(int)
    fy, fx = (y - i)[:, None], x - j
    above = coarse[i][:, j] * (1 - fx) + coarse[i][:, j + 1] * fx
    below = coarse[i + 1][:, j] * (1 - fx) + coarse[i + 1][:, j + 1] * fx
    return above * (1 - fy) + below * fy


def _tinted(rng: np.random.Generator, color: tuple[int, int, int], relief: np.ndarray):
    """A colour, slightly changed, that `relief` (H, W) lightens and darkens."""
    return (np.array(color) + rng.normal(0, 10, 3)) * (1 + relief[..., None])


def _grass(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    blades = _blotches(rng, size, (9, 2)) + 0.5 * _blotches(rng, size, (24, 24))
    return _tinted(rng, (75, 135, 50), 0.22 * blades)


def _sand(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    grain = 0.05 * rng.normal(size=size) + 0.05 * _blotches(rng, size, (8, 40))
    return _tinted(rng, (212, 182, 132), grain)


def _water(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    y, _ = _pixels(size)
    sway = 3 * _blotches(rng, size, (20, 40))
    waves = np.sin(2 * np.pi * (y + sway) / rng.uniform(10, 18))
    return _tinted(rng, (55, 110, 165), 0.16 * waves)


def _brick(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    y, x = _pixels(size)
    high, wide = rng.uniform(12, 18), rng.uniform(28, 40)
    course = y // high
    x = x + wide / 2 * (course % 2)
    mortar = (y % high < 2.5) | (x % wide < 2.5)
    shade = 0.1 * rng.normal(size=(200, 200))[course.astype(int) % 200, (x // wide).astype(int)]
    bricks = _tinted(rng, (155, 75, 55), shade + 0.05 * rng.normal(size=size))
    return np.where(mortar[..., None], 190.0, bricks)


def _wood(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    _, x = _pixels(size)
    grain = np.sin(2 * np.pi * x / rng.uniform(5, 9) + 3 * _blotches(rng, size, (60, 16)))
    seams = x % rng.uniform(36, 56) < 2
    return _tinted(rng, (125, 85, 48), 0.13 * grain - 0.5 * seams)


def _stone(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    relief = 0.16 * _blotches(rng, size, (12, 12)) + 0.06 * rng.normal(size=size)
    return _tinted(rng, (128, 128, 128), relief)


_TEXTURES = (_grass, _sand, _water, _brick, _wood, _stone)  # in the order of GROUNDS
