"""The launches without matrix products beside those of the neighbour search, for `aot.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from meta_tensors import DTYPES, integers, meta

from scclip_fast.kernels._launch import Launch
from scclip_fast.kernels.aggregate_details.norms import norms_launch
from scclip_fast.kernels.aggregate_details.products import Operand
from scclip_fast.kernels.aggregate_details.values import largest_launch, split_launch
from scclip_fast.kernels.mean_similarity import mean_launch, sums_launch
from scclip_fast.kernels.outlier_mask import outlier_mask_launch
from scclip_fast.kernels.repair import repair_launch
from scclip_fast.kernels.upsample import upsampled_labels_launch

Launches = Iterator[tuple[str, Launch]]


def elementwise() -> Launches:
    for name, dtype in DTYPES.items():
        yield from repairs(name, dtype)
        yield from upsamplings(name, dtype)
        yield from operands(name, dtype)
    for n in (1, 5184, 82944):
        mask = meta(1, n, dtype=torch.bool)
        yield f"outliers-{n}", outlier_mask_launch(meta(1, n), mask, 0.95)


def repairs(name: str, dtype: torch.dtype) -> Launches:
    """Yields wide tokens, narrow tokens, a map with its channels first, and sizes of 1."""
    kinds = {
        "wide": ((72, 72), meta(1, 5184, 1024, dtype=dtype)),
        "narrow": ((14, 14), meta(64, 196, 17, dtype=dtype)),
        "map": ((288, 288), meta(1, 256, 82944, dtype=dtype).mT),
        "one": ((1, 1), meta(1, 1, 1, dtype=dtype)),
    }
    for kind, (grid, x) in kinds.items():
        out, mask = meta(*x.shape, dtype=dtype), meta(*x.shape[:2], dtype=torch.bool)
        yield f"repair-{kind}-{name}", repair_launch(x, mask, out, grid)


def upsamplings(name: str, dtype: torch.dtype) -> Launches:
    """Yields a photo, classes in the last dimension with labels of 16 bits, and sizes of 1."""
    kinds = {
        "photo": (meta(1, 151, 288, 288, dtype=dtype), (4000, 6000), torch.uint8),
        "last": (meta(2, 72, 72, 1203, dtype=dtype).permute(0, 3, 1, 2), (720, 100), torch.int16),
        "one": (meta(1, 1, 1, 1, dtype=dtype), (1, 1), torch.uint8),
    }
    for kind, (maps, size, labels) in kinds.items():
        out = meta(len(maps), *size, dtype=labels), meta(len(maps), *size)
        yield f"upsample-{kind}-{name}", upsampled_labels_launch(maps, *out)


def operands(name: str, dtype: torch.dtype) -> Launches:
    """Yields the norms, splits and mean similarity of tokens, for float32 a map and one number."""
    kinds = {"wide": meta(1, 5184, 1024, dtype=dtype)}
    if name == "fp32":
        kinds |= {"map": meta(1, 256, 82944).mT, "one": meta(1, 1, 1)}
    for kind, x in kinds.items():
        norms, bits = meta(*x.shape[:2]), integers(1, x.shape[2])
        halves = Operand(*(meta(*x.shape, dtype=torch.float16) for _ in range(2)))
        yield f"norms-{kind}-{name}", norms_launch(x, norms, None)
        yield f"norms-split-{kind}-{name}", norms_launch(x, norms, halves)
        yield f"largest-{kind}-{name}", largest_launch(x, norms, bits)
        unit = meta(1, 1, x.shape[2])
        yield f"split-{kind}-{name}", split_launch(x, norms, bits, halves, unit)
        sums, counts = meta(1, 33, x.shape[2]), integers(1, 33)
        yield f"sums-{kind}-{name}", sums_launch(x, norms, sums, counts)
        if name == "fp32":
            yield f"mean-{kind}", mean_launch(sums, counts, meta(1))
