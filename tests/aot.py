"""Compiles every kernel launch of the library ahead of time, for GPUs that this machine lacks.

`python tests/aot.py OUT.json TARGET...` writes one row for each launch and target. It needs a
process of its own, as Triton's interpreter, in which the other tests run, replaces `triton.jit` for
good.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import torch
import triton
from aot_elementwise import elementwise
from aot_neighbors import neighbors
from meta_tensors import DTYPES, meta
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from scclip_fast.kernels._launch import Architecture, Launch
from scclip_fast.kernels.aggregate_details.panel import product_launch, weights_launch
from scclip_fast.kernels.aggregate_details.products import Operand
from scclip_fast.kernels.aggregate_details.stream import stream_launch
from scclip_fast.kernels.attention import attention_launch

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Architecture(80, 163 * 1024)),
    "sm_86": (GPUTarget("cuda", 86, 32), Architecture(86, 99 * 1024)),
    "sm_89": (GPUTarget("cuda", 89, 32), Architecture(89, 99 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), Architecture(90, 227 * 1024)),
    "sm_100": (GPUTarget("cuda", 100, 32), Architecture(100, 227 * 1024)),
    "sm_120": (GPUTarget("cuda", 120, 32), Architecture(120, 99 * 1024)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Architecture(0, 64 * 1024)),
}
# sm_90 compiles all launches. The targets of OWN_TILES compile the kernels whose tiles a launcher
# chooses by the target. The others compile the launches of each kernel that take the most shared
# memory and registers: sm_89 and sm_120 have the tiles and limits of sm_86, sm_100 has the tiles of
# sm_80, and gfx942 has most of these in fewer stages.
OWN_TILES = ("sm_80", "sm_86")
TILED = ("attention", "bins", "panel", "product", "stream", "weights")
LARGEST = (
    *("search-two-fp32-k128", "settle-two-fp32", "bins-two-82944x256", "collect-two-82944x256"),
    *("search-fp32-k30", "merge-fp32-k128", "settle-all-fp32", "centre-fp32", "round-fp32"),
    *("bins-9216x1024", "bins-82944x256", "certify-82944x256", "collect-9216x1024", "lof"),
    *("panel-256x768", "panel-5248x1024", "panel-two-5248x1024", "select-5248x1024"),
    *(
        "outliers-82944",
        "repair-wide-fp32",
        "upsample-photo-fp32",
        "attention-fp16-d128",
        "attention-fp32-d64",
    ),
    *("norms-wide-fp32", "norms-split-wide-fp32", "norms-split-map-fp32", "largest-wide-fp32"),
    *("largest-map-fp32", "split-wide-fp32", "split-map-fp32", "sums-wide-fp32", "mean-wide"),
    *("weights-fp16-d1024-r5248", "weights-fp32-d1024-r5248"),
    *("product-fp16-v1024", "product-fp32-v1024"),
    *("stream-fp16-v256", "stream-fp16-v1024", "stream-fp32-v256"),
)
SIGNATURE = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def launches(gpu: Architecture) -> Iterator[tuple[str, Launch]]:
    """Yields each kernel with every dtype and tile that its launcher can choose."""
    yield from neighbors(gpu)
    yield from elementwise()
    for name, dtype in DTYPES.items():
        for d in (16, 64, 128)[: 2 if name == "fp32" else 3]:
            q = meta(1, 16, 5184, d, dtype=dtype)
            yield (
                f"attention-{name}-d{d}",
                attention_launch(q, q, q, q, 0.5, 0.125, q, gpu),
            )
        yield from aggregations(name, dtype, gpu)


def operand(dtype: torch.dtype, *shape: int) -> Operand:
    """An operand as `aggregate_triton` passes it: float32 in two halves."""
    if dtype == torch.float32:
        return Operand(*(meta(*shape, dtype=torch.float16) for _ in range(2)))
    return Operand(meta(*shape, dtype=dtype), None)


def aggregations(name: str, dtype: torch.dtype, gpu: Architecture) -> Iterator[tuple[str, Launch]]:
    out, sums = meta(1, 5184, 1024, dtype=dtype), (meta(1, 5184), meta(1))
    for width in (17, 256, 1024):
        unit = meta(1, 1, width) if dtype == torch.float32 else None
        f = operand(dtype, 1, 5184, width)
        for rows in (2560, 5248):
            panel = operand(dtype, 1, rows, 5248)
            for gamma in (None, 3.0) if width == 1024 else (3.0,):
                kind = f"{name}-d{width}-r{rows}" + ("" if gamma else "-threshold")
                launch = weights_launch(f, *sums, gamma, panel, meta(1, 41, rows), 0, gpu)
                yield f"weights-{kind}", launch
        product = product_launch(
            panel, f, sums[0], meta(1, 41, 5248), sums[0], unit, 1e-6, out, 0, gpu
        )
        yield f"product-{name}-v{width}", product
        launch = stream_launch(f, f, *sums, unit, 3.0, 1e-6, out, meta(1, 5184), gpu)
        yield f"stream-{name}-v{width}", launch
    if dtype != torch.float32:
        f = operand(dtype, 1, 5184, 4096)
        launch = weights_launch(f, *sums, 3.0, panel, meta(1, 41, rows), 0, gpu)
        yield f"weights-{name}-d4096", launch
        launch = stream_launch(panel, f, *sums, None, 3.0, 1e-6, out, meta(1, 5184), gpu)
        yield f"stream-{name}-d4096", launch


def source(launch: Launch) -> ASTSource:
    """The launch as Triton would specialise it: ones folded in, multiples of 16 declared."""
    signature, constants, attributes = {}, launch.constants, {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = True
        if value is None:
            signature[name], constants[name], divisible = "constexpr", None, False
        elif isinstance(value, torch.Tensor):
            signature[name] = SIGNATURE[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name], divisible = (
                f"tensordesc<{SIGNATURE[value.base.dtype][1:]}[{block}]>",
                False,
            )
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif launch.kernel.params[position].do_not_specialize:
            signature[name], divisible = "i32" if value < 2**31 else "i64", False
        elif value == 1:
            signature[name], constants[name], divisible = "constexpr", 1, False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(compiled, target: GPUTarget) -> dict[str, int]:
    """Registers, bytes spilled and bytes of local memory of a thread."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        count = {
            key: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))
            for key in ("vgpr_count", "vgpr_spill_count")
        }
        local = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text).group(1))
        return dict(registers=count["vgpr_count"], spills=count["vgpr_spill_count"], local=local)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return dict(registers=usage["REG"], spills=usage["STACK"], local=usage["LOCAL"])


MATRIX_INSTRUCTION = {"cuda": r"wgmma|mma\.sync|tcgen05\.mma", "hip": r"v_mfma|v_smfma"}


def sums_carried_by_tensor_cores(ttgir: str) -> bool:
    """Returns whether a matrix instruction's accumulator goes from one turn of a loop to the next.

    It may do so unchanged, in another layout, or times the factor of attention's running maximum.
    """
    carried = set(re.findall(r"(%[\w#]+) = arith\.mulf ", ttgir))
    for names in re.findall(r"iter_args\(([^)]*)\)", ttgir):
        carried.update(re.findall(r"(%[\w#]+) = ", names))
    layouts = re.findall(r"(%[\w#]+) = ttg\.convert_layout (%[\w#]+) ", ttgir)
    carried.update(new for new, old in layouts if old in carried)
    product = r"(?:tt\.dot|ttng\.warp_group_dot) %[\w#]+, %[\w#]+, (%[\w#]+)"
    return bool(carried.intersection(re.findall(product, ttgir)))


def compile_row(job: tuple[int, str]) -> dict:
    index, target_name = job
    target, gpu = TARGETS[target_name]
    name, launch = list(launches(gpu))[index]
    options = launch.compile_options(gpu)
    compiled = triton.compile(source(launch), target=target, options=options)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    instructions = sorted(set(re.findall(MATRIX_INSTRUCTION[target.backend], text)))
    row = dict(
        launch=name,
        target=target_name,
        shared=compiled.metadata.shared,
        allowed=gpu.shared,
        matrix=instructions,
        carried=sums_carried_by_tensor_cores(compiled.asm["ttgir"]),
    )
    return row | resources(compiled, target)


def jobs(target: str) -> list[tuple[int, str]]:
    names = [name for name, _ in launches(TARGETS[target][1])]
    assert set(LARGEST) <= set(names)
    return [(i, target) for i, name in enumerate(names) if _is_compiled(name, target)]


def _is_compiled(name: str, target: str) -> bool:
    """Returns whether a target compiles a launch.

    The tiles of bfloat16 are those of float16, as are its bytes of shared memory, so that sm_90
    alone compiles it.
    """
    if target == "sm_90" or name in LARGEST:
        return True
    return target in OWN_TILES and name.startswith(TILED) and "bf16" not in name


def main(path: str, *targets: str) -> None:
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(compile_row, chain.from_iterable(map(jobs, targets)), chunksize=4))
    Path(path).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
