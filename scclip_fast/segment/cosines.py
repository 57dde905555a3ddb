"""A CLIP on the windows of images, in batches: the cosines of their patches with names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from ..clip import SCCLIP
from ..clip.model import check_finite
from ..clip.proxy import ProxyFeatures
from ..precision import true_float32
from .propagation import propagate_windows

MAX_WINDOWS = 128  # in one batch; a very large image has more and takes several batches

Places = list[tuple[slice, slice]]
Crops = tuple[int, list[Tensor]]  # the index of an image, and windows (1, 3, h, w) of it


def window_cosines(
    encoder: SCCLIP, text: Tensor, images: list[Tensor], places: list[Places]
) -> list[list[Tensor]]:
    """Returns the cosines (names, h, w) of the windows of each image.

    The windows of all images share batches. With the method "lposs", the cosines of the windows of
    an image are propagated together.

    Args:
        encoder: the model.
        text: (names, E), unit vectors.
        images: (1, 3, h, w) each, normalised for the model.
        places: the rows and columns, in pixels, of the windows of each image.
    """
    maps: list[list[Tensor]] = [[] for _ in images]  # (names, h', w') of each window
    tokens: list[list[Tensor]] = [[] for _ in images]  # (D, h', w'), the proxy's
    windows = ((i, [crop]) for i, each in enumerate(_crops(images, places)) for crop in each)
    for batch in _batches(windows):
        owners, crops = zip(*batch, strict=True)
        cosines, features = _encode(encoder, text, torch.cat([crop for (crop,) in crops]))
        for place, index in enumerate(owners):
            maps[index].append(cosines[place].contiguous())
            if features is not None:
                tokens[index].append(features.map[place])
    for index, of_windows in enumerate(tokens):
        if of_windows:
            size = (images[index].shape[2], images[index].shape[3])
            maps[index] = propagate_windows(maps[index], of_windows, places[index], size)
    return maps


def stitched_cosines(
    encoder: SCCLIP, text: Tensor, images: list[Tensor], places: list[Places]
) -> list[Tensor]:
    """Returns the cosines (names, h, w) of images whose windows the last block joins.

    See `SCCLIP.encode_stitched`, and `window_cosines` for the arguments.
    """
    maps: dict[int, Tensor] = {}
    for batch in _batches(enumerate(_crops(images, places))):
        indices, crops = zip(*batch, strict=True)
        corners = [[(y.start, x.start) for y, x in places[index]] for index in indices]
        encoded = encoder.encode_stitched(torch.cat(list(chain(*crops))), corners)
        for index, (dense, features) in zip(indices, encoded, strict=True):
            cosines = _cosines(dense, text)[0]
            if encoder.method == "lposs" and features is not None:
                size = (images[index].shape[2], images[index].shape[3])
                whole = [(slice(0, size[0]), slice(0, size[1]))]
                (cosines,) = propagate_windows([cosines], [features.map[0]], whole, size)
            maps[index] = cosines
    return [maps[index] for index in range(len(images))]


def _crops(images: list[Tensor], places: list[Places]) -> Iterator[list[Tensor]]:
    """Yields the windows (1, 3, h, w) of each image."""
    for image, of_image in zip(images, places, strict=True):
        yield [image[:, :, rows, columns] for rows, columns in of_image]


def _batches(images: Iterable[Crops]) -> Iterator[list[Crops]]:
    """Yields windows of one size, at most `MAX_WINDOWS` unless a single entry has more."""
    groups: dict[torch.Size, list[Crops]] = {}
    for index, crops in images:
        groups.setdefault(crops[0].shape, []).append((index, crops))
    for group in groups.values():
        batch: list[Crops] = []
        count = 0
        for index, crops in group:
            if batch and count + len(crops) > MAX_WINDOWS:
                yield batch
                batch, count = [], 0
            batch.append((index, crops))
            count += len(crops)
        yield batch


def _encode(encoder: SCCLIP, text: Tensor, windows: Tensor) -> tuple[Tensor, ProxyFeatures | None]:
    """Returns the cosines (B, names, h, w) of windows (B, 3, H, W), and what LPOSS needs."""
    if encoder.method == "lposs":
        dense, features = encoder.encode_with_proxy(windows)
        return _cosines(dense, text), features
    return _cosines(encoder.encode_dense(windows), text), None


@true_float32
def _cosines(dense: Tensor, text: Tensor) -> Tensor:
    """Returns float32 cosines (B, names, h, w) of unit vectors (B, h, w, E) and (names, E)."""
    cosines = (dense.float() @ text.float().T).permute(0, 3, 1, 2)
    check_finite("image features", cosines)
    return cosines
