"""Text features of class names, each the mean over its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needs
from .tower import Tower

_NAMES = 10  # whose prompts are encoded in one batch


@torch.no_grad()
def text_features(
    tower: Tower,
    tokenizer: Callable,
    names: Sequence[str],
    templates: Sequence[Callable | str] | None,
) -> Tensor:
    """Unit vectors (names, E); templates None: the 80 of OpenAI, which come with open_clip."""
    templates = _openai_templates() if templates is None else templates
    features = []
    for start in range(0, len(names), _NAMES):
        prompts = [
            template.format(name) if isinstance(template, str) else template(name)
            for name in names[start : start + _NAMES]
            for template in templates
        ]
        encoded = tower.encode_text(tokenizer, prompts)
        features.append(encoded.unflatten(0, (-1, len(templates))).mean(dim=1))
    return F.normalize(torch.cat(features), dim=-1)


def _openai_templates() -> Sequence[Callable]:
    with needs("clip"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    return OPENAI_IMAGENET_TEMPLATES
