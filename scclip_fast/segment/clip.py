"""The segmenter that runs a CLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import SCCLIP
from ..clip.model import check_finite
from ..clip.prompts import Templates, check_templates, class_names, features_of_classes
from ..clip.proxy import CLIP_MEAN, CLIP_STD
from ..ops import _check
from .base import Band, ImageSegmenter
from .cosines import stitched_cosines, window_cosines
from .image import WindowMaps, input_size, largest, upsampled, windows
from .pamr import pamr


class Segmenter(ImageSegmenter):
    """Open-vocabulary segmentation with a frozen CLIP, as SC-CLIP does it.

    The cosine similarities of patches and class names are upsampled to the image, averaged where
    windows overlap, and multiplied by `logit_scale`; a softmax over all names makes them
    probabilities. A class has the probability of its best synonym. A pixel belongs to its most
    probable class, and to the first of equally probable ones.

    With the method "lposs" the cosines of all windows of an image are propagated along the
    similarities of the proxy's patches first, see `propagation`.

    The photo is resized in floating point, and PAMR follows the edges of the photo at its own size.
    The published code rounds the resized colours and follows the edges of the resized photo;
    `scclip_fast.evaluate.PublishedSegmenter` does so too.

    `half()`, `bfloat16()`, `double()` and `float()` set the dtype of the encoder and of the text
    features; cosines and probabilities are float32.

    The maps of the windows stay at the resolution of the patches and are upsampled in bands: a
    photo of 6000 x 4000 pixels with 151 names takes less than 1 GiB beside the model.

    Args:
        encoder: the model, see `scclip_fast.clip.create_model`. Of transformers' models, only a
            CLIPModel has the text encoder that it needs.
        tokenizer: the model's tokenizer, of the same library, or its CLIPProcessor, which brings
            the mean and standard deviation for the images. Other models that state none get
            OpenAI's.
        classes: one entry a class, with commas between synonyms: "person, man, woman".
        templates: a list of captions whose text features are averaged: strings with {} in the
            place of the name, or callables from name to caption; None for the 80 of OpenAI, which
            come with open_clip. A mapping has such a list for each class by its first name, see
            `choose_templates`.
        logit_scale: the factor of the cosines in the softmax, above 0; 40 as published.
        shared_names: whether a name may stand in several classes, as in the published list of
            COCO-Object; the first of these classes then gets its pixels.
        prob_thd: pixels whose largest probability is below this become `background`.
        area_thd: a class is removed, and its probability set to 0, if its share of the pixels that
            are not `background` is at most this; None removes no class.
        background: the index of a class; required by prob_thd > 0 and by area_thd.
        slide_crop: side of the square windows in pixels; None for the whole image at once.
        slide_stride: distance between neighbouring windows in pixels, 1 to slide_crop.
        stitch: whether the last block joins the windows of an image on one grid of patches and
            attends to the whole image, see `SCCLIP.encode_stitched`. The cosines of this grid are
            then upsampled to the image. All windows of an image are encoded together, whatever
            their number: the memory grows with it, and the time of the last attention with its
            square.
        short_side: pixels to which the image's shorter side is resized (bilinear, as published),
            unless the longer side would exceed 2048; None keeps the image's size.
        pamr_steps: number of refinement steps along the edges of the image, 0 for none. PAMR needs
            all maps at the image's own size, so its memory grows with their number.

    Attributes:
        classes: the first name of each class.

    Raises:
        TypeError: the tokenizer is of another library than the encoder, or a setting has another
            type.
        ValueError: there are no classes; a name is empty, repeated (upper and lower case do not
            count) or has the same tokens as another; a caption is longer than the model's context;
            a template has no place for the name; a setting is out of range; the encoder has no text
            encoder, or its text features are not finite.
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
        templates: Templates | None = None,
        shared_names: bool = False,
        logit_scale: float = 40.0,
        prob_thd: float = 0.0,
        area_thd: float | None = None,
        background: int | None = None,
        slide_crop: int | None = 224,
        slide_stride: int = 112,
        stitch: bool = False,
        short_side: int | None = 336,
        pamr_steps: int = 0,
    ) -> None:
        super().__init__()
        synonyms = class_names(classes, shared_names)
        _check_background(background, len(synonyms), prob_thd, area_thd)
        check_templates(templates, [names[0] for names in synonyms])
        if _check.number("logit_scale", logit_scale) <= 0:
            raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
        for name, side in dict(short_side=short_side, slide_crop=slide_crop).items():
            if side is not None:
                _check.integer(name, side, 1)
        _check.integer("slide_stride", slide_stride, 1)
        if not isinstance(stitch, bool):
            raise TypeError(f"stitch must be a bool, got {type(stitch).__name__}")
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
        self.stitch = stitch
        self.short_side = short_side
        self.pamr_steps = pamr_steps
        text = self._text_features(tokenizer, synonyms, templates, not shared_names)
        check_finite("text features", text)
        owners = [index for index, names in enumerate(synonyms) for _ in names]
        mean, std = normalisation(encoder, tokenizer)
        constants = dict(
            text_features=text.float(),  # (names, E)
            owners=torch.tensor(owners),  # (names,), the index of the class of each name
            mean=torch.tensor(mean)[:, None, None],
            std=torch.tensor(std)[:, None, None],
        )
        for name, value in constants.items():
            self.register_buffer(name, value.to(text.device), persistent=False)

    def frozen(self) -> Segmenter:
        """Returns the same segmenter with plain CLIP, the method "clip"; both share the model."""
        twin = copy.copy(self)
        # Of their own, because a shallow copy shares the dictionary of modules.
        twin._modules = self._modules | {"encoder": SCCLIP(self.encoder.model, method="clip")}
        return twin

    def _text_features(
        self,
        tokenizer: Callable,
        synonyms: list[list[str]],
        templates: Templates | None,
        distinct: bool,
    ) -> Tensor:
        """Returns unit vectors (names, E); see `features_of_classes`."""
        return features_of_classes(self.encoder.tower, tokenizer, synonyms, templates, distinct)

    @torch.inference_mode()
    def _bands(self, images: list[Tensor]) -> Iterator[Iterator[Band]]:
        pixels, guides = [self._resized(image) for image in images], None
        if self.pamr_steps:
            guides = list(map(self._guide, images, pixels))
        found = self._maps(pixels)
        del pixels  # for a large photo they take as much memory as the bands
        for index, maps in enumerate(found):
            size = (images[index].shape[1], images[index].shape[2])
            if guides is not None:
                whole = torch.cat(list(upsampled(maps, size)), dim=1)
                maps = pamr(guides[index], whole[None], self.pamr_steps)[0]
            yield self._bands_of(maps, size)

    @torch.inference_mode()
    def _bands_of(self, maps: Tensor | WindowMaps, size: tuple[int, int]) -> Iterator[Band]:
        kept = None if self.area_thd is None else self._kept(maps, size, self.area_thd)
        for rows in upsampled(maps, size):
            probabilities = self._probabilities(rows)
            if kept is not None:
                probabilities = probabilities * kept
            largest, labels = probabilities.max(dim=0)
            if self.background is not None and self.prob_thd > 0:
                labels = labels.masked_fill(largest < self.prob_thd, self.background)
            yield labels, probabilities

    @torch.inference_mode()
    def _label_bands(self, images: list[Tensor]) -> Iterator[Iterator[Tensor]]:
        # The class of the largest cosine is the most probable one. Only thresholds need the value.
        if self.pamr_steps or self.prob_thd > 0 or self.area_thd is not None:
            yield from super()._label_bands(images)
            return
        found = self._maps([self._resized(image) for image in images])
        for image, maps in zip(images, found, strict=True):
            names_in_bands = largest(maps, (image.shape[1], image.shape[2]))
            yield (self.owners[names] for names in names_in_bands)

    def _resized(self, image: Tensor) -> Tensor:
        """Returns normalised pixels (1, 3, h, w) at the model's size of an image (3, H, W)."""
        pixels, image_size = self._normalised(image), (image.shape[1], image.shape[2])
        size = input_size(image_size, self.short_side)
        return pixels if size == image_size else F.interpolate(pixels, size, mode="bilinear")

    def _guide(self, image: Tensor, pixels: Tensor) -> Tensor:
        """Returns the image (1, 3, H, W) whose edges PAMR follows: here the original.

        A subclass may use `pixels` instead, which is the result of `_resized`.
        """
        return self._normalised(image)

    def _normalised(self, image: Tensor) -> Tensor:
        """Returns float32 pixels (1, 3, H, W) of an image (3, H, W), uint8."""
        # In place, because a float32 copy of a photo of 24 million pixels takes 288 MB.
        pixels = image.to(self.mean.device, torch.float32)[None].div_(255)
        return pixels.sub_(self.mean.float()).div_(self.std.float())

    def _maps(self, images: list[Tensor]) -> Sequence[Tensor | WindowMaps]:
        """Returns the cosines (names, h, w) of each of the images (1, 3, h, w)."""
        sizes = [(image.shape[2], image.shape[3]) for image in images]
        places = [self._places(size) for size in sizes]
        arguments = self.encoder, self.text_features, images, places
        if self.stitch:
            return stitched_cosines(*arguments)
        maps = window_cosines(*arguments)
        if self.slide_crop is None:
            return [whole for (whole,) in maps]
        return [WindowMaps(*each) for each in zip(maps, places, sizes, strict=True)]

    def _places(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Returns the rows and columns of the windows of an image of size (h, w)."""
        if self.slide_crop is None:
            return [(slice(0, size[0]), slice(0, size[1]))]
        return windows(size, self.slide_crop, self.slide_stride)

    def _probabilities(self, cosines: Tensor) -> Tensor:
        """Returns probabilities of classes (classes, ...) from cosines of names (names, ...)."""
        probabilities = (self.logit_scale * cosines).softmax(dim=0)
        if len(self.classes) == len(self.owners):
            return probabilities
        merged = probabilities.new_zeros(len(self.classes), *probabilities.shape[1:])
        owners = self.owners[:, None, None].expand_as(probabilities)
        return merged.scatter_reduce_(0, owners, probabilities, "amax")

    def _kept(self, maps: Tensor | WindowMaps, size: tuple[int, int], threshold: float) -> Tensor:
        """Returns 1 for the background and for classes above the area threshold, else 0.

        The shape is (classes, 1, 1).
        """
        area = torch.zeros(len(self.classes), device=self.owners.device, dtype=torch.int64)
        for names in largest(maps, size):
            area += torch.bincount(self.owners[names].flatten(), minlength=len(area))
        area[self.background] = 0
        kept = area > threshold * area.sum()
        kept[self.background] = True
        return kept[:, None, None].float()


def normalisation(encoder: SCCLIP, tokenizer: Callable) -> tuple[Sequence[float], Sequence[float]]:
    """Returns the mean and standard deviation of the channels in [0, 1]; see `Segmenter`."""
    # open_clip's tower and transformers' image processor use the same names for them.
    source = getattr(tokenizer, "image_processor", encoder.tower.visual)
    return (
        getattr(source, "image_mean", None) or CLIP_MEAN,
        getattr(source, "image_std", None) or CLIP_STD,
    )


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
