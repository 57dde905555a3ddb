"""Plans: the launches of a call, recorded and repeated by later calls of the same shapes.

The eight launches of `nearest_triton` over bins take 175 us of Python, most of it for the tensors
of the workspace, their views and the arguments of the launches. A repetition takes 35 us: it
allocates the workspace at once and hands addresses to the compiled kernels of the recorded call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _run

MOST_PLANS = 256  # of which the least recently used are forgotten
ALIGNMENT = 512  # bytes, as torch aligns tensors on a GPU


def planned(function: Callable, inputs: tuple, settings: tuple) -> tuple[torch.Tensor, ...]:
    """Returns function(*inputs, *settings), by a plan from the third call of the same layout on.

    Args:
        function: makes tensors, views and zeros by torch, runs kernels on them, and returns a tuple
            of contiguous tensors. What it launches depends on the settings and on the dtypes,
            shapes and strides of the inputs alone, and on the device. A function that does more
            with torch than this gets no plan.
        inputs: tensors on one device, or None.
        settings: hashable.
    """
    device = inputs[0].device
    if not _run.keeps_compiled(device):
        return function(*inputs, *settings)
    layouts = map(_layout, inputs)
    calls = _calls((function, device.index, *_run.compiler_settings(), *settings, *layouts))
    if calls.plan is not None:
        return calls.plan(inputs)
    if _run.capturing(device):
        return function(*inputs, *settings)
    calls.count = count = calls.count + 1
    if count != 2:  # to record takes three times as long as the call, too long for a size met once
        return function(*inputs, *settings)
    with Recorder() as recorder, _run.recorded() as launched:
        outputs = function(*inputs, *settings)
    calls.plan = recorder.plan(launched, inputs, outputs)
    return outputs


class Calls:
    """The calls of a function with inputs of one layout: their number, and their plan."""

    def __init__(self) -> None:
        self.count = 0
        self.plan: Plan | None = None


@functools.lru_cache(MOST_PLANS)
def _calls(key: tuple[Any, ...]) -> Calls:
    return Calls()


class Pointer:
    """An address, which Triton takes for a tensor because it has `data_ptr` and `dtype`."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


class Place(NamedTuple):
    """The place of a tensor of a launch: an offset in bytes from the first element of a base.

    The bases of a plan are the workspace, the inputs and the outputs, in this order.
    """

    base: int
    offset: int
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Watches what a call does with torch, and makes the plan of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[torch.Tensor] = []
        self.repeatable = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("zeros", "new_zeros"):
            self.zeros.append(out)
        elif name not in ("empty", "new_empty"):
            given = {_storage(a) for a in args if isinstance(a, torch.Tensor)}
            made = out if isinstance(out, (list, tuple)) else [out]
            views = all(isinstance(t, torch.Tensor) and _storage(t) in given for t in made)
            self.repeatable &= views and not func._schema.is_mutable
        return out

    def plan(
        self, launched: list[_run.Launched], inputs: tuple, outputs: tuple[torch.Tensor, ...]
    ) -> Plan | None:
        """Returns the plan of the call, or None if it cannot be repeated.

        Two bases that share a storage cannot be told apart.
        """
        bases = [*(t for t in inputs if t is not None), *outputs]
        numbers = {_storage(t): number for number, t in enumerate(bases, 1)}
        compiled = all(isinstance(run.compiled, _run.CompiledKernel) for run in launched)
        if not (self.repeatable and compiled and len(numbers) == len(bases)):
            return None
        tensors = {}
        for run in launched:
            for argument in run.arguments.values():
                tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
                if isinstance(tensor, torch.Tensor):
                    tensors[id(tensor)] = tensor
        workspace, zero_bytes, size = self._workspace(tensors.values(), numbers)
        places: dict[int, Place] = {}
        for number, tensor in tensors.items():
            base = numbers.get(_storage(tensor), 0)
            start = bases[base - 1].data_ptr() if base else _storage(tensor)
            offset = tensor.data_ptr() - start + workspace.get(_storage(tensor), 0)
            places[number] = Place(base, offset, tensor.dtype)
        order = list(dict.fromkeys(places.values()))
        pointers = {number: order.index(place) for number, place in places.items()}
        launches = [Repetition(run, pointers) for run in launched]
        shapes = [(tuple(t.shape), t.dtype) for t in outputs]
        return Plan(shapes, size, zero_bytes, order, launches)

    def _workspace(
        self, tensors: Iterable[torch.Tensor], numbers: dict[int, int]
    ) -> tuple[dict[int, int], int, int]:
        """Returns the offset of each storage but those of bases, the bytes of zeros, and all bytes.

        The storages with zeros lie first.
        """
        zeros = {_storage(t) for t in self.zeros}
        sizes = {_storage(t): t.untyped_storage().nbytes() for t in tensors}
        offsets, end, zero_bytes = {}, 0, 0
        for storage in sorted(sizes.keys() - numbers.keys(), key=lambda s: s not in zeros):
            offsets[storage] = end
            end += -(-sizes[storage] // ALIGNMENT) * ALIGNMENT
            if storage in zeros:
                zero_bytes = end
        return offsets, zero_bytes, end


class Repetition:
    """A recorded launch, to be repeated with other pointers."""

    def __init__(self, run: _run.Launched, pointers: dict[int, int]) -> None:
        self.launch = run.compiled[(run.programs, 1, 1)]
        self.values = [run.arguments[name] for name in run.arg_names]
        self.tensors: list[tuple[int, int]] = []  # position among the values, number of the pointer
        self.descriptors: list[tuple[int, int, tuple]] = []
        for position, value in enumerate(self.values):
            if isinstance(value, torch.Tensor):
                self.tensors.append((position, pointers[id(value)]))
                self.values[position] = None
            elif isinstance(value, TensorDescriptor):
                layout = tuple(value.shape), tuple(value.strides), list(value.block_shape)
                self.descriptors.append((position, pointers[id(value.base)], layout))
                self.values[position] = None

    def __call__(self, pointers: list[Pointer]) -> None:
        values = self.values.copy()
        for position, number in self.tensors:
            values[position] = pointers[number]
        for position, number, layout in self.descriptors:
            values[position] = TensorDescriptor(pointers[number], *layout)
        self.launch(*values)


class Plan:
    """The launches of a recorded call, for inputs of the same layout."""

    def __init__(
        self,
        outputs: list[tuple[tuple[int, ...], torch.dtype]],
        size: int,
        zero_bytes: int,
        places: list[Place],
        launches: list[Repetition],
    ) -> None:
        self.outputs = outputs
        self.size = size
        self.zero_bytes = zero_bytes
        self.places = places
        self.launches = launches

    def __call__(self, inputs: tuple) -> tuple[torch.Tensor, ...]:
        device = inputs[0].device
        outputs = tuple(torch.empty(s, dtype=d, device=device) for s, d in self.outputs)
        workspace = torch.empty(self.size, dtype=torch.uint8, device=device)
        if self.zero_bytes:
            workspace[: self.zero_bytes].zero_()
        bases = workspace, *(t for t in inputs if t is not None), *outputs
        starts = [base.data_ptr() for base in bases]
        pointers = [Pointer(starts[base] + offset, dtype) for base, offset, dtype in self.places]
        with _run.on_device(device):
            for launch in self.launches:
                launch(pointers)
        return outputs


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0
