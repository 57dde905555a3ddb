"""Checks of arguments that the ops share.

All but `all_finite` read shapes, dtypes and devices, never data, so that they wait for no GPU.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless `tensor` is a tensor of one of `FLOAT_DTYPES`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have a floating dtype ({allowed}), got {tensor.dtype}")


def batched(name: str, tensor: Tensor, layout: str) -> Tensor:
    """Returns `tensor` with a batch dimension in front, which is added if it is missing.

    Args:
        layout: the names of the dimensions, such as "B, N, D".

    Raises:
        ValueError: another number of dimensions, or a dimension of size 0 other than the batch.
    """
    rank = layout.count(",") + 1
    unbatched = layout.removeprefix("B, ")
    if tensor.dim() not in (rank - 1, rank):
        raise ValueError(
            f"{name} must be ({unbatched}) or ({layout}), got shape {tuple(tensor.shape)}"
        )
    tensor = tensor if tensor.dim() == rank else tensor.unsqueeze(0)
    if 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name} ({layout}) must not be empty beyond its batch, got shape {tuple(tensor.shape)}"
        )
    return tensor


def tokens(name: str, tensor: Tensor) -> Tensor:
    """Returns a floating (N, D) or (B, N, D) as (B, N, D).

    A batch of images of one token each is refused, because no op on tokens has a use for it. Such a
    tensor is almost certainly (N, 1, D), sequence first as in published code.
    """
    floating(name, tensor)
    batch = batched(name, tensor, "B, N, D")
    if batch.shape[1] == 1 and batch.shape[0] > 1:
        raise ValueError(
            f"{name} must have more than one token an image, got shape {tuple(tensor.shape)}; "
            f"tokens are batch first, (B, N, D): for (N, B, D) pass {name}.transpose(0, 1)"
        )
    return batch


def same_device(**tensors: Tensor) -> None:
    """Raises ValueError if the tensors lie on several devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {given}")


def same_rank(**tensors: Tensor) -> None:
    """Raises ValueError if some tensors have a batch dimension and others none."""
    if len({tensor.dim() for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"either all tensors or none must have a batch dimension, got {given}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raises ValueError unless the tensor has the expected shape; `why` explains the shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} {why}, got {tuple(tensor.shape)}")


def neighbor_count(name: str, k: int, n: int) -> int:
    """Returns k as an int in [1, n - 1], as each of n tokens has n - 1 others."""
    k = integer(name, k, low=1)
    if n <= k:
        raise ValueError(
            f"{name} must be smaller than the number of tokens, got {name}={k} with N={n} tokens "
        )
    return k


def integer(name: str, value: int, low: int, high: int | None = None, why: str = "") -> int:
    """Returns value as an int in [low, high]; `why` explains the bounds in the message."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}{why}, got {value}")
    return int(value)


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns value as a finite float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # math.isfinite rejects the symbolic numbers of torch.compile(dynamic=True).
    if not (-math.inf < value < math.inf and low <= value <= high):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {value}")
    return float(value)


def switch(name: str, value: bool) -> None:
    """Raises TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the allowed words."""
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def contamination(value: float, name: str = "contamination") -> float:
    """Returns value as a float in (0, 0.5], the share of tokens that are outliers."""
    value = number(name, value)
    if not 0 < value <= 0.5:
        raise ValueError(f"{name} must be in (0, 0.5], got {value}")
    return value


def all_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError with the first token of (B, N, D) that is not finite. Waits for a GPU."""
    broken = (~tensor.isfinite().all(dim=-1)).nonzero()
    if len(broken):
        image, token = broken[0].tolist()
        raise ValueError(
            f"{name} must be finite: {len(broken)} token(s) hold NaN or infinity, "
            f"the first is token {token} of image {image}"
        )


def no_tangent(op: str, *tensors: Tensor) -> None:
    """Raises NotImplementedError if a tensor has a tangent, which a custom op would lose."""
    # torch keeps this level private. It is -1 outside forward mode, where nothing needs unpacking.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
            "reverse mode (backward, torch.autograd.grad) is available"
        )
