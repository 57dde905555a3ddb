"""Float32 products in true float32, whatever precision the caller allows.

`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32`, the `fp32_precision`
settings of torch 2.9 and `torch.autocast` make products faster by rounding their operands to 8 or
11 bits. They are meant for the layers of a network. Neighbours and thresholds would be wrong, so
the ops of this package neither follow these settings nor change them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor  # torch.library.custom_op reads annotations of decorated functions here

P = ParamSpec("P")
R = TypeVar("R")

#: Torch's backends that have a setting of their own, which decides since torch 2.9, and the values
#: of this setting that mean true float32.
_BACKENDS = ("cuda", "mkldnn") if hasattr(torch._C, "_get_fp32_precision_getter") else ()
_FULL = frozenset(("ieee", "none"))


def true_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of tensors so that its products of float32 are in true float32.

    During a call, autocast is off for the device of the first tensor among the arguments, and the
    process-wide precision of float32 products is the highest. Both are restored afterwards, also
    after an exception. Calls may nest, and several threads may call at a time. The GPU is not
    waited for.

    `torch.compile` cannot trace the decorator: the function must be the implementation of a custom
    op, which is opaque to it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        device = next((t.device.type for t in tensors), "meta")
        with _highest_precision:
            # Some devices, such as meta, have no autocast.
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

    return run


class _HighestPrecision:
    """A context for any number of threads at a time. The last one to leave restores the setting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # The caller may have lowered the setting since the first thread entered.
            self._restore = _raise_precision() or self._restore
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._restore is not None:
                self._restore()
                self._restore = None


_highest_precision = _HighestPrecision()


def _raise_precision() -> Callable[[], None] | None:
    """Sets the highest precision and returns a function that restores the present one.

    Returns None if the precision is the highest already.
    """
    settings = [torch._C._get_fp32_precision_getter(b, "matmul") for b in _BACKENDS]
    if settings and _FULL.issuperset(settings):
        return None
    for backend in _BACKENDS:
        torch._C._set_fp32_precision_setter(backend, "matmul", "ieee")
    # Only now can the older setting be read: torch refuses while the newer ones contradict it.
    older = torch.get_float32_matmul_precision()
    if older == "highest" and not settings:
        return None
    torch.set_float32_matmul_precision("highest")
    return functools.partial(_restore_precision, older, settings)


def _restore_precision(older: str, settings: list[str]) -> None:
    """Restores the older setting and the newer ones of `_BACKENDS`."""
    torch.set_float32_matmul_precision(older)
    for backend, value in zip(_BACKENDS, settings, strict=True):
        # "none" stands for an inherited value, which the getter returns. A setting that was
        # inherited therefore stays inherited.
        torch._C._set_fp32_precision_setter(backend, "matmul", "none")
        if torch._C._get_fp32_precision_getter(backend, "matmul") != value:
            torch._C._set_fp32_precision_setter(backend, "matmul", value)
