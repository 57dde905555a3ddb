"""Segmenter: from an image and class names to a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import SCCLIP
from .clip.model import check_finite
from .clip.prompts import check_templates, class_names, text_features
from .ops import _check
from .pamr import pamr
from .picture import Picture, WindowMaps, seen_size, to_tensor, upsampled, windows
from .precision import true_float32

_WINDOWS = 128  # in one batch; more, of very large images, take several
#: OpenAI's, for models that state none
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Segmenter(nn.Module):
    """Open-vocabulary segmentation with a frozen CLIP, as SC-CLIP does it.

    Resized photos keep fractions of colours, and PAMR follows the edges of the photo at its own
    size; `scclip_fast.evaluate.PublishedSegmenter` rounds and follows as the published code does.

    The cosine similarities of patches and class names are upsampled to the image, averaged where
    windows overlap, scaled and made probabilities by a softmax over all names; a class has that of
    its best synonym. A pixel belongs to its most probable class, to the first of equal ones.
    `half()`, `bfloat16()`, `double()` and `float()` set the dtype of the encoder and of the text
    features; cosines and probabilities are float32.

    Windows are kept at the scale of patches and upsampled in bands: a photo of 6000 x 4000 pixels
    with 151 names takes less than 1 GiB beside the model.

    Args:
        encoder: see `scclip_fast.clip.create_model`; of transformers, around a CLIPModel.
        tokenizer: its tokenizer, of the same library; or its CLIPProcessor, whose mean and standard
            deviation the images then get. OpenAI's are those of other models that state none.
        classes: one entry a class, synonyms after commas: "person, man, woman".
        templates: a list of captions whose text features are averaged: strings with {} in the
            place of the name, or callables from name to caption; None for the 80 of OpenAI, which
            come with open_clip.
        logit_scale: sharpness of the probabilities, above 0; 40 as published.
        shared_names: whether a name may stand in several classes, as in the published list of
            COCO-Object; the first class then has its pixels.
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
        TypeError: a tokenizer of another library than the encoder's, or a setting of another
            type.
        ValueError: no classes, an empty name, a name that is repeated (upper and lower case do not
            count) or that the tokenizer cannot tell from another, a caption longer than the model's
            context, a template without a place for the name, a setting out of range, or an encoder
            without a text encoder or whose text features are not finite.
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
        shared_names: bool = False,
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
        synonyms = class_names(classes, shared_names)
        _check_background(background, len(synonyms), prob_thd, area_thd)
        check_templates(templates)
        if _check.number("logit_scale", logit_scale) <= 0:
            raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
        for name, side in dict(short_side=short_side, slide_crop=slide_crop).items():
            if side is not None:
                _check.integer(name, side, 1)
        _check.integer("slide_stride", slide_stride, 1)
        _check.integer("pamr_steps", pamr_steps, 0)
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
        text = text_features(encoder.tower, tokenizer, names, templates, distinct=not shared_names)
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
            image: a PIL image of any mode, which `picture.to_rgb` makes upright RGB; or RGB as a
                uint8 array or tensor (H, W, 3).

        Returns:
            (H, W), int64, on the CPU: indices into `classes`; of the upright image's size.

        Raises:
            TypeError: no image.
            ValueError: not (H, W, 3), nothing in it, values that are no grey (see `to_rgb`), or
                features that are not finite.
        """
        picture, top = to_tensor(image), 0
        labels = torch.empty(picture.shape[1:], dtype=torch.int64)
        for band, _ in self._bands(picture):
            labels[top : top + len(band)] = band
            top += len(band)
        return labels

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
        return self._bands(to_tensor(image))

    @torch.inference_mode()
    def _bands(self, picture: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The bands of a picture (3, H, W), uint8; see `bands`."""
        size = (picture.shape[1], picture.shape[2])
        pixels = self._resized(picture)
        maps = self._maps(pixels)
        if self.pamr_steps:
            whole = torch.cat(list(upsampled(maps, size)), dim=1)
            maps = pamr(self._guide(picture, pixels), whole[None], self.pamr_steps)[0]
        del pixels  # of a large photo, as much as the bands
        kept = None if self.area_thd is None else self._kept(maps, size, self.area_thd)
        for rows in upsampled(maps, size):
            probabilities = self._probabilities(rows)
            if kept is not None:
                probabilities = probabilities * kept
            largest, labels = probabilities.max(dim=0)
            if self.background is not None and self.prob_thd > 0:
                labels = labels.masked_fill(largest < self.prob_thd, self.background)
            yield labels, probabilities

    def _resized(self, picture: Tensor) -> Tensor:
        """Normalised pixels (1, 3, h, w) at the size for the model, of a picture (3, H, W)."""
        pixels, own = self._normalised(picture), (picture.shape[1], picture.shape[2])
        size = seen_size(own, self.short_side)
        return pixels if size == own else F.interpolate(pixels, size, mode="bilinear")

    def _guide(self, picture: Tensor, pixels: Tensor) -> Tensor:
        """What PAMR follows, (1, 3, H, W), of a picture and its `_resized` pixels: the picture."""
        return self._normalised(picture)

    def _normalised(self, picture: Tensor) -> Tensor:
        """Pixels (1, 3, H, W), float32, of a picture (3, H, W), uint8."""
        # In place, as a float32 copy of a photo of 24 million pixels takes 288 MB.
        pixels = picture.to(self.mean.device, torch.float32)[None].div_(255)
        return pixels.sub_(self.mean.float()).div_(self.std.float())

    def _maps(self, pixels: Tensor) -> Tensor | WindowMaps:
        """Cosines (names, h, w) of pixels (1, 3, h, w)."""
        if self.slide_crop is None:
            return self._encode(pixels)[0]
        maps: list[Tensor] = []  # of each window, a cosine a patch
        size = (pixels.shape[2], pixels.shape[3])
        places = windows(size, self.slide_crop, self.slide_stride)
        for start in range(0, len(places), _WINDOWS):
            chosen = places[start : start + _WINDOWS]
            crops = torch.cat([pixels[:, :, rows, columns] for rows, columns in chosen])
            maps.extend(self._encode(crops).contiguous())
        return WindowMaps(maps, places, size)

    def _encode(self, images: Tensor) -> Tensor:
        """Cosines (B, names, h, w) of the patches of images (B, 3, H, W)."""
        cosines = _cosines(self.encoder.encode_dense(images), self.text_features)
        check_finite("image features", cosines)
        return cosines

    def _probabilities(self, cosines: Tensor) -> Tensor:
        """Of classes (classes, ...), from the cosines of names (names, ...)."""
        probabilities = (self.logit_scale * cosines).softmax(dim=0)
        if len(self.classes) == len(self.owners):
            return probabilities
        merged = probabilities.new_zeros(len(self.classes), *probabilities.shape[1:])
        owners = self.owners[:, None, None].expand_as(probabilities)
        return merged.scatter_reduce_(0, owners, probabilities, "amax")

    def _kept(self, maps: Tensor | WindowMaps, size: tuple[int, int], least: float) -> Tensor:
        """1 for the background and for classes larger than `least`, else 0: (classes, 1, 1)."""
        area = torch.zeros(len(self.classes), device=self.owners.device, dtype=torch.int64)
        for rows in upsampled(maps, size):
            labels = self._probabilities(rows).argmax(dim=0)
            area += torch.bincount(labels.flatten(), minlength=len(area))
        area[self.background] = 0
        kept = area > least * area.sum()
        kept[self.background] = True
        return kept[:, None, None].float()


def normalisation(encoder: SCCLIP, tokenizer: Callable) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels in [0, 1], see `Segmenter`."""
    # Both open_clip's tower and transformers' image processor state them by these names.
    stated = getattr(tokenizer, "image_processor", encoder.tower.visual)
    return getattr(stated, "image_mean", None) or _MEAN, getattr(stated, "image_std", None) or _STD


@true_float32
def _cosines(dense: Tensor, text: Tensor) -> Tensor:
    """(B, names, h, w), float32, of unit vectors (B, h, w, E) and (names, E) of any dtypes."""
    return (dense.float() @ text.float().T).permute(0, 3, 1, 2)


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
