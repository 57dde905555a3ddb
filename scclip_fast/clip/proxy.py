"""A second frozen vision transformer, whose tokens tell which patches of a CLIP belong together."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..extras import needs
from .sources import HubError, first_line, load_transformers
from .stitch import Corner, Stitch
from .tower import is_of

# OpenAI's mean and standard deviation of the channels, for CLIPs that state none.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# ImageNet's, by which DINO, DINOv2 and DINOv3 were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Names on the hub by preset: DINO ViT-B/8 as in ProxyCLIP, and the same size of its successors.
PROXIES = {
    "dino": "facebook/dino-vitb8",
    "dinov2": "facebook/dinov2-base",
    "dinov3": "facebook/dinov3-vitb16-pretrain-lvd1689m",
}
_TIMM = "timm:"


class ProxyFeatures(NamedTuple):
    """The tokens of a proxy.

    Attributes:
        map: (B, D, h, w), the normalised output of the last block.
        patch_size: side of a patch in pixels.
    """

    map: Tensor
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.map.shape[2], self.map.shape[3]

    @property
    def tokens(self) -> Tensor:
        """(B, h w, D), row by row."""
        return self.map.flatten(2).mT

    def stitched(self, corners: Sequence[Corner], size: tuple[int, int]) -> ProxyFeatures:
        """Returns the features (1, D, h, w) of an image from those of its windows; see `Stitch`."""
        stitch = Stitch(corners, size, self.grid, self.map.device)
        return self._replace(map=stitch(self.tokens).mT.unflatten(2, stitch.grid))


class Proxy(nn.Module):
    """A frozen vision transformer that takes the images of a CLIP.

    Args:
        model: a vision transformer of timm that takes images of any size (`dynamic_img_size=True`)
            and has patch tokens, such as DINOv2 and DINOv3; or one of transformers, such as
            ViTModel (DINO), Dinov2Model or DINOv3ViTModel; in evaluation mode. It stays as it is.
        mean, std: of the channels, by which the model was trained. None for those in timm's
            configuration, and ImageNet's for transformers, whose models do not state them.
        clip_mean, clip_std: those by which the images are normalised for the CLIP.

    Raises:
        ValueError: the model is of another kind.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        clip_mean: Sequence[float] = CLIP_MEAN,
        clip_std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.patch_size = _patch_size(model)
        self.model = model
        config = getattr(model, "pretrained_cfg", {})
        mean, std, clip_mean, clip_std = (
            torch.tensor(tuple(values), dtype=torch.float64)[:, None, None]
            for values in (
                mean or config.get("mean", IMAGENET_MEAN),
                std or config.get("std", IMAGENET_STD),
                clip_mean,
                clip_std,
            )
        )
        self.register_buffer("scale", (clip_std / std).float(), persistent=False)
        self.register_buffer("shift", ((clip_mean - mean) / std).float(), persistent=False)

    def forward(self, images: Tensor) -> ProxyFeatures:
        """Features of images (B, 3, H, W), normalised for the CLIP, H and W whole patches."""
        weight = next(self.model.parameters())
        images = (images.float() * self.scale + self.shift).to(weight.dtype)
        grid = [side // self.patch_size for side in images.shape[2:]]
        if is_of("timm", self.model):
            feature_map = self.model.forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]
        else:
            # Some models interpolate their positional embedding on request, others always.
            keyword = "interpolate_pos_encoding"
            options = {keyword: True} if keyword in _parameters(self.model) else {}
            tokens = self.model(pixel_values=images, **options).last_hidden_state
            patches = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]  # class, registers, patches
            feature_map = patches.mT.unflatten(2, grid)
        return ProxyFeatures(feature_map, self.patch_size)


def load_proxy(name: str, dtype: torch.dtype = torch.float32) -> Proxy:
    """Loads a proxy with its weights; downloads only files that are not cached.

    Args:
        name: "dino", "dinov2" or "dinov3" for ViT-B; a vision transformer of transformers by its
            name on the hub, or a folder with one; "timm:NAME" for one of timm.
        dtype: the dtype of the weights.

    Raises:
        HubError: the hub is needed and out of reach.
        ValueError: the name is none of these, or the model is of another kind.
        RuntimeError: the model cannot be loaded; the message has the reason.
    """
    source = PROXIES.get(name, name)
    if not os.path.isdir(source) and source.count("/") != 1 and not name.startswith(_TIMM):
        raise ValueError(
            f"proxy must be {', '.join(PROXIES)}, a folder, OWNER/NAME on the hub or timm:NAME; "
            f"got {name!r}"
        )
    try:
        if name.startswith(_TIMM):
            with needs("clip"):
                import timm
            options = dict(pretrained=True, num_classes=0, dynamic_img_size=True)
            model = timm.create_model(name.removeprefix(_TIMM), **options)
            return Proxy(model.to(dtype).eval().requires_grad_(False))
        with needs("sam3"):
            from transformers import AutoImageProcessor, AutoModel
        model, processor = load_transformers(AutoModel, AutoImageProcessor, source, dtype)
    except (HubError, torch.OutOfMemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # of the libraries, safetensors, pickle and files
        raise RuntimeError(f"cannot load the proxy {name}: {first_line(error)}") from error
    return Proxy(model.eval().requires_grad_(False), processor.image_mean, processor.image_std)


def _patch_size(model: nn.Module) -> int:
    """The side of a model's patches, or ValueError if it has none."""
    if is_of("timm", model):
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        usable = hasattr(model, "forward_intermediates") and hasattr(model, "num_prefix_tokens")
    else:
        patch = getattr(getattr(model, "config", None), "patch_size", None)
        usable = is_of("transformers", model)
    sides = {patch} if isinstance(patch, int) else set(patch or ())
    if not usable or len(sides) != 1:
        raise ValueError(
            "proxy must be a vision transformer of timm or transformers with square patches, got "
            f"{type(model).__name__}"
        )
    return sides.pop()


def _parameters(model: nn.Module) -> Sequence[str]:
    return tuple(inspect.signature(model.forward).parameters)
