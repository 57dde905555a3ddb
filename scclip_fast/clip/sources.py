"""Finds the library that loads a model, and the model's files, from its name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # only the extra sam3 installs it
    from transformers import PreTrainedModel, ProcessorMixin

HUB_TIMEOUT = 2  # seconds, for the one request that decides whether a download can start
SCENES = f"local-dir:{Path(__file__).parents[1] / 'scenes'}"
_OPENAI = re.compile(r"(ViT-[BL])/(\d+)(?:@(\d+)px)?")
_KINDS = {"clip": "transformers", "sam3": "sam3", "sam3_video": "sam3"}  # by model_type
_CONFIGS = ("config.json", "open_clip_config.json")


class HubError(RuntimeError):
    """The Hugging Face hub is out of reach, or this user may not read a repository."""


class Source(NamedTuple):
    """The kind of a model, and its name in the library of that kind.

    Attributes:
        kind: "open_clip", "transformers" (its CLIP) or "sam3".
        name: the name that the library's loader takes.
    """

    kind: str
    name: str

    @property
    def brings_weights(self) -> bool:
        """Whether the name stands for weights too, so that no tag is needed to choose them."""
        return self.kind != "open_clip" or ":" in self.name


def find_source(name: str) -> Source:
    """Finds out which library loads a model.

    The config in a folder or a repository of the Hugging Face hub decides: open_clip's
    `open_clip_config.json`, or the `model_type` in transformers' `config.json`. If there are both,
    transformers' decides. The config of a repository comes from the hub's cache or from one short
    request.

    Args:
        name: "scenes"; open_clip's name of a model, "hf-hub:..." or "local-dir:..."; OpenAI's name
            ("ViT-B/16", "ViT-L/14@336px"); a folder; or OWNER/NAME on the hub.

    Raises:
        ValueError: there is no such folder or repository, or it holds another kind of model.
        HubError: the hub is out of reach, or this user may not read the repository.
    """
    if name == "scenes":
        return Source("open_clip", SCENES)
    if match := _OPENAI.fullmatch(name):
        return Source("open_clip", "-".join(filter(None, match.groups())))
    if os.path.isdir(name):
        return _folder(name)
    if ":" in name or "/" not in name:
        return Source("open_clip", name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"there is no folder {name}, and the hub's names are OWNER/NAME")
    return _repository(name)


def _folder(name: str) -> Source:
    configs = [file for file in _CONFIGS if os.path.isfile(os.path.join(name, file))]
    if not configs:
        raise ValueError(f"the folder {name} holds no model: it has no {' and no '.join(_CONFIGS)}")
    if configs[0] == "open_clip_config.json":
        return Source("open_clip", f"local-dir:{name}")
    return Source(_kind(name, os.path.join(name, configs[0])), name)


def _repository(name: str) -> Source:
    if path := hub_file(name, "config.json"):
        return Source(_kind(name, path), name)
    if hub_file(name, "open_clip_config.json"):
        return Source("open_clip", f"hf-hub:{name}")
    raise ValueError(f"{name} holds no model: it has no {' and no '.join(_CONFIGS)}")


def _kind(name: str, config: str) -> str:
    """The kind of the model whose `config.json` is at the path `config`."""
    try:
        model_type = json.loads(Path(config).read_text(encoding="utf-8"))["model_type"]
        return _KINDS[model_type]
    except KeyError as error:
        model = "a config.json without model_type" if error.args == ("model_type",) else model_type
        raise ValueError(
            f"{name} holds {model}; transformers' clip, sam3 and sam3_video can be used"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read the config.json of {name}: {error}") from None


def hub_file(repository: str, file: str) -> str | None:
    """Path of a repository's file in the hub's cache, or None if the repository lacks the file.

    A file that is not in the cache is downloaded.

    Raises:
        HubError: the hub is out of reach, or this user may not read the repository.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    if isinstance(path := try_to_load_from_cache(repository, file), str):
        return path
    try:
        check_hub(repository, file)
        return hf_hub_download(repository, file)
    except EntryNotFoundError:
        return None


def check_hub(repository: str, file: str) -> None:
    """Requests a file's header from the hub once, because its client retries downloads for minutes.

    Raises:
        EntryNotFoundError: the repository lacks the file.
        HubError: the hub is out of reach, or this user may not read the repository.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
    )

    try:
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_TIMEOUT)
    except EntryNotFoundError:
        raise
    except GatedRepoError:
        raise HubError(
            f"{repository} has a license to accept on huggingface.co before `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no {repository}, or not for everyone: then log in with `hf auth login`"
        ) from None
    except Exception as error:  # of httpx or requests, depending on the hub's client
        raise HubError(f"cannot reach {repository} on the hub: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_transformers(
    model: type[PreTrainedModel], processor: type[ProcessorMixin], name: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model of transformers and its processor; downloads only files that are not cached.

    Args:
        model: the model's class.
        processor: its processor's class.
        name: a folder or OWNER/NAME on the hub.
        dtype: the dtype of the weights.

    Raises:
        HubError: the hub is needed and out of reach.
        Exception: any error of transformers, for damaged or missing files.
    """

    def load(**options: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
        weights = model.from_pretrained(name, dtype=dtype, **options)
        return weights, processor.from_pretrained(name, **options)

    if os.path.isdir(name):
        return load()
    try:
        return load(local_files_only=True)
    except (OSError, ValueError):
        check_hub(name, "config.json")
        return load()
