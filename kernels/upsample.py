"""The best class of each pixel, from maps of all classes at a smaller size, in one pass.

    score_c(y, x) = (1 - b) [(1 - a) m_c(y0, x0) + a m_c(y0, x1)]
                      + b   [(1 - a) m_c(y1, x0) + a m_c(y1, x1)]
    value, label  = max_c, argmax_c score_c                         `reference.upsampled_labels`

maps m (B, C, h, w) -> labels (B, H, W), an integer dtype, and values (B, H, W), float32. The pixels
y0 and y1 lie around p = max(h / H (y + 1/2) - 1/2, 0), and b = p - y0; x0, x1 and a likewise. A
program has one tile of pixels and loops over the classes. The four loads of a class mostly hit the
L1 cache, because neighbouring pixels of a larger image share their sources.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, cdiv, power_of_two, strides

# Pixels of a program, 4 a thread, so that the offsets of 64 bits of four sources take 32 registers.
# The tile is not measured yet.
TILE = 512
LONGEST_ROW = 128


@triton.jit
def _sources(pixel, scale, SOURCE, STEP):
    """Returns the two sources around each pixel, as int64, and the weight of the second one."""
    # The compiler fuses the product and the difference, as it does in torch's own kernels.
    position = tl.maximum((pixel.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), SOURCE - 1)
    high = tl.minimum(low + STEP, SOURCE - 1)
    return low.to(tl.int64), high.to(tl.int64), tl.minimum(position - low.to(tl.float32), 1.0)


@triton.jit
def _upsampled_labels_kernel(
    # tensors
    maps_ptr,
    labels_ptr,
    values_ptr,
    # sizes
    C,
    SOURCE_H,
    SOURCE_W,
    HEIGHT,
    WIDTH,
    # sources a pixel, and the distance from the first source to the second: 0 at the same size
    scale_y,
    scale_x,
    STEP_Y,
    STEP_X,
    # strides
    stride_mb,
    stride_mc,
    stride_my,
    stride_mx,
    # tile
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    pid = tl.program_id(0)
    columns = tl.cdiv(WIDTH, BLOCK_W)
    tiles = columns * tl.cdiv(HEIGHT, BLOCK_H)
    image = (pid // tiles).to(tl.int64)
    y = (pid % tiles // columns) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = (pid % columns) * BLOCK_W + tl.arange(0, BLOCK_W)
    above, below, b = _sources(y, scale_y, SOURCE_H, STEP_Y)
    left, right, a = _sources(x, scale_x, SOURCE_W, STEP_X)
    above, below = above[:, None] * stride_my, below[:, None] * stride_my
    left, right = left[None, :] * stride_mx, right[None, :] * stride_mx
    a, b = a[None, :], b[:, None]

    best = tl.full([BLOCK_H, BLOCK_W], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    # No load needs a mask: the sources of pixels beyond the image are clamped to the maps.
    map_ptr = maps_ptr + image * stride_mb
    for c in range(C):
        top = (1 - a) * tl.load(map_ptr + (above + left)).to(tl.float32)
        top += a * tl.load(map_ptr + (above + right)).to(tl.float32)
        bottom = (1 - a) * tl.load(map_ptr + (below + left)).to(tl.float32)
        bottom += a * tl.load(map_ptr + (below + right)).to(tl.float32)
        score = (1 - b) * top + b * bottom
        better = score > best  # false for NaN, and for a tie with a class before
        best = tl.where(better, score, best)
        label = tl.where(better, c, label)
        map_ptr += stride_mc
    inside = (y < HEIGHT)[:, None] & (x < WIDTH)[None, :]
    out = (image * HEIGHT + y)[:, None] * WIDTH + x[None, :]
    tl.store(labels_ptr + out, label.to(labels_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr + out, best, mask=inside)


def upsampled_labels_launch(
    maps: torch.Tensor, labels: torch.Tensor, values: torch.Tensor
) -> Launch:
    """labels and values (B, H, W), contiguous, from maps (B, C, h, w) of any strides."""
    _, classes, source_h, source_w = maps.shape
    batch, height, width = labels.shape
    assert labels.is_contiguous() and values.is_contiguous() and labels.shape == values.shape
    block_w = power_of_two(width, 16, LONGEST_ROW)
    block_h = TILE // block_w
    return Launch(
        _upsampled_labels_kernel,
        batch * cdiv(height, block_h) * cdiv(width, block_w),
        maps_ptr=maps,
        labels_ptr=labels,
        values_ptr=values,
        C=classes,
        SOURCE_H=source_h,
        SOURCE_W=source_w,
        HEIGHT=height,
        WIDTH=width,
        scale_y=source_h / height,
        scale_x=source_w / width,
        STEP_Y=int(source_h != height),
        STEP_X=int(source_w != width),
        **strides("m", maps, "bcyx"),
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        num_warps=4,
    )


def upsampled_labels_triton(
    maps: torch.Tensor, size: tuple[int, int], label_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """labels (B, H, W) in a dtype and values (B, H, W) of the module's equation; size = (H, W)."""
    shape = (maps.shape[0], *size)
    labels = torch.empty(shape, dtype=label_dtype, device=maps.device)
    values = torch.empty(shape, dtype=torch.float32, device=maps.device)
    upsampled_labels_launch(maps, labels, values).run()
    return labels, values
