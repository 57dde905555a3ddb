"""SCCLIP: a frozen CLIP that gives one text-aligned feature a patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import methods
from .config import SCCLIPConfig
from .tower import Tower, is_of

METHODS = {
    method.__name__: method
    for method in (
        methods.scclip,
        methods.clip,
        methods.maskclip,
        methods.sclip,
        methods.clearclip,
    )
}


class NotFiniteError(ValueError):
    """A model computes NaN or infinity: its weights are damaged, or its precision overflows."""


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises NotFiniteError unless every number of a model's results is finite.

    Waits for the GPU. An argmax would make the first class of NaN, everywhere.

    Args:
        what: the results, in the plural, for the error.
        tensors: the results.
    """
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise NotFiniteError(
                f"the model's {what} are not finite: its weights hold NaN or infinity, or its "
                "precision overflows"
            )


class SCCLIP(nn.Module):
    """Dense features of a frozen vision transformer of CLIP.

    Args:
        model: any CLIP of open_clip whose vision tower is its own VisionTransformer with a class
            token (ViT-B-32, B-16, L-14, L-14-336, H-14, ...; what is averaged before the last norm,
            as in CLIPA, is normed a token instead), or transformers' CLIPModel,
            CLIPVisionModelWithProjection or CLIPVisionModel, whatever its attention implementation.
            Of a CLIPVisionModel, which has no projection to the text, features are the tower's own
            after its last norm. It is used as it is: its weights, their dtype and its device.
        config: None for the preset of the model's depth, `SCCLIPConfig.for_depth`.
        method: "scclip", or to compare with, through the same path: "clip" (plain), "maskclip",
            "sclip", "clearclip".

    Raises:
        ValueError: another model, a vision tower that has no text-aligned patch tokens (ResNet,
            CoCa) or is untested (timm's), an unknown method, or a configuration that does not fit
            the depth.
    """

    def __init__(
        self, model: nn.Module, config: SCCLIPConfig | None = None, method: str = "scclip"
    ) -> None:
        super().__init__()
        self._tower = _tower_of(model)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.model = model
        layers = len(self.tower.blocks)
        self.config = config or SCCLIPConfig.for_depth(layers)
        self.config.check(layers)
        self.method = method

    @property
    def tower(self) -> Tower:
        """The model's parts, under the same names for every library."""
        return self._tower(self.model)

    @property
    def patch_size(self) -> int:
        return self.tower.patch_size

    def encode_dense(self, images: Tensor) -> Tensor:
        """One feature a patch, in the space of the text features.

        Args:
            images: (B, 3, H, W), floating, normalised by the model's mean and standard deviation.
                Sides that the patch size does not divide are resized to the nearest multiple
                (bicubic, antialiased), at least one patch. The positional embedding is stretched
                to the image.

        Returns:
            (B, h, w, E), h and w in patches, E that of the text features (of a CLIPVisionModel, its
            width), of unit norm, in the model's dtype. Each image gets what it gets alone. Nothing
            here waits for the GPU.

        Raises:
            TypeError: not a floating tensor.
            ValueError: not (B, 3, H, W).
        """
        layers, grid = self.layers(images)
        tower = self.tower
        dense = METHODS[self.method](tower, layers, grid, self.config)
        return tower.project(dense).unflatten(1, grid)

    def layers(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """What all blocks but the last make of images (B, 3, H, W), and the grid (h, w).

        Neither the method nor the configuration has a part in it; see `encode_dense`.

        Returns:
            (B, 1 + h w, D) of each block, the class token first.
        """
        tower = self.tower
        return tower.layers(_whole_patches(images, tower.patch_size).to(tower.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_dense(images)


def _whole_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W), checked, with sides that the patch size divides."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating tensor, got {found}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    size = [max(round(side / patch), 1) * patch for side in images.shape[2:]]
    if size != list(images.shape[2:]):
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return images


def _tower_of(model: nn.Module) -> type[Tower]:
    """The view for the library that the model is from, of which only that one is imported."""
    if is_of("transformers", model):
        from .transformers_tower import TransformersTower

        return TransformersTower
    if is_of("open_clip", getattr(model, "visual", None)):
        from .openclip_tower import OpenClipTower

        return OpenClipTower
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ValueError(
        f"model must be a CLIP of open_clip or transformers, got {found}; of a wrapped or compiled "
        "one, pass the model inside"
    )
