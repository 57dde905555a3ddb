"""Launches as data: a launcher hands them to Triton to run, or to compile ahead without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the jit function.
        programs: size of the one-dimensional grid.
        args: its run-time arguments by name.
        constants: its `tl.constexpr` arguments by name.
        options: `num_warps`, `num_stages`, for Hopper.
    """

    kernel: Any
    programs: int
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def compile_options(self, gpu: Architecture) -> dict[str, int]:
        """The options on a GPU.

        Others than Hopper have less shared memory, AMD's 64 KiB, and spill what four warps hold on
        Hopper.
        """
        if gpu.hopper or "num_stages" not in self.options:
            return self.options
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        if stages > 1:
            warps = max(8, warps)
        return dict(num_warps=warps, num_stages=min(2, stages) if gpu.capability else 1)

    def run(self) -> None:
        """Enqueue the kernel on the device of its tensors.

        Raises:
            RuntimeError: the kernel is not loaded yet and a CUDA graph is being captured.
        """
        if self.programs == 0:
            return
        assert self.programs < 2**31, "more programs than a grid may have"
        device = next(a.device for a in self.args.values() if isinstance(a, torch.Tensor))
        options = self.compile_options(architecture(device))
        with _on_device(device), _widened(self.args) as args:
            if _capturing(device):
                self._require_loaded(args, options)
            self.kernel[(self.programs,)](**args, **self.constants, **options)

    def _require_loaded(self, args: dict[str, Any], options: dict[str, int]) -> None:
        # The driver loads no code while it captures; its refusal would end the capture with an
        # error that names neither. `warmup` compiles and does not load.
        compiled = self.kernel.warmup(**args, **self.constants, **options, grid=(self.programs,))
        if compiled.module is None:
            raise RuntimeError(
                f"{self.kernel.__name__} cannot be loaded while a CUDA graph is captured: call the "
                "op once with these shapes and dtypes before capturing"
            )


@dataclass(frozen=True)
class Architecture:
    """The properties of a GPU that decide the tile of a launch.

    Attributes:
        capability: NVIDIA's compute capability, 90 for sm_90; 0 for the GPUs of others.
        shared: bytes of shared memory that a block may use.
    """

    capability: int
    shared: int

    @property
    def hopper(self) -> bool:
        """True for GPUs with wgmma and the bulk tensor copy, for which the largest tiles are."""
        return self.capability // 10 == 9

    @property
    def dot_precision(self) -> str:
        """Triton's name for products of float32 operands to nearly float32 accuracy.

        NVIDIA tensor cores take three tf32 products (error about 2^-22), AMD matrix cores float32.
        """
        return "tf32x3" if self.capability else "ieee"


#: An A100: the plan of Triton's interpreter and of tensors without a device.
ELSEWHERE = Architecture(80, 163 * 1024)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The architecture of a GPU, or `ELSEWHERE` where the device is none."""
    if device.type not in ("cuda", "xpu"):
        return ELSEWHERE
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu" or torch.version.hip is not None:
        return Architecture(0, getattr(properties, "shared_memory_per_block", 64 * 1024))
    capability = 10 * properties.major + properties.minor
    return Architecture(capability, properties.shared_memory_per_block_optin)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors (NVIDIA) or compute units (AMD) of a GPU; 132, an H100's, elsewhere."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int, low: int, high: int) -> int:
    """The power of two at or above n, held between low and high (powers of two)."""
    return max(low, min(high, triton.next_power_of_2(n)))


def strides(name: str, tensor: torch.Tensor, dims: str) -> dict[str, int]:
    """{"stride_<name><dim>": stride} for each letter of `dims`."""
    return {
        f"stride_{name}{dim}": stride for dim, stride in zip(dims, tensor.stride(), strict=True)
    }


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(device: torch.device):
    # Triton launches on the current device, not on that of its arguments ("Pointer argument cannot
    # be accessed").
    on_gpu = device.type in ("cuda", "xpu")
    return torch.get_device_module(device).device(device) if on_gpu else nullcontext()


@contextmanager
def _widened(args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """float32 copies for Triton's interpreter, whose `tl.dot` reads bfloat16 as integers."""
    if not triton.knobs.runtime.interpret:
        yield args
        return
    short = {name: a for name, a in args.items() if getattr(a, "dtype", None) == torch.bfloat16}
    # `.data`: writing the inputs back as they were is no modification that autograd should see.
    storages = {
        n: a.data.as_strided((a.untyped_storage().nbytes() // 2,), (1,), 0)
        for n, a in short.items()
    }
    wide = {name: storage.float() for name, storage in storages.items()}
    views = {
        name: wide[name].as_strided(a.size(), a.stride(), a.storage_offset())
        for name, a in short.items()
    }
    yield args | views
    for name, storage in storages.items():
        storage.copy_(wide[name])
