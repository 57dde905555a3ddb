"""open_clip's loader, with its traps marked: unknown names, QuickGELU, a hub out of reach."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..extras import needs
from .config import SCCLIPConfig
from .model import SCCLIP

with needs("clip"):
    import open_clip

SCENES = f"local-dir:{Path(__file__).parents[1] / 'scenes'}"
_HUB_TIMEOUT = 10  # seconds for the one request that decides whether to download
_WEIGHT_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")


def create_model(
    name: str,
    pretrained: str | None = None,
    *,
    method: str = "scclip",
    config: SCCLIPConfig | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> tuple[SCCLIP, Callable]:
    """A frozen open_clip model, calibrated, in evaluation mode, and its tokenizer.

    Args:
        name: what open_clip.create_model takes ("ViT-B-16-quickgelu", "hf-hub:...",
            "local-dir:..."), or "scenes" for the small CLIP of drawn scenes that comes with this
            package.
        pretrained: open_clip's tag of the weights ("openai", "laion2b_s34b_b88k", ...) or a file;
            None leaves them random, or is required where the name brings its weights. Weights that
            were trained with QuickGELU get it.
        method: see `SCCLIP`.
        config: see `SCCLIP`.
        precision: open_clip's: "fp32", "fp16", "bf16", ... (norms stay float32), "pure_fp16", ...
        device: where the model goes.

    Returns:
        The model, and open_clip's tokenizer for it: (list of texts) -> token ids (B, length).

    Raises:
        ValueError: an unknown name or tag, or what `SCCLIP` refuses.
        RuntimeError: the weights cannot be downloaded or read; the message says why.
    """
    brings_weights = name == "scenes" or ":" in name
    if brings_weights and pretrained is not None:
        raise ValueError(f"{name} brings its weights; pretrained must be None, got {pretrained!r}")
    quick_gelu = not brings_weights and _fetch_named(name, pretrained)
    source = SCENES if name == "scenes" else name
    try:
        model = open_clip.create_model(
            source,
            pretrained,
            precision=precision,
            device=device,
            force_quick_gelu=quick_gelu,
            require_pretrained=brings_weights or pretrained is not None,
        )
        tokenizer = open_clip.get_tokenizer(source)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of open_clip, safetensors, pickle, the file system
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"cannot load {name} {pretrained or ''}: {reason}") from error
    return SCCLIP(model.eval().requires_grad_(False), config, method), tokenizer


def _fetch_named(name: str, pretrained: str | None) -> bool:
    """Check the names and bring the weights; returns whether they were trained with QuickGELU."""
    known = open_clip.list_models()
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=5) or known
        raise ValueError(f"unknown model {name!r}; open_clip has {', '.join(similar)}")
    if pretrained is None or os.path.isfile(pretrained):
        return False
    if not open_clip.is_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{name} has no weights {pretrained!r}; open_clip has {tags}")
    if failure := fetch_weights(name, pretrained):
        raise RuntimeError(f"cannot download {name} {pretrained}: {failure}")
    return open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)


def fetch_weights(name: str, tag: str) -> str | None:
    """Bring the weights into the hub's cache; returns why that failed, or None.

    One short request comes first: without a network, open_clip would retry for most of a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    config = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(config["hf_hub"])
    files = (file,) if file else _WEIGHT_FILES
    try:
        if not any(isinstance(try_to_load_from_cache(repository, f), str) for f in files):
            try:
                get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=_HUB_TIMEOUT)
            except EntryNotFoundError:
                pass  # the hub answers; open_clip knows where else to look
        open_clip.download_pretrained(config)
    except Exception as error:  # errors of httpx or requests, by the version of the hub's client
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
