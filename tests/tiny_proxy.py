"""Small vision transformers with random weights, as proxies for the tests."""

from __future__ import annotations

import timm
import torch
import transformers
from tiny_clip import randomise
from torch import nn

from scclip_fast.clip.proxy import Proxy

SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
TIMM = dict(depth=2, embed_dim=16, num_heads=2, num_classes=0, dynamic_img_size=True)
#: By name: the model, the side of its patches, and the number of tokens before the patches.
PROXIES = {
    "timm-dinov2": (lambda: timm.create_model("vit_small_patch14_dinov2", **TIMM), 14, 1),
    "timm-dinov3": (lambda: timm.create_model("vit_small_patch16_dinov3", **TIMM), 16, 5),
    "dino": (lambda: _transformers("ViT", image_size=32, patch_size=8), 8, 1),
    "dinov2": (lambda: _transformers("Dinov2", image_size=24, patch_size=6), 6, 1),
    "dinov3": (lambda: _transformers("DINOv3ViT", patch_size=4, num_register_tokens=4), 4, 5),
}


def _transformers(name: str, **settings) -> nn.Module:
    kind = getattr(transformers, f"{name}Model")
    return kind(getattr(transformers, f"{name}Config")(**SIZES, **settings))


def tiny_model(name: str) -> nn.Module:
    """A frozen model of `PROXIES`, with the same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = PROXIES[name][0]()
        randomise(model)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # initial weights of 0.02 would make all tokens alike
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def tiny_proxy(name: str = "dinov2") -> Proxy:
    return Proxy(tiny_model(name))
