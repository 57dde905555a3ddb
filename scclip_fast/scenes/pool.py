"""Drawn scenes in memory, and batches of windows of them with captions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..extras import needs
from .draw import CLASSES, GROUNDS, SIZE, caption, scene

with needs("clip"):
    import numpy as np
    import open_clip

VISIBLE = 0.01  # a window has the name of what fills more than this share of it
AROUND_SHAPES = 0.75  # of the windows of a batch; the others lie anywhere


class Batch(NamedTuple):
    """Windows of one size, each of another scene, and their captions."""

    pixels: Tensor  # (B, 3, h, w), normalised
    corners: Tensor  # (B, 2), the first row and column of each window, in patches
    names: list[list[str]]  # of all that a window shows
    captions: list[str]  # of these names, or of some
    template: Callable[[str], str]  # from a name to a sentence


class Shape(NamedTuple):
    """A shape in a scene of the pool."""

    scene: int
    center: np.ndarray  # row and column, in pixels
    extent: int  # the longer side of its box, in pixels


class Pool:
    """Keeps scenes in memory and makes batches of windows with captions.

    Args:
        size: number of scenes.
        config: of the model, as open_clip's open_clip_config.json.
    """

    def __init__(self, size: int, config: dict) -> None:
        with ProcessPoolExecutor() as workers:
            scenes = list(workers.map(partial(scene, "train"), range(size), chunksize=100))
        self.images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
        self.labels = [s.labels for s in scenes]
        # The class is the last two words: colour and shape, or a ground.
        self.phrases = [{_class(phrase): phrase for phrase in s.phrases} for s in scenes]
        self.shapes = [shape for index in range(size) for shape in self._shapes(index)]
        preprocess = config["preprocess_cfg"]
        self.mean = 255 * torch.tensor(preprocess["mean"])[:, None, None]
        self.std = 255 * torch.tensor(preprocess["std"])[:, None, None]
        self.patch = config["model_cfg"]["vision_cfg"]["patch_size"]
        self.grid = SIZE[0] // self.patch

    def windows(self, rng: np.random.Generator, count: int, side: int) -> Batch:
        """Draws windows of `side` patches, most of them around a shape, with captions."""
        indices = rng.choice(len(self.images), count, replace=False)
        corners = rng.integers(0, self.grid - side + 1, (count, 2))
        if side < self.grid:
            around = round(AROUND_SHAPES * count)
            fitting = self._fitting(side)
            chosen = [fitting[i] for i in rng.choice(len(fitting), around, replace=False)]
            indices[:around] = [shape.scene for shape in chosen]
            centers = np.stack([shape.center for shape in chosen]) / self.patch
            first = centers - side / 2 + rng.uniform(-1, 1, centers.shape)
            corners[:around] = np.round(first).clip(0, self.grid - side)
        name, names, crops = _naming(rng), [], []
        for index, (y, x) in zip(indices, corners * self.patch, strict=True):
            rows, columns = slice(y, y + side * self.patch), slice(x, x + side * self.patch)
            crops.append(self.images[index, :, rows, columns])
            visible = self._visible(index, rows, columns)
            names.append(list(dict.fromkeys(map(name, visible))))
        pixels = (torch.stack(crops).float() - self.mean) / self.std
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        template = templates[rng.integers(len(templates))] if rng.random() < 0.5 else str
        captions = [caption(rng, each) for each in names]
        return Batch(pixels, torch.from_numpy(corners), names, captions, template)

    def _fitting(self, side: int) -> list[Shape]:
        """Returns the shapes that a window shows nearly whole and is not too large for."""
        pixels = side * self.patch
        return [s for s in self.shapes if 3 / 8 * pixels < s.extent <= pixels + self.patch * 3 / 8]

    def _shapes(self, index: int) -> list[Shape]:
        shapes = []
        for number in np.unique(self.labels[index]):
            if number >= len(GROUNDS):
                places = np.argwhere(self.labels[index] == number)
                low, high = places.min(axis=0), places.max(axis=0) + 1
                shapes.append(Shape(index, (low + high) / 2, int((high - low).max())))
        return shapes

    def _visible(self, index: int, rows: slice, columns: slice) -> list[str]:
        """Returns the phrases of all classes that fill enough of a window."""
        labels = self.labels[index][rows, columns]
        areas = np.bincount(labels.ravel(), minlength=len(CLASSES))
        return [self.phrases[index][c] for c in np.flatnonzero(areas > VISIBLE * labels.size)]


def _class(phrase: str) -> int:
    """Returns the index of the class that a phrase names, such as "striped red star"."""
    return CLASSES.index(" ".join(phrase.split()[-2:]))


def _naming(rng: np.random.Generator) -> Callable[[str], str]:
    """Draws how the shapes of a batch are named: wholly, or by one property alone.

    Names of parts let the text encoder, and the patches, learn colour and outline apart.
    """
    draw = rng.random()
    if draw < 0.4:
        return lambda phrase: " ".join(phrase.split()[-2:])  # "red star" of "striped red star"
    if draw < 0.6:
        return lambda phrase: phrase.split()[-1]  # "star"
    if draw < 0.75:
        return lambda phrase: phrase if phrase in GROUNDS else f"{phrase.split()[-2]} shape"
    return str
