"""The provenance of a run beyond its options: weights, files of the data set, versions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import __version__

if TYPE_CHECKING:
    from .datasets import Dataset


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
    """Returns the versions of Python, this package and the packages that results depend on."""
    packages = ("torch", "open_clip_torch", "torchmetrics", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        "scclip_fast": __version__,
        **{package: version(package) for package in packages},
    }
