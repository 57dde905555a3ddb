"""What a SAM3 finds of each class in an image, before the classes compete for pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sam3_heads import Heads

MASK_THRESHOLD = 0.5  # a pixel belongs to an instance above this mask probability, as in SAM3


@dataclass
class ClassDetails:
    """The presence, instances and semantic map of one class, on the CPU.

    The instances are those of all synonyms, the best first. A synonym's instance of the same object
    is listed again. Masks and the map have SAM3's own size (h, w), 288 x 288 at full size.

    Attributes:
        name: the first name of the class.
        presence: the probability that the image has the class, that of its most present synonym;
            None for a model without a presence token.
        left_out: whether the preview left the class out. It then has the presence of the preview,
            no instances and no map.
        scores: (n,) float32, the probability of each instance: that of its query, times the
            presence if the segmenter multiplies by it.
        boxes: (n, 4) float32, x0, y0, x1, y1 in pixels of the image.
        mask_bits: (n, h, ceil(w / 8)) uint8, 8 pixels a byte, the leftmost the highest bit.
        semantic: (h, w) float32, the probability of the class at each pixel, the largest of its
            synonyms, not multiplied by the presence; None for a model without a semantic head.
        size: (h, w).
    """

    name: str
    presence: float | None
    left_out: bool
    scores: Tensor
    boxes: Tensor
    mask_bits: Tensor
    semantic: Tensor | None
    size: tuple[int, int]

    def masks(self) -> Tensor:
        """Returns the masks of the instances, (n, h, w), bool."""
        bits = np.unpackbits(self.mask_bits.numpy(), axis=-1, count=self.size[1])
        return torch.from_numpy(bits).bool()


@dataclass
class Instances:
    """The instances of one prompt, with the fields of `ClassDetails`."""

    presence: float | None
    scores: Tensor
    boxes: Tensor
    mask_bits: Tensor
    semantic: Tensor | None
    size: tuple[int, int]


def instances(heads: Heads, prompt: int, min_score: float, presence: bool) -> Instances:
    """Returns the instances of one prompt whose score is at least `min_score`.

    The boxes are shares of the width and height.
    """
    scores = heads.scores[prompt]
    if presence:
        assert heads.presence is not None  # the segmenter's constructor checks it
        scores = scores * heads.presence[prompt]
    chosen = (scores >= min_score).nonzero()[:, 0]
    masks = heads.mask(prompt, chosen) > MASK_THRESHOLD
    return Instances(
        presence=None if heads.presence is None else heads.presence[prompt].item(),
        scores=scores[chosen].cpu(),
        boxes=heads.boxes[prompt, chosen].cpu(),
        mask_bits=torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1)),
        semantic=None if heads.semantic is None else heads.semantic[prompt].cpu(),
        size=(masks.shape[1], masks.shape[2]),
    )


def merged(name: str, found: Sequence[Instances], size: tuple[int, int]) -> ClassDetails:
    """Returns the details of a class from those of its synonyms, for an image of a size (H, W)."""
    scores = torch.cat([each.scores for each in found])
    order = scores.argsort(descending=True, stable=True)
    height, width = size
    maps = [each.semantic for each in found if each.semantic is not None]
    presences = [each.presence for each in found if each.presence is not None]
    return ClassDetails(
        name=name,
        presence=max(presences, default=None),
        left_out=False,
        scores=scores[order],
        boxes=torch.cat([each.boxes for each in found])[order]
        * torch.tensor([width, height, width, height]),
        mask_bits=torch.cat([each.mask_bits for each in found])[order],
        semantic=torch.stack(maps).amax(dim=0) if maps else None,
        size=found[0].size,
    )


def left_out(name: str, presence: float, size: tuple[int, int]) -> ClassDetails:
    """Returns the details of a class that the preview left out, for masks of a size (h, w)."""
    height, width = size
    return ClassDetails(
        name=name,
        presence=presence,
        left_out=True,
        scores=torch.zeros(0),
        boxes=torch.zeros(0, 4),
        mask_bits=torch.zeros(0, height, -(-width // 8), dtype=torch.uint8),
        semantic=None,
        size=size,
    )
