"""The mean cosine similarity of all pairs of tokens of an image, without the pairs.

    mu = mean_ij f_i f_j / (||f_i|| ||f_j||)         `reference.mean_similarity`
       = || mean_i f_i / ||f_i|| ||^2

features (B, N, D) any strides -> mu (B,) float32, the mean over pairs of tokens with a direction.
`sums` adds the unit features of a part of the tokens, and `mean` adds the parts of an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, architecture, cdiv, power_of_two, strides
from ._plan import planned
from .aggregate_details.norms import inverse_norms
from .aggregate_details.products import has_direction

BLOCK_D = 256  # channels of a tile
BLOCK_R = 16  # tokens of a tile of `sums`, parts of a tile of `mean`


@triton.jit
def _sums_kernel(
    # tensors
    f_ptr,
    norms_ptr,
    sums_ptr,
    counts_ptr,
    # sizes
    N,
    D,
    parts,
    tokens_per_part,
    # strides
    stride_fb,
    stride_fn,
    stride_fd,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(D, BLOCK_D)
    image = (pid // (slices * parts)).to(tl.int64)
    part = pid // slices % parts
    dims = (pid % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = part * tokens_per_part
    sum_ = tl.zeros([BLOCK_D], tl.float32)
    count = 0
    for start in range(first, tl.minimum(first + tokens_per_part, N), BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inverse = tl.load(norms_ptr + image * N + rows, mask=rows < N, other=0.0)
        used = has_direction(inverse)
        offsets = rows.to(tl.int64)[:, None] * stride_fn + dims.to(tl.int64)[None, :] * stride_fd
        inside = used[:, None] & (dims < D)[None, :]
        f = tl.load(f_ptr + image * stride_fb + offsets, mask=inside, other=0.0).to(tl.float32)
        sum_ += tl.sum(f * tl.where(used, inverse, 0.0)[:, None], axis=0)
        count += tl.sum(used.to(tl.int32), axis=0)
    place = image * parts + part
    tl.store(sums_ptr + place * D + dims, sum_, mask=dims < D)
    if pid % slices == 0:
        tl.store(counts_ptr + place, count)


@triton.jit
def _mean_kernel(
    # tensors
    sums_ptr,
    counts_ptr,
    mu_ptr,
    # sizes
    D,
    parts,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, parts, BLOCK_R):
        part = start + tl.arange(0, BLOCK_R)
        count += tl.sum(tl.load(counts_ptr + image * parts + part, mask=part < parts, other=0))
    mu = 0.0
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        sum_ = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, parts, BLOCK_R):
            part = start + tl.arange(0, BLOCK_R)
            offsets = (image * parts + part)[:, None] * D + dims[None, :]
            inside = (part < parts)[:, None] & (dims < D)[None, :]
            sum_ += tl.sum(tl.load(sums_ptr + offsets, mask=inside, other=0.0), axis=0)
        mean = sum_ / tl.maximum(count, 1).to(tl.float32)
        mu += tl.sum(mean * mean, axis=0)
    tl.store(mu_ptr + image, mu)


def sums_launch(
    features: torch.Tensor, norms: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> Launch:
    """Sums (B, parts, D) of unit features, counts (B, parts) int32 of tokens with a direction."""
    batch, n, d = features.shape
    parts = sums.shape[1]
    assert all(t.is_contiguous() for t in (norms, sums, counts))
    block_d = power_of_two(d, 16, BLOCK_D)
    return Launch(
        _sums_kernel,
        batch * parts * cdiv(d, block_d),
        f_ptr=features,
        norms_ptr=norms,
        sums_ptr=sums,
        counts_ptr=counts,
        N=n,
        D=d,
        parts=parts,
        tokens_per_part=cdiv(cdiv(n, parts), BLOCK_R) * BLOCK_R,
        **strides("f", features, "bnd"),
        BLOCK_R=BLOCK_R,
        BLOCK_D=block_d,
        num_warps=4,
    )


def mean_launch(sums: torch.Tensor, counts: torch.Tensor, mu: torch.Tensor) -> Launch:
    """mu (B,) from the sums and counts of the parts."""
    batch, parts, d = sums.shape
    assert all(t.is_contiguous() for t in (sums, counts, mu))
    return Launch(
        _mean_kernel,
        batch,
        sums_ptr=sums,
        counts_ptr=counts,
        mu_ptr=mu,
        D=d,
        parts=parts,
        BLOCK_R=BLOCK_R,
        BLOCK_D=power_of_two(d, 16, BLOCK_D),
        num_warps=4,
    )


def mean_similarity_triton(features: torch.Tensor) -> torch.Tensor:
    """mu (B,) of the module's equation."""
    return planned(_mean_similarity, (features,), ())[0]


def _mean_similarity(features: torch.Tensor) -> tuple[torch.Tensor]:
    batch, n, d = features.shape
    # As many parts as fill the GPU once, because one program reads all parts of an image.
    programs = architecture(features.device).multiprocessors // (batch * cdiv(d, BLOCK_D))
    parts = max(1, min(cdiv(n, 2 * BLOCK_R), programs))
    sums = torch.empty(batch, parts, d, dtype=torch.float32, device=features.device)
    counts = torch.empty(batch, parts, dtype=torch.int32, device=features.device)
    mu = torch.empty(batch, dtype=torch.float32, device=features.device)
    sums_launch(features, inverse_norms(features), sums, counts).run()
    mean_launch(sums, counts, mu).run()
    return (mu,)
