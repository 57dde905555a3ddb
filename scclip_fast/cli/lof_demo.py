"""LOF on the patch tokens of a CLIP vision transformer, measured beside its plain torch form.

Needs the extra `demo`; nothing else in the library imports this module.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from ..clip import SCCLIP
from ..clip.model import check_finite
from ..measure import Measurement, measure
from ..ops import lof, lof_scores
from ..segment import normalisation
from .common import CommandError, read_photo

REPEATS = 5


class Comparison(NamedTuple):
    """One size: what the model saw, what LOF found, and what each way to compute it took."""

    size: int
    grid: tuple[int, int]
    photo: Tensor  # (size, size, 3) in [0, 1], cropped as the model saw it
    tokens: Tensor  # (N, D), N = grid[0] * grid[1]
    scores: Tensor  # (N,)
    mask: Tensor  # bool (N,), True for outliers
    ours: Measurement
    plain: Measurement
    shared_outliers: int
    our_error: float  # the largest of a score, relative to float64's
    plain_error: float


def load_photo(path: Path | None) -> Image.Image:
    """The photo as RGB, upright; scikit-learn's china.jpg for None."""
    if path is None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image("china.jpg"))
    return read_photo(path)


def check_size(patch: int, size: int, neighbors: int) -> None:
    """CommandError unless size x size pixels are whole patches, more than `neighbors` of them."""
    if size % patch:
        below = size // patch * patch
        nearest = f"{below} or {below + patch}" if below else f"{patch}"
        raise CommandError(
            f"size {size} is not divisible by the model's patch size {patch}; nearest: {nearest}"
        )
    tokens = (size // patch) ** 2
    if tokens <= neighbors:
        raise CommandError(f"size {size} gives {tokens} tokens, too few for {neighbors} neighbours")


def patch_tokens(encoder: SCCLIP, pixels: Tensor) -> Tensor:
    """Patch tokens (N, D) after all blocks but the last, where SC-CLIP looks for outliers.

    Args:
        encoder: a model, whatever its method.
        pixels: (3, H, W), preprocessed.
    """
    with torch.inference_mode():
        layers, _ = encoder.tower.block_outputs(pixels[None])
    return layers[-1][0, 1:].float()


def plain_lof(x: Tensor, neighbors: int, contamination: float) -> tuple[Tensor, Tensor]:
    """SC-CLIP's LOF with one matrix product and `topk`, the N x N distances in memory.

    Returns:
        Indices of the outliers (M,) and scores (N,), as `scclip_fast.lof`.
    """
    norms = x.square().sum(dim=1)
    distances = torch.addmm(norms, x, x.T, alpha=-2).add_(norms[:, None])  # squared
    nearest, indices = distances.topk(neighbors + 1, largest=False)
    nearest, indices = nearest[:, 1:], indices[:, 1:]  # the first is the token itself
    reachability = nearest.maximum(nearest[:, -1:])
    density = 1 / reachability.mean(dim=1)
    scores = (density[indices] / density[:, None]).mean(dim=1)
    return (scores > torch.quantile(scores, 1 - contamination)).nonzero()[:, 0], scores


def compare(
    encoder: SCCLIP,
    tokenizer: Callable,
    photo: Image.Image,
    size: int,
    neighbors: int,
    contamination: float,
) -> Comparison:
    """Run both on the tokens of the photo, cut to size x size pixels.

    Warmed up, in turns, medians of `REPEATS`.
    """
    device = encoder.tower.device
    stated = getattr(encoder.tower.visual, "preprocess_cfg", {})
    mean, std = normalisation(encoder, tokenizer)
    preprocess = PreprocessCfg(**stated | {"size": size, "mean": mean, "std": std})
    pixels = image_transform_v2(preprocess, is_train=False)(photo)
    tokens = patch_tokens(encoder, pixels.to(device, encoder.tower.dtype))
    check_finite("patch tokens", tokens)
    calls = (
        lambda: lof(tokens, neighbors, contamination),
        lambda: plain_lof(tokens, neighbors, contamination),
    )
    for call in calls:
        call()
    runs = [[measure(call, device) for call in calls] for _ in range(REPEATS)]
    ours, plain = (_median(measurements) for measurements in zip(*runs, strict=True))
    (found, scores), (plain_found, plain_scores) = ours.result, plain.result
    exact = lof_scores(tokens.double(), neighbors)
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return Comparison(
        size=size,
        grid=(size // encoder.patch_size,) * 2,
        photo=(pixels * std + mean).clamp(0, 1).permute(1, 2, 0),
        tokens=tokens,
        scores=scores,
        mask=torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, found, True),
        ours=ours,
        plain=plain,
        shared_outliers=int(torch.isin(found, plain_found).sum()),
        our_error=largest_error(scores, exact),
        plain_error=largest_error(plain_scores, exact),
    )


def largest_error(scores: Tensor, exact: Tensor) -> float:
    """Relative, over all tokens."""
    return (scores / exact - 1).abs().max().item()


def _median(runs: tuple[Measurement, ...]) -> Measurement:
    seconds = statistics.median(run.seconds for run in runs)
    known = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Measurement(runs[-1].result, seconds, int(statistics.median(known)) if known else None)
