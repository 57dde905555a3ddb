"""Values in two halves, each channel over a power of two.

    2^(e_c - 1) <= max_i |v_ic| < 2^e_c
    v_ic 2^(VALUE_SCALE - e_c) = first + second          fp16, to 22 bits
    unit_c = 2^(e_c - VALUE_SCALE)

values (B, N, DV) any strides, inverse norms r (B, N) -> first and second (B, N, DV), unit
(B, 1, DV) float32. A token without a direction, by r, counts as zeros. e_c is -100 at least, 0 for
a channel of zeros, and 1 for a channel with a number that is not finite.

`largest` finds max_i |v_ic| as bits, which order like the numbers from 0 on, and `split` the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, cdiv, strides
from .products import Operand, has_direction

VALUE_SCALE = 8  # log2 of the bound to which the largest value of a channel is scaled
ROWS = 256  # of a program of `largest`; not measured yet


@triton.jit
def _load_values(v_ptr, norms_ptr, rows, channels, N, DV, stride_vn, stride_vd):
    """Returns values of an image [rows, channels] in float32, 0 for tokens without a direction."""
    used = has_direction(tl.load(norms_ptr + rows, mask=rows < N, other=0.0))
    offsets = rows.to(tl.int64)[:, None] * stride_vn + channels.to(tl.int64)[None, :] * stride_vd
    inside = used[:, None] & (channels < DV)[None, :]
    return tl.load(v_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _largest_kernel(
    # tensors
    v_ptr,
    norms_ptr,
    bits_ptr,
    # sizes
    N,
    DV,
    # strides
    stride_vb,
    stride_vn,
    stride_vd,
    # tile
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0)
    slices, blocks = tl.cdiv(DV, BLOCK_V), tl.cdiv(N, ROWS)
    image = (pid // (slices * blocks)).to(tl.int64)
    first = pid // slices % blocks * ROWS
    channels = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    largest = tl.zeros([BLOCK_V], tl.int32)
    for start in range(first, tl.minimum(first + ROWS, N), BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        v = _load_values(
            v_ptr + image * stride_vb,
            norms_ptr + image * N,
            rows,
            channels,
            N,
            DV,
            stride_vn,
            stride_vd,
        )
        bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, axis=0))
    tl.atomic_max(bits_ptr + image * DV + channels, largest, mask=channels < DV)


@triton.jit
def _split_kernel(
    # tensors
    v_ptr,
    norms_ptr,
    bits_ptr,
    first_ptr,
    second_ptr,
    unit_ptr,
    # sizes
    N,
    DV,
    # strides
    stride_vb,
    stride_vn,
    stride_vd,
    # tile
    VALUE_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0)
    slices, blocks = tl.cdiv(DV, BLOCK_V), tl.cdiv(N, BLOCK_R)
    image = (pid // (slices * blocks)).to(tl.int64)
    block = pid // slices % blocks
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    bits = tl.load(bits_ptr + image * DV + channels, mask=channels < DV, other=0)
    biased = bits >> 23
    exponent = tl.where(bits == 0, 0, tl.maximum(biased - 126, -100))
    exponent = tl.where(biased == 255, 1, exponent) - VALUE_SCALE
    if block == 0:
        unit = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(unit_ptr + image * DV + channels, unit, mask=channels < DV)
    v = _load_values(
        v_ptr + image * stride_vb,
        norms_ptr + image * N,
        rows,
        channels,
        N,
        DV,
        stride_vn,
        stride_vd,
    )
    scaled = v * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]  # exact
    first = scaled.to(tl.float16)
    offsets = (image * N + rows)[:, None] * DV + channels[None, :]
    inside = (rows < N)[:, None] & (channels < DV)[None, :]
    tl.store(first_ptr + offsets, first, mask=inside)
    tl.store(second_ptr + offsets, (scaled - first.to(tl.float32)).to(tl.float16), mask=inside)


def _tile(values: torch.Tensor) -> dict[str, int]:
    """A tile of 4096 numbers, longer in the dimension that memory has side by side."""
    in_rows = values.stride(2) <= values.stride(1)
    return dict(BLOCK_R=32, BLOCK_V=128) if in_rows else dict(BLOCK_R=128, BLOCK_V=32)


def largest_launch(values: torch.Tensor, norms: torch.Tensor, bits: torch.Tensor) -> Launch:
    """The bits (B, DV) int32 of the largest value of each channel; they must be zeros before."""
    batch, n, dv = values.shape
    assert norms.is_contiguous() and bits.is_contiguous()
    tile = _tile(values)
    return Launch(
        _largest_kernel,
        batch * cdiv(n, ROWS) * cdiv(dv, tile["BLOCK_V"]),
        v_ptr=values,
        norms_ptr=norms,
        bits_ptr=bits,
        N=n,
        DV=dv,
        **strides("v", values, "bnd"),
        ROWS=ROWS,
        **tile,
        num_warps=4,
    )


def split_launch(
    values: torch.Tensor,
    norms: torch.Tensor,
    bits: torch.Tensor,
    halves: Operand,
    unit: torch.Tensor,
) -> Launch:
    """Both halves (B, N, DV) and the unit (B, 1, DV) from the bits of the largest values."""
    batch, n, dv = values.shape
    assert all(t.is_contiguous() for t in (norms, bits, *halves, unit))
    tile = _tile(values)
    return Launch(
        _split_kernel,
        batch * cdiv(n, tile["BLOCK_R"]) * cdiv(dv, tile["BLOCK_V"]),
        v_ptr=values,
        norms_ptr=norms,
        bits_ptr=bits,
        first_ptr=halves.first,
        second_ptr=halves.second,
        unit_ptr=unit,
        N=n,
        DV=dv,
        **strides("v", values, "bnd"),
        VALUE_SCALE=VALUE_SCALE,
        **tile,
        num_warps=4,
    )


def split_values(values: torch.Tensor, norms: torch.Tensor) -> tuple[Operand, torch.Tensor]:
    """Both halves (B, N, DV) and the unit (B, 1, DV) of the module's equations."""
    batch, _, dv = values.shape
    bits = torch.zeros(batch, dv, dtype=torch.int32, device=values.device)
    halves = Operand(*values.new_empty(2, *values.shape, dtype=torch.float16))
    unit = torch.empty(batch, 1, dv, dtype=torch.float32, device=values.device)
    largest_launch(values, norms, bits).run()
    split_launch(values, norms, bits, halves, unit).run()
    return halves, unit
