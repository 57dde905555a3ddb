"""Calls of kernels in Triton's interpreter, whose `tl.dot` multiplies the bits of bfloat16."""

from __future__ import annotations

from typing import Any

import torch


def call(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Runs a kernel on float32 copies of its bfloat16 tensors, and rounds these back."""
    # `.data`: to write an input back unchanged is no modification for autograd.
    short = {name: a.data for name, a in arguments.items() if _is_bfloat16(a)}
    storages = {
        name: a.as_strided((a.untyped_storage().nbytes() // 2,), (1,), 0)
        for name, a in short.items()
    }
    wide = {name: storage.float() for name, storage in storages.items()}
    views = {
        name: wide[name].as_strided(a.size(), a.stride(), a.storage_offset())
        for name, a in short.items()
    }
    kernel[(programs,)](**arguments | views)
    for name, storage in storages.items():
        storage.copy_(wide[name])


def _is_bfloat16(argument: Any) -> bool:
    return getattr(argument, "dtype", None) == torch.bfloat16
