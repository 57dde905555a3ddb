"""Runs of kernels, and the compiled kernels that later runs of the same specialisation take again.

`kernel[grid](...)` binds its arguments, specialises and looks up the compiled kernel again in each
run: 14 to 26 us of Python (Triton 3.8, AMD EPYC). A run like an earlier one calls the compiled
kernel of that run, which takes 6 to 9 us, driver excluded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

if triton.knobs.runtime.interpret:
    from ._interpreter import call
else:

    def call(kernel: Any, programs: int, arguments: dict[str, Any]) -> Any:
        return kernel[(programs,)](**arguments)


MOST_SPECIALISATIONS = 2048  # of all kernels, of which the least recently used are forgotten


class Launched(NamedTuple):
    """A launch that ran.

    Attributes:
        compiled: the compiled kernel.
        arg_names: the names of its arguments in order.
        programs: the number of programs.
        arguments: the arguments by name.
    """

    compiled: Any
    arg_names: list[str]
    programs: int
    arguments: dict[str, Any]


class _Recording(threading.local):
    launched: list[Launched] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Yields the list of the launches of this thread inside the `with` block."""
    _recording.launched = []
    try:
        yield _recording.launched
    finally:
        _recording.launched = None


def run(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    options: dict[str, int],
    device: torch.device,
) -> None:
    """Enqueues a kernel on a device.

    Args:
        kernel: the jit function.
        programs: the number of programs.
        arguments: all arguments of the kernel by name.
        options: Triton's options by name.
        device: that of the tensors.

    Raises:
        RuntimeError: the kernel is not loaded yet and a CUDA graph is being captured.
    """
    with on_device(device):
        keeps = keeps_compiled(device)
        earlier = _compiled(key_of(kernel, arguments, options, device)) if keeps else []
        if earlier:
            compiled = earlier[0]
            compiled[(programs, 1, 1)](*[arguments[name] for name in kernel.arg_names])
        else:
            if capturing(device):
                _require_loaded(kernel, programs, arguments | options)
            compiled = call(kernel, programs, arguments | options)
            if isinstance(compiled, CompiledKernel):  # not so in the interpreter
                earlier.append(compiled)
    if _recording.launched is not None:
        _recording.launched.append(Launched(compiled, kernel.arg_names, programs, arguments))


def key_of(
    kernel: Any, arguments: dict[str, Any], options: dict[str, int], device: torch.device
) -> tuple[Any, ...]:
    """Returns a hashable that differs wherever Triton would compile another kernel for NVIDIA GPUs.

    Triton specialises on dtypes, on the alignment of pointers to 16 bytes, and on integers that are
    1, multiples of 16 or wider than 32 bits. Numbers stand for themselves, as a call's sizes and
    strides seldom change.
    """
    parts = [a if type(a) is int else _part(a) for a in arguments.values()]
    return kernel.fn, device.index, *compiler_settings(), *options.items(), *parts


def compiler_settings() -> tuple[Any, ...]:
    """Returns the settings of the process that Triton adds to every call."""
    knobs = triton.knobs
    return knobs.runtime.debug, getattr(knobs.compilation, "instrumentation_mode", None)


def _part(argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.shape, *argument.strides, *argument.block_shape
    return type(argument), argument  # 1 == 1.0 == True


@functools.lru_cache(MOST_SPECIALISATIONS)
def _compiled(key: tuple[Any, ...]) -> list[Any]:
    """Returns the list of the compiled kernel of earlier runs with this key, empty at the first."""
    return []


def keeps_compiled(device: torch.device) -> bool:
    # Triton for AMD specialises on more: whether a tensor has less than 2 GiB.
    return device.type == "cuda" and torch.version.hip is None


def _require_loaded(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    # The driver loads no code during a capture. Its own refusal would end the capture with an error
    # that names neither the kernel nor the reason. `warmup` compiles and does not load.
    compiled = kernel.warmup(**arguments, grid=(programs,))
    if compiled.module is None:
        raise RuntimeError(
            f"{kernel.__name__} cannot be loaded while a CUDA graph is captured: call the op once "
            "with these shapes and dtypes before capturing"
        )


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_streamcapturing()


def on_device(device: torch.device):
    # Triton launches on the current device, which need not be that of the arguments ("Pointer
    # argument cannot be accessed").
    if device.type not in ("cuda", "xpu"):
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)
