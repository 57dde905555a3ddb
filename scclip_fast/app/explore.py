"""The results of `scclip-fast app`: classes, outliers, and the effect of each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..calibration import find_outliers
from ..clip import SCCLIP, SCCLIPConfig
from ..clip.config import STAGES
from ..clip.shared_layers import SharedLayers
from ..plots.outliers import pca_colours
from ..segment import Segmenter

LONG_SIDE = 1024  # pixels; larger photos are made smaller first, as the page shows no more
_CLASS_LISTS = 8  # whose text features are kept


class Variant(NamedTuple):
    """The result of SC-CLIP with the settings of the page, or with one change to them."""

    name: str
    labels: np.ndarray  # (H, W), uint8, of the photo's size
    colours: np.ndarray  # (h, w, 3), uint8: the features of the patches, see `pca_colours`
    changed: float  # share of the pixels whose class differs from that of the first variant


class Result(NamedTuple):
    """All results for one photo."""

    photo: Image.Image
    names: list[str]  # of the classes
    variants: list[Variant]  # SC-CLIP with the settings of the page comes first
    scores: Tensor | None  # (h, w); None where there are too few patches for so many neighbours
    outliers: Tensor | None  # bool (h, w)


class _Encoder(SharedLayers):
    """A model that keeps the block outputs of the last image, and its features.

    All variants, and all settings of the sliders, share one pass through the blocks before the
    last.
    """

    def layers(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        if self.kept and not torch.equal(self.kept[0][0], images):
            self.forget()
        return super().layers(images)

    def encode_dense(self, images: Tensor) -> Tensor:
        self.features = super().encode_dense(images)
        return self.features


class Explorer:
    """Computes the results for photos, class names and settings, one photo at a time.

    Args:
        encoder: the model; its method and config are ignored.
        tokenizer: the tokenizer of the model.
        short_side: pixels of the shorter side of a photo, as the model input. The model encodes the
            photo as a whole, not in windows, so that the outliers are those of one picture.
    """

    def __init__(self, encoder: SCCLIP, tokenizer: Callable, short_side: int) -> None:
        self._encoder = _Encoder(encoder.model)
        self._lock = Lock()

        make = partial(Segmenter, self._encoder, tokenizer, slide_crop=None, short_side=short_side)
        self._segmenter = lru_cache(_CLASS_LISTS)(make)

    @property
    def config(self) -> SCCLIPConfig:
        """The settings published for the model's depth."""
        return SCCLIPConfig.for_depth(len(self._encoder.tower.blocks))

    @torch.inference_mode()
    def explore(self, photo: Image.Image, classes: list[str], config: SCCLIPConfig) -> Result:
        """Segments a photo by SC-CLIP, by plain CLIP, and by SC-CLIP with each stage switched.

        Args:
            photo: RGB.
            classes: see `Segmenter`.
            config: the settings of SC-CLIP for this model.

        Raises:
            ValueError: a setting is out of its range.
        """
        config.check(len(self._encoder.tower.blocks))
        photo = photo.copy()
        photo.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        with self._lock:
            segmenter = self._segmenter(tuple(classes))
            results = [
                (name, *self._segment(segmenter, photo, method, changed))
                for name, method, changed in _variants(config)
            ]
            scores, outliers = self._outliers(config)
        _, first, features = results[0]
        tokens = [features.flatten(0, 1) for _, _, features in results]
        variants = [
            Variant(
                name,
                labels,
                (255 * colours).round().byte().unflatten(0, features.shape[:2]).cpu().numpy(),
                (labels != first).mean().item(),
            )
            for (name, labels, _), colours in zip(
                results, pca_colours(tokens, tokens[0]), strict=True
            )
        ]
        return Result(photo, segmenter.classes, variants, scores, outliers)

    def _segment(
        self, segmenter: Segmenter, photo: Image.Image, method: str, config: SCCLIPConfig
    ) -> tuple[np.ndarray, Tensor]:
        """Returns labels (H, W), uint8, and features (h, w, E), float32."""
        self._encoder.method, self._encoder.config = method, config
        labels = segmenter(photo).to(torch.uint8).numpy()
        return labels, self._encoder.features[0].float()

    def _outliers(self, config: SCCLIPConfig) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns scores and outliers (h, w) of the last photo, by the rule of SC-CLIP."""
        _, (layers, grid), _ = self._encoder.kept[0]
        k, contamination = config.outlier_n_neighbors, config.outlier_contamination
        patches = self._encoder.tower.patches(layers[-1])
        scores_and_mask = find_outliers(patches, k, contamination, config.outlier_score)
        if scores_and_mask is None:
            return None, None
        scores, mask = (each[0].unflatten(0, grid).cpu() for each in scores_and_mask)
        return scores.float(), mask


def _variants(config: SCCLIPConfig) -> Iterator[tuple[str, str, SCCLIPConfig]]:
    """Yields the name, the method and the settings of each variant."""
    yield "SC-CLIP", "scclip", config
    yield "plain CLIP", "clip", config
    for stage in STAGES:
        on = getattr(config, stage)
        name = f"{'without' if on else 'with'} {stage.replace('_', ' ')}"
        yield name, "scclip", replace(config, **{stage: not on})
