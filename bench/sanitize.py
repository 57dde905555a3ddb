"""Runs every kernel at small odd shapes: compute-sanitizer --tool memcheck python bench/sanitize.py

The tools racecheck, synccheck and initcheck run it too. Each op runs three times and must give the
same bits.
"""

from __future__ import annotations

from functools import partial

import torch

import scclip_fast as sf
from scclip_fast.kernels import _plan, aggregate, knn


def check(call) -> None:
    runs = [call() for _ in range(3)]  # the third repeats the plan of the second
    first, *others = (run if isinstance(run, tuple) else (run,) for run in runs)
    assert all(all(map(torch.equal, first, other)) for other in others), "two runs differ"


def main() -> None:
    torch.manual_seed(0)
    for n, d, k in ((3, 1, 2), (33, 5, 9), (131, 17, 30), (201, 64, 128), (1100, 72, 30)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(2, n, d, device="cuda").to(dtype)
            x[:, : n // 4] = (
                3 + 1e-5 * x[:, : n // 4]
            )  # fp16 does not resolve them: all searches run
            k = min(k, n - 1)
            check(lambda x=x, k=k: sf.knn(x, k, backend="triton"))
            check(lambda x=x, k=k: sf.lof_scores(x, k, backend="triton"))
            scores = x[..., 0].clone()
            scores[0, ::5] = torch.nan
            check(lambda s=scores: sf.outlier_mask(s, backend="triton"))
            image = x[:, : n // 3 * 3]
            outliers = torch.rand(image.shape[:2], device="cuda") < 0.3
            for tokens in (image, image.mT.contiguous().mT):
                check(partial(sf.repair, tokens, outliers, (3, n // 3), backend="triton"))
            maps = x[..., None]  # N classes of D x 1 pixels
            check(partial(sf.upsampled_labels, maps, (d + 2, 3), backend="triton"))
            half = x[..., : d // 2 + 1]
            check(lambda v=half, x=x: sf.aggregate(v, x, backend="triton"))
            check(lambda v=half, x=x: sf.content_attention(v, x, backend="triton"))
            q = x.unflatten(2, (1, d)).transpose(1, 2)
            check(lambda q=q, x=x: sf.blended_attention(q, q, q, x, backend="triton"))
    # Runs `stream`, several passes, and the chains over a panel and over bins.
    aggregate.WORKSPACE_BYTES, knn.PANEL_BYTES, knn.BINS_BYTES = 2**12, 1, 1
    for dtype, most_columns in ((torch.float32, 5760), (torch.float32, 0), (torch.float16, 0)):
        knn.MOST_COLUMNS_OF_PANEL = most_columns
        _plan._calls.cache_clear()
        x = torch.randn(2, 1100, 72, device="cuda").to(dtype)
        x[:, :300] = 3 + 1e-5 * x[:, :300]
        check(lambda x=x: sf.aggregate(x, x, backend="triton"))
        check(lambda x=x: sf.knn(x, 9, backend="triton"))
        check(lambda x=x: sf.knn(x, 9, queries=x[:, :200].clone(), backend="triton"))
    torch.cuda.synchronize()
    print("every kernel ran three times with the same bits")


if __name__ == "__main__":
    main()
