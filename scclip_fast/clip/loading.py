"""Loads a CLIP of open_clip or transformers by its name, with clear errors if that fails."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..extras import needs
from .config import SCCLIPConfig
from .model import SCCLIP
from .proxy import load_proxy
from .sources import (
    HubError,
    Source,
    check_hub,
    find_source,
    first_line,
    hub_file,
    load_transformers,
)

with needs("clip"):
    import open_clip

    from .openclip_tower import OpenClipTower

_WEIGHT_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
_HUB = "hf-hub:"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def create_model(
    name: str,
    pretrained: str | None = None,
    *,
    method: str = "scclip",
    config: SCCLIPConfig | None = None,
    proxy: str | nn.Module | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> tuple[SCCLIP, Callable]:
    """Loads a frozen, calibrated CLIP in evaluation mode, and its tokenizer.

    Args:
        name: a name of open_clip.create_model ("ViT-B-16-quickgelu", "hf-hub:...",
            "local-dir:..."); OpenAI's name ("ViT-B/16"); transformers' CLIP, by its name on the hub
            ("openai/clip-vit-base-patch16"); a folder with either library's files; or "scenes" for
            the small CLIP of drawn scenes that comes with this package.
        pretrained: open_clip's tag of the weights ("openai", "laion2b_s34b_b88k", ...) or a file.
            None leaves the weights random, or is required if the name stands for weights too.
            Models whose weights were trained with QuickGELU get QuickGELU.
        method: see `SCCLIP`.
        config: see `SCCLIP`.
        proxy: see `SCCLIP`; or a name for `scclip_fast.clip.proxy.load_proxy`, as "dinov2", whose
            weights are float32.
        precision: for open_clip, "fp32", "fp16", "bf16", ... (norms stay float32), "pure_fp16",
            ...; for transformers' CLIP, "fp32", "fp16" or "bf16", for all weights.
        device: the model's device.

    Returns:
        The model, and the tokenizer for `Segmenter`: open_clip's, (list of texts) -> token ids
        (B, length), or the CLIPProcessor of transformers' CLIP.

    Raises:
        ValueError: the name, tag or precision is unknown, the model is of another kind, or `SCCLIP`
            refuses it.
        RuntimeError: the weights cannot be downloaded or read; the message has the reason.
    """
    source = find_source(name)
    if source.brings_weights and pretrained is not None:
        raise ValueError(f"{name} brings its weights; pretrained must be None, got {pretrained!r}")
    if source.kind == "sam3":
        raise ValueError(f"{name} is a SAM3, which scclip_fast.sam3 calibrates, and no CLIP")
    if source.kind == "transformers":
        dtype = _dtype(precision)
        with _one_line(name, pretrained):
            model, tokenizer = _load_transformers(source.name, dtype, device)
    else:
        quick_gelu = _prepare(source, pretrained)
        with _one_line(name, pretrained):
            model, tokenizer = _load_open_clip(source, pretrained, quick_gelu, precision, device)
    proxy = load_proxy(proxy).to(device) if isinstance(proxy, str) else proxy
    return SCCLIP(model.eval().requires_grad_(False), config, method, proxy), tokenizer


@contextmanager
def _one_line(name: str, pretrained: str | None) -> Iterator[None]:
    """Converts errors of the libraries, safetensors, pickle and files into a RuntimeError."""
    try:
        yield
    except (HubError, torch.OutOfMemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        weights = "" if pretrained is None else f" {pretrained}"
        raise RuntimeError(f"cannot load {name}{weights}: {first_line(error)}") from error


def _dtype(precision: str) -> torch.dtype:
    if precision not in _DTYPES:
        allowed = ", ".join(_DTYPES)
        raise ValueError(f"precision must be one of {allowed} here, got {precision!r}")
    return _DTYPES[precision]


def _load_transformers(
    name: str, dtype: torch.dtype, device: str | torch.device
) -> tuple[nn.Module, Callable]:
    with needs("sam3"):
        from transformers import CLIPModel, CLIPProcessor
    model, processor = load_transformers(CLIPModel, CLIPProcessor, name, dtype)
    return model.to(device), processor


def _load_open_clip(
    source: Source,
    pretrained: str | None,
    quick_gelu: bool,
    precision: str,
    device: str | torch.device,
) -> tuple[nn.Module, Callable]:
    has_weights = source.brings_weights or pretrained is not None
    with _silence(not has_weights):  # open_clip warns of random weights; here they are requested
        model = open_clip.create_model(
            source.name,
            pretrained,
            precision=precision,
            device=device,
            force_quick_gelu=quick_gelu,
            require_pretrained=has_weights,
        )
    return model, open_clip.get_tokenizer(source.name)


def _prepare(source: Source, pretrained: str | None) -> bool:
    """Checks names and downloads weights; returns whether these were trained with QuickGELU."""
    if source.brings_weights:
        if source.name.startswith(_HUB):
            _fetch_hub(source.name.removeprefix(_HUB))
        return False
    name = source.name
    names = open_clip.list_models()
    if name not in names:
        similar = difflib.get_close_matches(name, names, n=5) or names
        raise ValueError(f"unknown model {name!r}; open_clip has {', '.join(similar)}")
    if pretrained is None or os.path.isfile(pretrained):
        return False
    if not open_clip.is_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{name} has no weights {pretrained!r}; open_clip has {tags}")
    _check_tower(name)
    if tokenizer := open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name"):
        hub_file(tokenizer, "tokenizer_config.json")
    if failure := fetch_weights(name, pretrained):
        raise HubError(f"cannot download {name} {pretrained}: {failure}")
    return open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)


def _check_tower(name: str) -> None:
    """Raises ValueError for a tower that `SCCLIP` refuses, before gigabytes are downloaded."""
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
        return  # making the model would request its text tower from the hub
    with _silence(), torch.device("meta"):
        OpenClipTower(open_clip.create_model(name, device="meta"))


def _fetch_hub(repository: str) -> None:
    """Raises RuntimeError unless a config of open_clip and weights are cached or within reach."""
    if hub_file(repository, "open_clip_config.json") is None:
        raise RuntimeError(f"cannot load {repository}: it has no open_clip_config.json")
    _check_weights(repository, _WEIGHT_FILES)


def fetch_weights(name: str, tag: str) -> str | None:
    """Downloads weights into the hub's cache; returns the reason of a failure, or None."""
    config = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(config["hf_hub"])
    try:
        _check_weights(repository, (file,) if file else _WEIGHT_FILES)
        open_clip.download_pretrained(config)
    except Exception as error:  # of httpx or requests, depending on the hub's client
        return first_line(error)
    return None


def _check_weights(repository: str, files: tuple[str, ...]) -> None:
    """Raises HubError if none of the files is cached and the hub is out of reach."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    if not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        try:
            check_hub(repository, files[0])
        except EntryNotFoundError:
            pass  # the hub answers, and open_clip looks for other files as well


@contextmanager
def _silence(silent: bool = True) -> Iterator[None]:
    """Disables logging of warnings, if `silent`."""
    previous = logging.root.manager.disable
    if silent:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
