"""Segmenter: from an image and class names to a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import SCCLIP
from .clip.model import check_finite
from .clip.prompts import text_features
from .ops import _check
from .pamr import pamr
from .picture import Picture, seen_size, to_tensor, upsampled, windows
from .precision import true_float32

_WINDOWS = 128  # in one batch; more, of very large images, take several
#: OpenAI's, for models that state none
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Segmenter(nn.Module):
    """Open-vocabulary segmentation with a frozen CLIP, as SC-CLIP does it.

    The cosine similarities of patches and class names are upsampled to the image, averaged where
    windows overlap, scaled and made probabilities by a softmax over all names; a class has that of
    its best synonym. `half()`, `bfloat16()`, `double()` and `float()` set the dtype of the encoder
    and of the text features; cosines and probabilities are float32.

    Args:
        encoder: see `scclip_fast.clip.create_model`; of transformers, around a CLIPModel.
        tokenizer: its tokenizer, of the same library; or its CLIPProcessor, whose mean and standard
            deviation the images then get. OpenAI's are those of other models that state none.
        classes: one entry a class, synonyms after commas: "person, man, woman".
        templates: of captions, callables or format strings, whose text features are averaged; None
            for the 80 of OpenAI, which come with open_clip.
        logit_scale: sharpness of the probabilities; 40 as published.
        prob_thd: pixels whose largest probability is below become `background`.
        area_thd: classes with at most this share of all pixels that are not `background` are taken
            out; None for no such rule.
        background: index of a class; required by prob_thd > 0 and by area_thd.
        slide_crop: side of the square windows in pixels, None for the whole image at once.
        slide_stride: step of the windows in pixels, 1 to slide_crop.
        short_side: pixels to which the image's shorter side is resized (bilinear, as published),
            unless the longer would exceed 2048; None for the size that it has.
        pamr_steps: of refinement along the edges of the image, 0 for none; as it needs all maps at
            the image's own size, memory grows with their number.

    Attributes:
        classes: the first name of each class.

    Raises:
        TypeError: a setting of another type.
        ValueError: no classes, an empty or repeated name, a setting out of range, an encoder
            without a text encoder, or one whose text features are not finite.
    """

    text_features: Tensor
    owners: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: SCCLIP,
        tokenizer: Callable,
        classes: Sequence[str],
        *,
        templates: Sequence[Callable | str] | None = None,
        logit_scale: float = 40.0,
        prob_thd: float = 0.0,
        area_thd: float | None = None,
        background: int | None = None,
        slide_crop: int | None = 224,
        slide_stride: int = 112,
        short_side: int | None = 336,
        pamr_steps: int = 0,
    ) -> None:
        super().__init__()
        synonyms = _synonyms(classes)
        _check_background(background, len(synonyms), prob_thd, area_thd)
        if _check.number("logit_scale", logit_scale) <= 0:
            raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
        for name, side in dict(short_side=short_side, slide_crop=slide_crop).items():
            if side is not None:
                _check.integer(name, side, 1)
        _check.integer("slide_stride", slide_stride, 1)
        _check.integer("pamr_steps", pamr_steps, 0)
        if templates is not None and not len(templates):
            raise ValueError("templates must not be empty")
        if slide_crop is not None and slide_stride > slide_crop:
            raise ValueError(f"slide_stride must be at most {slide_crop=}, got {slide_stride}")
        self.encoder = encoder
        self.classes = [names[0] for names in synonyms]
        self.logit_scale = logit_scale
        self.prob_thd = prob_thd
        self.area_thd = area_thd
        self.background = background
        self.slide_crop = slide_crop
        self.slide_stride = slide_stride
        self.short_side = short_side
        self.pamr_steps = pamr_steps
        names = [name for synonym in synonyms for name in synonym]
        text = text_features(encoder.tower, tokenizer, names, templates)
        check_finite("text features", text)
        owners = [index for index, names in enumerate(synonyms) for _ in names]
        mean, std = normalisation(encoder, tokenizer)
        constants = dict(
            text_features=text.float(),  # (names, E)
            owners=torch.tensor(owners),  # (names,), the class of each name
            mean=torch.tensor(mean)[:, None, None],
            std=torch.tensor(std)[:, None, None],
        )
        for name, value in constants.items():
            self.register_buffer(name, value.to(text.device), persistent=False)

    @torch.inference_mode()
    def forward(self, image: Picture) -> Tensor:
        """The class of each pixel.

        Args:
            image: RGB; a PIL image, or a uint8 array or tensor (H, W, 3).

        Returns:
            (H, W), int64, on the CPU: indices into `classes`.

        Raises:
            TypeError: no image.
            ValueError: not (H, W, 3), nothing in it, or features that are not finite.
        """
        return torch.cat([labels.cpu() for labels, _ in self.bands(image)])

    @torch.inference_mode()
    def probabilities(self, image: Picture) -> Tensor:
        """The probability of each class, (classes, H, W), float32, on the CPU; see `forward`.

        Classes that `area_thd` takes out have 0; they do not go to the others.
        """
        return torch.cat([probabilities.cpu() for _, probabilities in self.bands(image)], dim=1)

    @torch.inference_mode()
    def bands(self, image: Picture) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels (rows, W) and probabilities (classes, rows, W) of bands from top to bottom.

        In bands, as all probabilities at the size of a large photo are many gigabytes. On the
        model's device; see `forward` and `probabilities`.
        """
        pixels = to_tensor(image).to(self.mean.device, torch.float32)[None] / 255
        pixels = (pixels - self.mean.float()) / self.std.float()
        size = (pixels.shape[2], pixels.shape[3])
        seen = F.interpolate(pixels, seen_size(size, self.short_side), mode="bilinear")
        maps = (
            self._encode(seen)[0] if self.slide_crop is None else self._slide(seen, self.slide_crop)
        )
        check_finite("image features", maps)
        if self.pamr_steps:
            maps = F.interpolate(maps[None], size, mode="bilinear")
            maps = pamr(pixels, maps, self.pamr_steps)[0]
        kept = None if self.area_thd is None else self._kept(maps, size, self.area_thd)
        for rows in upsampled(maps, size):
            probabilities = self._probabilities(rows)
            if kept is not None:
                probabilities = probabilities * kept
            largest, labels = probabilities.max(dim=0)
            if self.background is not None and self.prob_thd > 0:
                labels = labels.masked_fill(largest < self.prob_thd, self.background)
            yield labels, probabilities

    def _slide(self, pixels: Tensor, crop: int) -> Tensor:
        """Cosines (names, h, w) of pixels (1, 3, h, w), averaged over the windows."""
        size = (pixels.shape[2], pixels.shape[3])
        places = windows(size, crop, self.slide_stride)
        total, count = pixels.new_zeros(len(self.owners), *size), pixels.new_zeros(size)
        for start in range(0, len(places), _WINDOWS):
            chosen = places[start : start + _WINDOWS]
            crops = torch.cat([pixels[:, :, rows, columns] for rows, columns in chosen])
            for (rows, columns), maps in zip(chosen, self._encode(crops), strict=True):
                total[:, rows, columns] += F.interpolate(
                    maps[None], crops.shape[2:], mode="bilinear"
                )[0]
                count[rows, columns] += 1
        return total / count

    def _encode(self, images: Tensor) -> Tensor:
        """Cosines (B, names, h, w) of the patches of images (B, 3, H, W)."""
        return _cosines(self.encoder.encode_dense(images), self.text_features)

    def _probabilities(self, cosines: Tensor) -> Tensor:
        """Of classes (classes, ...), from the cosines of names (names, ...)."""
        probabilities = (self.logit_scale * cosines).softmax(dim=0)
        if len(self.classes) == len(self.owners):
            return probabilities
        merged = probabilities.new_zeros(len(self.classes), *probabilities.shape[1:])
        owners = self.owners[:, None, None].expand_as(probabilities)
        return merged.scatter_reduce_(0, owners, probabilities, "amax")

    def _kept(self, maps: Tensor, size: tuple[int, int], least: float) -> Tensor:
        """1 for the background and for classes larger than `least`, else 0: (classes, 1, 1)."""
        area = torch.zeros(len(self.classes), device=maps.device, dtype=torch.int64)
        for rows in upsampled(maps, size):
            labels = self._probabilities(rows).argmax(dim=0)
            area += torch.bincount(labels.flatten(), minlength=len(area))
        area[self.background] = 0
        kept = area > least * area.sum()
        kept[self.background] = True
        return kept[:, None, None].to(maps.dtype)


def normalisation(encoder: SCCLIP, tokenizer: Callable) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels in [0, 1], see `Segmenter`."""
    # Both open_clip's tower and transformers' image processor state them by these names.
    stated = getattr(tokenizer, "image_processor", encoder.tower.visual)
    return getattr(stated, "image_mean", None) or _MEAN, getattr(stated, "image_std", None) or _STD


@true_float32
def _cosines(dense: Tensor, text: Tensor) -> Tensor:
    """(B, names, h, w), float32, of unit vectors (B, h, w, E) and (names, E) of any dtypes."""
    return (dense.float() @ text.float().T).permute(0, 3, 1, 2)


def _synonyms(classes: Sequence[str]) -> list[list[str]]:
    try:
        entries = None if isinstance(classes, str) else list(classes)
    except TypeError:  # of None, or of an array without a dimension
        entries = None
    if entries is None or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"classes must be a list of names, got {classes!r}")
    synonyms = [[name.strip() for name in entry.split(",")] for entry in entries]
    names = [name for entry in synonyms for name in entry]
    if not names or not all(names):
        raise ValueError(f"classes must be names, none of them empty, got {entries}")
    first = [entry[0] for entry in synonyms]
    if repeated := {name for name in first if first.count(name) > 1}:
        raise ValueError(f"classes must differ, got {', '.join(sorted(repeated))} more than once")
    return synonyms


def _check_background(
    background: int | None, classes: int, prob_thd: float, area_thd: float | None
) -> None:
    _check.number("prob_thd", prob_thd, 0, 1)
    if area_thd is not None:
        _check.number("area_thd", area_thd, 0, 1)
    if background is not None:
        _check.integer("background", background, 0, classes - 1)
    elif prob_thd > 0 or area_thd is not None:
        raise ValueError("prob_thd and area_thd need background, the index of a class")
