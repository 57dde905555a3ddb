"""The results of SAM3's heads for a batch of prompts, and the score of a class made from them.

`sam3_huggingface` and `sam3_meta` run the model of each package and return `Heads`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clip.model import check_finite
from ..ops import _check

HEADS = ("instance", "semantic")
MAX_PROMPTS = 32  # a forward pass; published segmenters of whole vocabularies use this number
# For the prompts of one pass, one at full size: there 6 prompts a pass take 1.09 times as long.
_CPU_BYTES = 2**29


@dataclass(frozen=True)
class Preview:
    """Settings of the preview, which chooses the classes that are decoded in full.

    The trunk runs once an image in any case. The preview averages its features to a coarser grid
    and runs the DETR encoder and decoder on that grid for every class. The classes with the
    highest presence are decoded in full, and the others have the score 0. A class takes a quarter
    of the time of a full decoding (3.3 instead of 13 s at full size, on two CPU cores).

    The defaults are those of ActiveSAM (672 of 1008 pixels, the top fifth, at most 40 classes),
    which runs the whole model on a smaller photo instead. Its figures hold for that preview.

    Attributes:
        scale: side of the coarser grid over the side of the model's own, in (0, 1].
        share: share of the classes that are decoded, in (0, 1], rounded up to whole classes.
        most: the largest number of classes that are decoded, at least 1.

    Raises:
        TypeError: a setting has another type.
        ValueError: a setting is out of range.
    """

    scale: float = 2 / 3
    share: float = 0.2
    most: int = 40

    def __post_init__(self) -> None:
        for name in ("scale", "share"):
            if not 0 < _check.number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        _check.integer("most", self.most, 1)

    def best(self, presence: Sequence[float]) -> list[int]:
        """Returns the indices of the classes to decode, in ascending order.

        Of equally present classes the one named first is decoded.
        """
        # 0.07 x 100 is 7.000000000000001 in floating point, which must not become 8.
        count = min(math.ceil(self.share * len(presence) - 1e-9), self.most)
        ranked = sorted(range(len(presence)), key=lambda index: -presence[index])
        return sorted(ranked[: max(count, 1)])


@dataclass
class Heads:
    """The results of the heads for P prompts with Q object queries each.

    Attributes:
        presence: (P,) float32, the probability that the image has the prompt's concept; None for
            a model without a presence token.
        scores: (P, Q) float32, the probability that a query is an instance, if the concept is
            present.
        boxes: (P, Q, 4) float32, x0, y0, x1, y1 as shares of the width and height.
        masks: (P, Q, h, w), logits, in the model's dtype.
        semantic: (P, h, w) float32, probability of the concept at each pixel; None for a model
            without a semantic head.
    """

    presence: Tensor | None
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    semantic: Tensor | None

    @classmethod
    def of_logits(
        cls,
        presence: Tensor | None,
        scores: Tensor,
        boxes: Tensor,
        masks: Tensor,
        semantic: Tensor | None,
    ) -> Heads:
        """Returns the heads of logits (P, 1), (P, Q), (P, Q, h, w) and (P, 1, h, w).

        Raises:
            NotFiniteError: a logit or a box is not finite.
        """
        tensors = (presence, scores, boxes, masks, semantic)
        check_finite("logits and masks", *(tensor for tensor in tensors if tensor is not None))
        return cls(
            presence=None if presence is None else presence[:, 0].float().sigmoid(),
            scores=scores.float().sigmoid(),
            boxes=boxes.float(),
            masks=masks,
            semantic=None if semantic is None else semantic[:, 0].float().sigmoid(),
        )

    def mask(self, prompt: int, queries: Tensor | slice = slice(None)) -> Tensor:
        """Returns the mask probabilities (n, h, w), float32, of some queries of a prompt."""
        return self.masks[prompt, queries].float().sigmoid()

    def maps(self, heads: Sequence[str], presence: bool) -> Iterator[Tensor]:
        """Yields the score (h, w), float32, of each prompt; see `Sam3Segmenter`."""
        # One prompt at a time: the float32 masks of one at SAM3's full size take 66 MB.
        for prompt in range(len(self.scores)):
            maps = []
            if "instance" in heads:
                weighted = self.mask(prompt).mul_(self.scores[prompt, :, None, None])
                maps.append(weighted.amax(dim=0))
            if "semantic" in heads:
                assert self.semantic is not None  # the segmenter's constructor checks it
                maps.append(self.semantic[prompt])
            score = maps[0] if len(maps) == 1 else torch.maximum(*maps)
            if presence:
                assert self.presence is not None  # the same
                score = score * self.presence[prompt]
            yield score


def check_heads(heads: Sequence[str]) -> tuple[str, ...]:
    """Returns the heads as a tuple; ValueError unless they are some of `HEADS`, each once."""
    try:
        names = () if isinstance(heads, str) else tuple(heads)
    except TypeError:
        names = ()
    if not names or any(name not in HEADS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"heads must be one or both of {HEADS}, got {heads!r}")
    return names


def prompts_in_memory(finest: Tensor, queries: int) -> int:
    """Returns the number of prompts for a pass, 1 to `MAX_PROMPTS`, by an estimate of the memory.

    A prompt takes about 3 maps of the pixel decoder's channels and 1 of the queries: 0.32 GB in
    float32 at SAM3's full size, where 0.33 GB were measured on a CPU. The prompts of a pass may
    take half of a GPU's free memory, or 512 MiB on a CPU.

    Args:
        finest: (1, C, h, w), the finest features of the vision encoder.
        queries: the number of object queries.
    """
    _, channels, height, width = finest.shape
    prompt_bytes = (3 * channels + queries) * height * width * finest.element_size()
    budget = _CPU_BYTES
    if finest.is_cuda:
        free, _ = torch.cuda.mem_get_info(finest.device)
        cached = torch.cuda.memory_reserved(finest.device)
        budget = (free + cached - torch.cuda.memory_allocated(finest.device)) // 2
    return min(max(budget // prompt_bytes, 1), MAX_PROMPTS)
