"""Text features of class names: each is the mean over the prompts of a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needs
from .tower import Tower

#: The same templates for all classes, or those of each class by its first name.
Templates = Sequence[Callable | str] | Mapping[str, Sequence[Callable | str]]

_NAMES = 10  # names whose prompts are encoded in one batch
_PROBE = "\0name"  # stands in for a name where templates are checked


def class_names(classes: Sequence[str], shared: bool) -> list[list[str]]:
    """Splits each class, a string of synonyms with commas between them, into its names.

    Args:
        classes: one string for each class.
        shared: whether classes may share synonyms, as long as their first names differ.

    Raises:
        ValueError: there are no classes, a name is empty, or names that must differ are equal but
            for case.
    """
    try:
        entries = None if isinstance(classes, str) else list(classes)
    except TypeError:  # classes is None, or an array without a dimension
        entries = None
    if entries is None or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"classes must be a list of names, got {classes!r}")
    synonyms = [[name.strip() for name in entry.split(",")] for entry in entries]
    names = list(chain.from_iterable(synonyms))
    if not names or not all(names):
        raise ValueError(f"classes must be names, none of them empty, got {entries}")
    checked = [entry[0] for entry in synonyms] if shared else names
    counts = Counter(map(str.casefold, checked))
    if repeated := {name for name in checked if counts[name.casefold()] > 1}:
        listed = ", ".join(sorted(repeated))
        raise ValueError(f"classes must differ, and not by case alone, got {listed} more than once")
    return synonyms


def check_templates(templates: Templates | None, classes: Sequence[str]) -> None:
    """ValueError unless templates are callables or strings that have {} in the name's place.

    A mapping must have such templates for each of the classes and for nothing else.
    """
    if isinstance(templates, Mapping):
        if templates.keys() != set(classes):
            missing, unknown = set(classes) - templates.keys(), templates.keys() - set(classes)
            raise ValueError(
                "templates by class must have an entry for each class, "
                f"got none for {sorted(missing)}, and {sorted(unknown)}, which are no classes"
            )
        for of_class in templates.values():
            check_templates(of_class, classes)
        return
    if templates is None:
        return
    if isinstance(templates, str) or not all(isinstance(t, str) or callable(t) for t in templates):
        raise ValueError(f"templates must be a list of strings or callables, got {templates!r}")
    if not len(templates):
        raise ValueError("templates must not be empty")
    for template in templates:
        if isinstance(template, str) and _PROBE not in _formatted(template, _PROBE):
            raise ValueError(f"a template must have {{}} in the name's place, got {template!r}")


def features_of_classes(
    tower: Tower,
    tokenizer: Callable,
    synonyms: Sequence[Sequence[str]],
    templates: Templates | None,
    distinct: bool = True,
) -> Tensor:
    """Unit vectors (names, E) of the names of all classes, see `text_features`.

    Args:
        synonyms: the names of each class.
        templates: see `check_templates`.
    """
    if isinstance(templates, Mapping):
        features = (
            text_features(tower, tokenizer, names, templates[names[0]], distinct)
            for names in synonyms
        )
        return torch.cat(list(features))
    names = list(chain.from_iterable(synonyms))
    return text_features(tower, tokenizer, names, templates, distinct)


@torch.no_grad()
def text_features(
    tower: Tower,
    tokenizer: Callable,
    names: Sequence[str],
    templates: Sequence[Callable | str] | None,
    distinct: bool = True,
) -> Tensor:
    """Unit vectors (names, E) of names: each is the mean over the prompts of a name.

    Args:
        tower: the tower of a model with a text encoder.
        tokenizer: see `Segmenter`.
        names: at least one name.
        templates: a list; None for the 80 of OpenAI, which come with open_clip.
        distinct: whether names with the same tokens in all prompts are an error.

    Raises:
        TypeError: the tokenizer is of another library than the model.
        ValueError: a prompt is longer than the model's context, or names are not distinct.
    """
    features = prompt_features(tower, tokenizer, names, templates, distinct)
    return F.normalize(torch.cat([some.mean(dim=1) for some in features]), dim=-1)


def prompt_features(
    tower: Tower,
    tokenizer: Callable,
    names: Sequence[str],
    templates: Sequence[Callable | str] | None,
    distinct: bool = True,
) -> Iterator[Tensor]:
    """Yields unit vectors (n, templates, E) of the prompts of a few names at a time.

    See `text_features` for the arguments and errors.
    """
    templates = openai_templates() if templates is None else templates
    first: dict[tuple, str] = {}
    for start in range(0, len(names), _NAMES):
        chosen = names[start : start + _NAMES]
        prompts = [_prompt(template, name) for name in chosen for template in templates]
        tokens = tower.tokenize(tokenizer, prompts)
        keys = [_without_padding(row) for row in tokens["input_ids"].tolist()]
        for index, name in enumerate(chosen):
            tokens_of_name = tuple(keys[index * len(templates) : (index + 1) * len(templates)])
            if distinct and (other := first.setdefault(tokens_of_name, name)) is not name:
                raise ValueError(f"{other!r} and {name!r} have the same tokens in all prompts")
        yield tower.encode_text(tokens).unflatten(0, (-1, len(templates)))


def _prompt(template: Callable | str, name: str) -> str:
    return _formatted(template, name) if isinstance(template, str) else template(name)


def _formatted(template: str, name: str) -> str:
    try:
        return template.format(name)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"a template must have {{}} in the name's place, got {template!r}"
        ) from error


def _without_padding(ids: list[int]) -> tuple[int, ...]:
    """Token ids without the run of equal ids at the end: batches may differ in their padding."""
    end = len(ids)
    while end and ids[end - 1] == ids[-1]:
        end -= 1
    return tuple(ids[:end])


def openai_templates() -> Sequence[Callable]:
    """The 80 templates of OpenAI's ImageNet prompts."""
    with needs("clip"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    return OPENAI_IMAGENET_TEMPLATES
