"""The provenance of a run beyond its options: weights, files of the data set, versions."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import __version__

if TYPE_CHECKING:
    from .datasets import Dataset


_PACKAGES = ("torch", "open_clip_torch", "transformers", "timm", "torchmetrics", "numpy", "pillow")


def weights_digest(encoder: nn.Module) -> str:
    """Returns a SHA-256 of all weights, shortened, because a model's name does not pin them."""
    sha = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def dataset_files(dataset: Dataset) -> dict[str, str]:
    """Returns the data set's folder and a digest of the names of all its images."""
    if dataset.folder is None:
        return {}
    names = "\n".join(dataset.all_names)
    return {
        "folder": str(dataset.folder.resolve()),
        "images": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and the packages that results may depend on.

    Models and proxies are of open_clip, transformers or timm, which need not be installed.
    """
    versions = {"python": platform.python_version(), "scclip_fast": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
