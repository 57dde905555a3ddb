"""The outlier patches of a photo, for `scclip-fast lof`: model input, tokens, scores, files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from .. import __version__
from ..clip import SCCLIP
from ..clip.model import check_finite
from ..ops import lof_scores, outlier_mask
from ..plots.outliers import PhotoOutliers
from ..segment.clip import normalisation
from .files import read_photo
from .options import CommandError


def load_photo(path: Path | None) -> Image.Image:
    """Reads a photo as upright RGB; None stands for scikit-learn's china.jpg."""
    if path is None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image("china.jpg"))
    return read_photo(path)


def check_size(patch: int, size: int, neighbors: int) -> None:
    """Raises CommandError unless size x size pixels are whole patches, more than `neighbors`."""
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
    """Returns the patch tokens (N, D) after all blocks but the last, where SC-CLIP computes LOF.

    Args:
        encoder: a model of any method.
        pixels: (3, H, W), preprocessed.
    """
    with torch.inference_mode():
        layers, _ = encoder.tower.block_outputs(pixels[None])
    return encoder.tower.patches(layers[-1])[0].float()


def find(
    encoder: SCCLIP,
    tokenizer: Callable,
    photo: Image.Image,
    size: int,
    neighbors: int,
    contamination: float,
) -> PhotoOutliers:
    """Finds the outliers of a photo, resized and cropped to size x size pixels.

    Raises:
        NotFiniteError: a patch token is not finite.
    """
    preprocess_cfg = getattr(encoder.tower.visual, "preprocess_cfg", {})
    mean, std = normalisation(encoder, tokenizer)
    preprocess = PreprocessCfg(**preprocess_cfg | {"size": size, "mean": mean, "std": std})
    pixels = image_transform_v2(preprocess, is_train=False)(photo)
    tokens = patch_tokens(encoder, pixels.to(encoder.tower.device, encoder.tower.dtype))
    check_finite("patch tokens", tokens)
    scores = lof_scores(tokens, neighbors)
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return PhotoOutliers(
        photo=(pixels * std + mean).clamp(0, 1).permute(1, 2, 0),
        grid=(size // encoder.patch_size,) * 2,
        tokens=tokens,
        scores=scores,
        mask=outlier_mask(scores, contamination),
    )


def report(photos: list[PhotoOutliers], settings: dict) -> dict:
    """Returns scores, outliers and settings for `files.encode_json`.

    Rows and columns count the patches from the upper left one on.
    """
    return {
        "settings": settings,
        "versions": {"scclip_fast": __version__, "torch": torch.__version__},
        "sizes": [
            {
                "size": len(photo.photo),
                "grid": list(photo.grid),
                "scores": _score_grid(photo).tolist(),
                "outliers": photo.mask.cpu().unflatten(0, photo.grid).nonzero().tolist(),
            }
            for photo in photos
        ],
    }


def encode_npy(photo: PhotoOutliers) -> bytes:
    """Encodes the scores (rows, columns), float32, as a .npy file."""
    file = io.BytesIO()
    np.save(file, _score_grid(photo))
    return file.getvalue()


def _score_grid(photo: PhotoOutliers) -> np.ndarray:
    return photo.scores.float().cpu().unflatten(0, photo.grid).numpy()
