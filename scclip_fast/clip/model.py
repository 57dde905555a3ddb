"""SCCLIP: a frozen CLIP that computes one text-aligned feature for each patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import methods, proxy_methods
from .config import SCCLIPConfig
from .proxy import CLIP_MEAN, CLIP_STD, Proxy, ProxyFeatures
from .stitch import Corner, Stitch
from .tower import Tower, is_of

METHODS = {
    method.__name__: method
    for method in (
        methods.scclip,
        methods.clip,
        methods.maskclip,
        methods.sclip,
        methods.clearclip,
        methods.naclip,
        methods.resclip,
    )
}

#: The methods that need a proxy.
PROXY_METHODS = {
    method.__name__: method for method in (proxy_methods.proxyclip, proxy_methods.lposs)
}


class NotFiniteError(ValueError):
    """A model computes NaN or infinity: its weights are damaged, or its precision overflows."""


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises NotFiniteError unless every number of a model's results is finite.

    Without the check, an argmax over NaN would silently return the first class everywhere. It
    waits for the GPU.

    Args:
        what: a name for the results, in the plural, for the error.
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
        model: any CLIP of open_clip whose vision tower is a plain vision transformer: open_clip's
            own (ViT-B-32, B-16, L-14, L-14-336, H-14, ..., CoCa) or timm's (SigLIP, EVA02, PE-Core,
            ...); or transformers' CLIPModel, CLIPVisionModelWithProjection or CLIPVisionModel, with
            any attention implementation. Its weights, their dtype and its device stay as they are.
            Models that average tokens before the last norm, as CLIPA does, have the norm applied to
            each token instead. Where a model pools its tokens by attention, as CoCa and SigLIP do,
            each patch is pooled alone, and a model without a class token adds none. The features of
            a CLIPVisionModel, which has no projection to the text, are those after its last norm.
        config: None for the preset of the model's depth, `SCCLIPConfig.for_depth`.
        method: "scclip", or a method to compare it with on the same path: "clip" (plain),
            "maskclip", "sclip", "clearclip", "naclip", "resclip"; see `scclip_fast.clip.methods`.
            With a proxy, one of `scclip_fast.clip.proxy_methods`: "proxyclip", "lposs".
        proxy: a second frozen vision transformer of timm or transformers, or a `Proxy` of one, for
            the methods that need it; None for the others.

    Raises:
        ValueError: the model or proxy is of another kind, the vision tower is no plain vision
            transformer (ResNet, ConvNeXt, ...), the method is unknown, needs a proxy or has no use
            for one, or the configuration does not fit the depth.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SCCLIPConfig | None = None,
        method: str = "scclip",
        proxy: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._tower_class = _tower_class(model)
        _check_method(method, proxy)
        self.model = model
        depth = len(self.tower.blocks)
        self.config = config or SCCLIPConfig.for_depth(depth)
        self.config.check(depth)
        self.method = method
        self.proxy = _proxy(proxy, self.tower)

    @property
    def tower(self) -> Tower:
        """The model's parts, with the same names for every library."""
        return self._tower_class(self.model)

    @property
    def patch_size(self) -> int:
        return self.tower.patch_size

    def encode_dense(self, images: Tensor) -> Tensor:
        """Computes one feature for each patch, in the space of the text features.

        Args:
            images: (B, 3, H, W), floating, normalised by the model's mean and standard deviation.
                Sides that the patch size does not divide are resized to the nearest multiple
                (bicubic, antialiased), at least one patch. The positional embedding is stretched
                to the image.

        Returns:
            (B, h, w, E), of unit norm, in the model's dtype; h and w count patches, and E is the
            width of the text features (for a CLIPVisionModel, of the model). With a proxy, h and w
            count the proxy's patches. The features of an image do not depend on the other images of
            the batch. Nothing here waits for the GPU.

        Raises:
            TypeError: images are no floating tensor.
            ValueError: images are not (B, 3, H, W).
        """
        return self.encode_with_proxy(images)[0]

    def encode_with_proxy(self, images: Tensor) -> tuple[Tensor, ProxyFeatures | None]:
        """Computes the features of `encode_dense` and the proxy's, which are None without one."""
        return self._last_block(*self.layers(images), self._proxy_features(images))

    def encode_stitched(
        self, windows: Tensor, corners: Sequence[Sequence[Corner]]
    ) -> list[tuple[Tensor, ProxyFeatures | None]]:
        """Encodes images in windows that the last block joins, as OV-Stitcher does.

        The blocks before the last run on each window. The queries, keys and values of the last are
        averaged on the image's grid of patches, so that each method attends to the whole image; see
        `Stitch`. Other tokens than those of patches are no keys then, and a proxy's features are
        averaged too. Of OV-Stitcher (Moon et al., CVPR 2026 Findings, arXiv 2604.08110) this is the
        stitching alone: the masks that bound its attention, its stitched last block of DINO and its
        templates are left out.

        Args:
            windows: (W, 3, H, W'), as the images of `encode_dense`: the windows of the first image,
                then those of the second, and so on.
            corners: for each image, the row and column of the first pixel of each of its windows,
                which cover it.

        Returns:
            For each image, the features (1, h, w, E) of `encode_dense` and the proxy's.

        Raises:
            TypeError: windows are no floating tensor.
            ValueError: windows are not (W, 3, H, W'), the number of corners is not W, a corner is
                no pair of integers of at least 0, or the windows leave out a patch of their image.
        """
        block_outputs, grid = self.layers(windows)
        counts = [len(of_image) for of_image in corners]
        if sum(counts) != len(windows):
            raise ValueError(f"corners must be of {len(windows)} windows, got {sum(counts)}")
        proxy = self._proxy_features(windows)
        outputs_of_images = zip(*(output.split(counts) for output in block_outputs), strict=True)
        maps = [None] * len(counts) if proxy is None else proxy.map.split(counts)
        size = (windows.shape[2], windows.shape[3])
        found = []
        for of_image, outputs, tokens in zip(corners, outputs_of_images, maps, strict=True):
            features = None
            if proxy is not None:
                features = proxy._replace(map=tokens).stitched(of_image, size)
            stitch = Stitch(of_image, size, grid, windows.device)
            found.append(self._last_block(outputs, grid, features, stitch))
        return found

    def _proxy_features(self, images: Tensor) -> ProxyFeatures | None:
        if self.method not in PROXY_METHODS:
            return None
        return self.proxy(_whole_patches(images, self.proxy.patch_size))

    def _last_block(
        self,
        block_outputs: Sequence[Tensor],
        grid: tuple[int, int],
        proxy: ProxyFeatures | None,
        stitch: Stitch | None = None,
    ) -> tuple[Tensor, ProxyFeatures | None]:
        """Computes the features (B, h, w, E) by the method, for the results of `layers`."""
        tower = self.tower
        tower.stitch = stitch
        whole = tower.whole_grid(grid)
        arguments = tower.at(whole), block_outputs, grid, self.config
        if proxy is not None:
            return PROXY_METHODS[self.method](*arguments, proxy), proxy
        tokens = METHODS[self.method](*arguments)[:, -whole[0] * whole[1] :]
        return tower.unit_features(tokens).unflatten(1, whole), None

    def layers(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Outputs of all blocks but the last for images (B, 3, H, W), and the grid (h, w).

        They do not depend on the method or the configuration. See `encode_dense` for the images.

        Returns:
            (B, P + h w, D) for each block, the class token and other tokens of no patch first, and
            the grid.
        """
        tower = self.tower
        return tower.block_outputs(_whole_patches(images, tower.patch_size).to(tower.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_dense(images)


def _check_method(method: str, proxy: nn.Module | None) -> None:
    """Raises ValueError for an unknown method, and for a proxy that is missing or not needed."""
    if method not in METHODS and method not in PROXY_METHODS:
        known = ", ".join([*METHODS, *PROXY_METHODS])
        raise ValueError(f"method must be one of {known}, got {method!r}")
    if method in PROXY_METHODS and proxy is None:
        raise ValueError(
            f"method {method!r} needs proxy, a vision transformer of timm or transformers"
        )
    if method in METHODS and proxy is not None:
        raise ValueError(f"proxy is for the methods {', '.join(PROXY_METHODS)}, got {method!r}")


def _proxy(proxy: nn.Module | None, tower: Tower) -> Proxy | None:
    """The proxy as a `Proxy`, for images that are normalised as the tower states."""
    if proxy is None or isinstance(proxy, Proxy):
        return proxy
    mean, std = (getattr(tower.visual, name, None) for name in ("image_mean", "image_std"))
    return Proxy(proxy, clip_mean=mean or CLIP_MEAN, clip_std=std or CLIP_STD)


def _whole_patches(images: Tensor, patch: int) -> Tensor:
    """Checks images (B, 3, H, W) and resizes them to sides that the patch size divides."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating tensor, got {kind}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    size = [max(round(side / patch), 1) * patch for side in images.shape[2:]]
    if size != list(images.shape[2:]):
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return images


def _tower_class(model: nn.Module) -> type[Tower]:
    """The `Tower` for the model's library. The other library is not imported."""
    if is_of("transformers", model):
        from .transformers_tower import TransformersTower

        return TransformersTower
    visual = getattr(model, "visual", None)
    if is_of("open_clip", visual) and is_of("timm", getattr(visual, "trunk", None)):
        from .timm_tower import TimmTower

        return TimmTower
    if is_of("open_clip", visual):
        from .openclip_tower import OpenClipTower

        return OpenClipTower
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ValueError(
        f"model must be a CLIP of open_clip or transformers, got {name}; of a wrapped or compiled "
        "model, pass the model inside"
    )
