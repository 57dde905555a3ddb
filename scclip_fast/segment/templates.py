"""FLOSS's choice of the templates of each class, by the entropy of what is predicted with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import SCCLIP
from ..clip.prompts import openai_templates, prompt_features
from ..ops import _check
from .clip import Segmenter
from .image import ImageLike, to_tensor, upsampled


@torch.inference_mode()
def choose_templates(
    encoder: SCCLIP,
    tokenizer: Callable,
    classes: Sequence[str],
    images: Iterable[ImageLike],
    *,
    templates: Sequence[Callable | str] | None = None,
    n_experts: int = 4,
    **settings: Any,
) -> dict[str, list[Callable | str]]:
    """Chooses the templates of each class on images without labels, for `Segmenter(templates=...)`.

    The rule is that of FLOSS (Benigmim et al., ICCV 2025, arXiv 2504.10487): the images are
    segmented with each template alone; a class gets the templates with the lowest mean entropy of
    the probabilities at the pixels where the class is predicted. The images are encoded once.

    The published method then runs one classifier for each class, whose names all have the templates
    of that class, and fuses the predictions. Here the text features of each class come from its own
    templates, in one classifier, which costs nothing.

    Args:
        encoder, tokenizer, classes: as for `Segmenter`.
        images: at least one, of the kinds that `Segmenter` takes.
        templates: the list to choose from; None for the 80 of OpenAI.
        n_experts: the number of templates of a class; 4 as published.
        settings: further settings of the `Segmenter`, such as short_side.

    Returns:
        the templates by the first name of each class, the lowest entropy first. A class that fewer
        than n_experts templates ever predict has these alone, and one that none predicts has all.

    Raises:
        TypeError, ValueError: as `Segmenter`; there are no images; n_experts is out of range.
    """
    options = list(openai_templates() if templates is None else templates)
    segmenter = _EachTemplate(encoder, tokenizer, classes, templates=options, **settings)
    _check.integer("n_experts", n_experts, 1, len(options))
    found = [_entropies(segmenter, to_tensor(image), len(options)) for image in images]
    if not found:
        raise ValueError("images must have at least one image")
    sums, counts = (torch.stack(parts).sum(dim=0) for parts in zip(*found, strict=True))
    return _lowest(segmenter.classes, options, sums / counts, n_experts)


class _EachTemplate(Segmenter):
    """A Segmenter whose maps are those of all names with each template, template by template."""

    def _text_features(
        self,
        tokenizer: Callable,
        synonyms: list[list[str]],
        templates: Any,
        distinct: bool,
    ) -> Tensor:
        names = list(chain.from_iterable(synonyms))
        parts = prompt_features(self.encoder.tower, tokenizer, names, templates, distinct)
        return F.normalize(torch.cat(list(parts)), dim=-1).transpose(0, 1).flatten(0, 1)


def _entropies(segmenter: Segmenter, image: Tensor, n_templates: int) -> tuple[Tensor, Tensor]:
    """Returns the sums of entropies and the numbers of pixels of an image, (templates, classes)."""
    sums = torch.zeros(
        n_templates, len(segmenter.classes), dtype=torch.float64, device=segmenter.owners.device
    )
    counts = torch.zeros_like(sums)
    (maps,) = segmenter._maps([segmenter._resized(image)])
    for rows in upsampled(maps, (image.shape[1], image.shape[2])):
        logs = (segmenter.logit_scale * rows.unflatten(0, (n_templates, -1))).log_softmax(dim=1)
        entropy = -(logs.exp() * logs).sum(dim=1).flatten(1).double()  # [templates, pixels]
        predicted = segmenter.owners[logs.argmax(dim=1)].flatten(1)
        sums.scatter_add_(1, predicted, entropy)
        counts.scatter_add_(1, predicted, torch.ones_like(entropy))
    return sums, counts


def _lowest(
    classes: Sequence[str], options: list[Callable | str], means: Tensor, n_experts: int
) -> dict[str, list[Callable | str]]:
    """Returns the options with the lowest means (options, classes) by class; NaN has no pixel."""
    chosen = {}
    for name, of_class in zip(classes, means.T.cpu(), strict=True):
        order = of_class.nan_to_num(torch.inf).argsort(stable=True).tolist()
        predicted = [options[i] for i in order if not of_class[i].isnan()]
        chosen[name] = predicted[:n_experts] or options
    return chosen
