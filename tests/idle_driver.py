"""Triton with a driver that does nothing, so that launches run up to the driver without a GPU.

Python's share of a launch can be measured so, and what Triton compiles can be asked. The process
must be one without Triton's interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from scclip_fast.kernels import _launch, _run

HOPPER = _launch.Architecture(90, 227 * 1024)


class Driver:
    """The parts of a driver that compile, load and launch, and a count of the launches."""

    launches = 0

    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: dict(
            max_shared_mem=HOPPER.shared, multiprocessor_count=132, warpSize=32
        ),
    )

    @classmethod
    def launcher_cls(cls, src, metadata):
        def launch(*arguments):
            cls.launches += 1

        return launch

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def install() -> None:
    """Makes tensors on the CPU launch kernels as on an H100, of which nothing is computed."""
    triton.runtime.driver.set_active(Driver())
    _launch.WITHOUT_GPU = HOPPER
    _launch.architecture.cache_clear()
    _run.keeps_compiled = lambda device: True
