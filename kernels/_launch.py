"""Kernel launches as data, and the options that they take from the architecture of a GPU.

A launcher returns a `Launch`, which runs on the device of its tensors or is compiled ahead of time
for a GPU that is not there (tests/aot.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ._run import run


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of launches that differ between architectures.

    Attributes:
        least_warps: warps that a pipelined launch, one with several stages, has at least.
        most_stages: stages of the software pipeline that a launch has at most.
        bins_columns_held: columns a step of `bins` where its rows stay in shared memory.
        bins_columns: columns a step of `bins` where they do not.
        panel_tile: rows and columns of a tile of `panel`.
        split_step: channels a step of `weights`, and tokens a step of `product`, where float32
            operands are split.
        stream_tokens: tokens a step of `stream` where its rows do not stay in shared memory.
        attention_tile: rows and columns of a tile of float32 `attention`.
        float32_products: Triton's name for products of float32 operands to nearly float32 accuracy.
    """

    least_warps: int
    most_stages: int
    bins_columns_held: int
    bins_columns: int
    panel_tile: int
    split_step: int
    stream_tokens: int
    attention_tile: tuple[int, int]
    float32_products: str


#: Hopper has wgmma, the bulk tensor copy and the largest tiles: those that an H200 ran fastest
#: (bench/NOTES.md). Its tensor cores take three tf32 products for float32, error about 2^-22.
HOPPER = Options(
    least_warps=1,
    most_stages=4,
    bins_columns_held=128,
    bins_columns=256,
    panel_tile=128,
    split_step=64,
    stream_tokens=64,
    attention_tile=(128, 64),
    float32_products="tf32x3",
)
#: Other NVIDIA GPUs have less shared memory, and spill what four warps hold on Hopper: more than 64
#: columns of `bins`, tiles of 128 of `panel` (112 bytes, sm_80; 7872, sm_75), 64 split channels of
#: `weights` (464 bytes, sm_80, Triton 3.8) and 128 rows of float32 `attention` (264 bytes, 3.9).
NVIDIA = Options(
    least_warps=8,
    most_stages=2,
    bins_columns_held=64,
    bins_columns=64,
    panel_tile=64,
    split_step=32,
    stream_tokens=32,
    attention_tile=(64, 32),
    float32_products="tf32x3",
)
#: AMD GPUs have 64 KiB of shared memory, so one stage, and matrix cores for float32 itself.
AMD = Options(
    least_warps=8,
    most_stages=1,
    bins_columns_held=64,
    bins_columns=64,
    panel_tile=64,
    split_step=32,
    stream_tokens=32,
    attention_tile=(64, 32),
    float32_products="ieee",
)


@dataclass(frozen=True)
class Architecture:
    """The properties of a GPU that decide the tiles and the number of programs of a launch.

    Attributes:
        capability: NVIDIA's compute capability, 90 for sm_90; 0 for GPUs of other makers.
        shared: bytes of shared memory that a block may use.
        multiprocessors: NVIDIA's multiprocessors or AMD's compute units; an H100 has 132.
    """

    capability: int
    shared: int
    multiprocessors: int = 132

    @property
    def options(self) -> Options:
        if self.capability // 10 == 9:
            return HOPPER
        return NVIDIA if self.capability else AMD


#: An A100's limits, for Triton's interpreter and for tensors without a device.
WITHOUT_GPU = Architecture(80, 163 * 1024)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The architecture of a GPU, or `WITHOUT_GPU` for any other device."""
    if device.type not in ("cuda", "xpu"):
        return WITHOUT_GPU
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return Architecture(0, getattr(properties, "shared_memory_per_block", 64 * 1024))
    processors = properties.multi_processor_count
    if torch.version.hip is not None:
        shared = getattr(properties, "shared_memory_per_block", 64 * 1024)
        return Architecture(0, shared, processors)
    capability = 10 * properties.major + properties.minor
    return Architecture(capability, properties.shared_memory_per_block_optin, processors)


class Launch:
    """One kernel launch on a one-dimensional grid.

    Attributes:
        kernel: the jit function.
        programs: the number of programs.
        num_warps: warps a program, as on Hopper.
        num_stages: stages of the software pipeline, as on Hopper; None for a kernel without one.
        enable_fp_fusion: whether the compiler may fuse products and sums, whose rounding differs.
        arguments: all arguments of the kernel by name, its `tl.constexpr` ones included.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        /,
        *,
        num_warps: int = 4,
        num_stages: int | None = None,
        enable_fp_fusion: bool = True,
        **arguments: Any,
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.enable_fp_fusion = enable_fp_fusion
        self.arguments = arguments

    @property
    def constants(self) -> dict[str, Any]:
        """The `tl.constexpr` arguments by name."""
        annotations = self.kernel.fn.__annotations__
        return {
            name: value
            for name, value in self.arguments.items()
            if "constexpr" in str(annotations.get(name))
        }

    def compile_options(self, gpu: Architecture) -> dict[str, int]:
        """Returns the options that differ from Triton's defaults on a GPU, by name."""
        options = dict(num_warps=self.num_warps)
        if self.num_stages is not None:
            least_warps = gpu.options.least_warps if self.num_stages > 1 else 1
            options["num_warps"] = max(least_warps, self.num_warps)
            options["num_stages"] = min(gpu.options.most_stages, self.num_stages)
        if not self.enable_fp_fusion:
            options["enable_fp_fusion"] = False
        return options

    def run(self) -> None:
        """Enqueues the kernel on the device of its tensors.

        Raises:
            RuntimeError: the kernel is not loaded yet and a CUDA graph is being captured.
        """
        if self.programs == 0:
            return
        assert self.programs < 2**31, "more programs than a grid may have"
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        options = self.compile_options(architecture(device))
        run(self.kernel, self.programs, self.arguments, options, device)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, as `triton.cdiv`, which takes 2 us of Python a call."""
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The least power of two that is n or more, within low and high (powers of two)."""
    return max(low, min(high, 1 << (n - 1).bit_length()))


def strides(name: str, tensor: torch.Tensor, dims: str) -> dict[str, int]:
    """{"stride_<name><dim>": stride} for each letter of `dims`."""
    return dict(zip(_stride_names(name, dims), tensor.stride(), strict=True))


@functools.cache
def _stride_names(name: str, dims: str) -> list[str]:
    return [f"stride_{name}{dim}" for dim in dims]
