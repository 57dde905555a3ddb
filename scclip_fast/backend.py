"""The choice of the implementation of an op: Triton kernels, chunked torch, or the reference.

The first of these decides: the op's argument `backend=`, an enclosing `with backend(...)`, the
environment variable `SCCLIP_FAST_BACKEND`. Without any of them, Triton runs GPU tensors that its
kernels support, and torch everything else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "SCCLIP_FAST_BACKEND"
NAMESPACE = __name__.split(".")[0]  # of registered ops; a copy of another name has its own (`hub`)

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch.compile cannot trace find_spec

# A plain global, because torch.compile traces it and guards on it. It cannot trace a ContextVar in
# torch 2.11, and does not guard on a threading.local.
_scoped: str | None = None


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the `with` block on one backend, in all threads.

    Args:
        name: "triton", "torch", "reference", or None to undo an enclosing scope.

    Raises:
        ValueError: `name` is none of these.
    """
    global _scoped
    outer, _scoped = _scoped, _check_name(name, "backend")
    try:
        yield
    finally:
        _scoped = outer


def resolve(name: str | None, *tensors: torch.Tensor) -> str:
    """Returns the backend that runs an op on these tensors, by the rule of this module.

    Raises:
        ValueError: an unknown name, or a request for Triton where it cannot run.
    """
    requested = (
        _check_name(name, "backend")
        or _scoped
        or _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE)
    )
    if requested is None:
        return "triton" if _on_gpu(tensors[0]) and _obstacle(tensors) is None else "torch"
    if requested == "triton" and (obstacle := _obstacle(tensors)):
        raise ValueError(
            f'backend "triton" cannot run here: {obstacle}; use "torch" or leave backend=None'
        )
    return requested


def operands(backend: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the tensors as a resolved backend computes on them: in float64 for the reference.

    The caller casts the result. Results and gradients of the reference are therefore rounded once.
    """
    return tuple(t.double() for t in tensors) if backend == "reference" else tensors


def _check_name(name: str | None, argument: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


def _obstacle(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Returns the reason why the kernels cannot run on these tensors, or None if they can."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "the kernels take float16, bfloat16 and float32, not float64"
    if not _HAS_TRITON:
        return "the triton package is not installed"
    if tensors[0].is_cuda and torch.version.hip is None:
        # torch.compile traces this call, but not get_device_capability.
        properties = torch.cuda.get_device_properties(tensors[0].device)
        if properties.major < 8:
            present = f"{properties.major}.{properties.minor}"
            return f"the kernels need compute capability 8.0 or newer, and this GPU has {present}"
    if not _on_gpu(tensors[0]) and os.environ.get("TRITON_INTERPRET") != "1":
        device = tensors[0].device
        return f"the tensors are on {device}, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return None


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")
