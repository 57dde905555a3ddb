"""An SCCLIP for several methods or configurations of one image."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .model import SCCLIP

Result = TypeVar("Result")

_KEPT_BYTES = 2**30  # of block outputs; more windows than these hold are encoded again


class SharedLayers(SCCLIP):
    """An SCCLIP that keeps the block outputs of its last batches of images until `forget`.

    Methods and configurations differ in the last block alone. So one pass through the other blocks
    serves all of them: set `method` and `config` between calls with the same images. A model with a
    proxy may change to a method that has no use for it.

    Attributes:
        kept: the batches of images, each with the result of `SCCLIP.layers` and its seconds.
        saved: the seconds that kept results have saved.
    """

    kept: list[tuple[Tensor, tuple[list[Tensor], tuple[int, int]], float]]
    saved: float = 0.0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Drops the block outputs."""
        self.kept = []

    def layers(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        for batch, result, seconds in self.kept:
            if torch.equal(batch, images):
                self.saved += seconds
                return result
        result, seconds = timed(super().layers, images, images.device)
        held = sum(output.nbytes for _, (outputs, _), _ in self.kept for output in outputs)
        if not held or held + sum(output.nbytes for output in result[0]) <= _KEPT_BYTES:
            self.kept.append((images, result, seconds))
        return result


def timed(
    function: Callable[[Tensor], Result], images: Tensor, device: torch.device
) -> tuple[Result, float]:
    """Returns function(images) and the seconds that it takes, with the work of a GPU."""
    start = time.perf_counter()
    result = function(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
