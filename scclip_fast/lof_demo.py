"""LOF on the patch tokens of a CLIP vision transformer, measured beside its plain torch form.

Needs the extra `demo`; nothing else in the library imports this module.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torch import Tensor, nn

from .cli import CommandError
from .measure import Measurement, measure
from .ops import lof, lof_scores

REPEATS = 5
SEED = 0
_HUB_TIMEOUT = 10  # seconds for the one request that decides whether to download
_WEIGHT_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")


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
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.UnidentifiedImageError:
        reason = "not an image, or a damaged one"
    except OSError as error:
        reason = error.strerror or error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's decoders
        reason = error
    raise CommandError(f"cannot read the photo {path}: {reason}")


def check_model(name: str, tag: str) -> None:
    """CommandError unless `name` is a plain vision transformer of open_clip with weights `tag`."""
    if name not in (names := _model_names()):
        raise CommandError(f"unknown or unsupported model {name!r}; choose from {', '.join(names)}")
    if not open_clip.is_pretrained_cfg(name, tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise CommandError(f"{name} has no pretrained weights {tag!r}; choose from {tags}")


def check_size(name: str, size: int, neighbors: int) -> None:
    """CommandError unless size x size pixels are whole patches, more than `neighbors` of them."""
    patch = open_clip.get_model_config(name)["vision_cfg"]["patch_size"]
    if size % patch:
        below = size // patch * patch
        nearest = f"{below} or {below + patch}" if below else f"{patch}"
        raise CommandError(
            f"size {size} is not divisible by the patch size {patch} of {name}; nearest: {nearest}"
        )
    tokens = (size // patch) ** 2
    if tokens <= neighbors:
        raise CommandError(f"size {size} gives {tokens} tokens, too few for {neighbors} neighbours")


def fetch_weights(name: str, tag: str) -> str | None:
    """Bring the weights into the hub's cache; returns why that failed, or None.

    One short request comes first: without a network, open_clip would retry for most of a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    config = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(config["hf_hub"])
    files = (file,) if file else _WEIGHT_FILES
    try:
        if not any(isinstance(try_to_load_from_cache(repository, f), str) for f in files):
            try:
                get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=_HUB_TIMEOUT)
            except EntryNotFoundError:
                pass  # the hub answers; open_clip knows where else to look
        open_clip.download_pretrained(config)
    except Exception as error:  # errors of httpx or requests, by the version of the hub's client
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def load_model(name: str, tag: str | None, size: int) -> nn.Module:
    """The model for images of size x size, in evaluation mode; random weights for tag None.

    The random ones are drawn at the model's own size and their position embedding is stretched,
    as pretrained weights are: all sizes see one network.
    """
    if tag is not None:
        quick_gelu = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        model = open_clip.create_model(
            name, pretrained=tag, force_image_size=size, force_quick_gelu=quick_gelu
        )
        return model.eval()
    with _no_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        weights = open_clip.create_model(name).state_dict()
        model = open_clip.create_model(name, force_image_size=size)
    resize_pos_embed(weights, model)
    model.load_state_dict(weights)
    return model.eval()


def patch_tokens(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Patch tokens (N, D) after all blocks but the last, where SC-CLIP looks for outliers.

    Args:
        visual: open_clip's VisionTransformer.
        pixels: (3, H, W), preprocessed.
    """
    with torch.inference_mode(), _no_attention_matrices():
        tokens = visual._embeds(pixels[None])
        if not visual.transformer.batch_first:
            tokens = tokens.transpose(0, 1)
        for block in visual.transformer.resblocks[:-1]:
            tokens = block(tokens)
        if not visual.transformer.batch_first:
            tokens = tokens.transpose(0, 1)
    return tokens[0, 1:].float()


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
    model: nn.Module, photo: Image.Image, neighbors: int, contamination: float
) -> Comparison:
    """Run both on the photo's tokens: warmed up, in turns, medians of `REPEATS`."""
    visual = model.visual
    device = visual.conv1.weight.device
    preprocess = PreprocessCfg(**visual.preprocess_cfg)
    pixels = image_transform_v2(preprocess, is_train=False)(photo)
    tokens = patch_tokens(visual, pixels.to(device))
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
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return Comparison(
        size=pixels.shape[-1],
        grid=visual.grid_size,
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


def _model_names() -> list[str]:
    """Vision transformers of open_clip's own (not timm's) that have weights and need no hub."""
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        own = isinstance(vision.get("layers"), int) and "timm_model_name" not in vision
        if own and "hf_model_name" not in config["text_cfg"]:
            names += [name] if open_clip.list_pretrained_tags_by_model(name) else []
    return names


@contextmanager
def _no_warnings() -> Iterator[None]:
    """open_clip warns of random weights; here they are asked for."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def _no_attention_matrices() -> Iterator[None]:
    """Attention without its N x N matrices.

    On the CPU, the inference fast path of nn.MultiheadAttention builds those of all heads: for a
    block of ViT-B/16 at 1008, 0.8 GB and 2.5 s instead of 0.2 GB and 1.6 s on two cores.
    """
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)
