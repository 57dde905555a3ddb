"""The kernels beside their floors and their peers on a GPU: python bench/targets.py PART --out JSON

Each part runs in its own process, whose end frees the memory of its CUDA graphs.

A time is the median of CUDA events around replays of a CUDA graph, where the call can be captured,
with 128 MiB written before each to empty the cache. Peak memory is that of torch's allocator,
results included. For nearest neighbours of one image the results also have the share of rows whose
set is float64's and, for the kernels, the shares of rows that the certificate leaves undecided.
`bench/report.py` makes the tables of README.md, `bench/roofline.py` the picture.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_aggregate
import bench_attention
import bench_knn
import bench_lof
import bench_repair
import bench_sam3
import bench_upsample
import harness
import nearest
import torch
import torch.nn.functional as F
import vocabulary as vocabularies
from gpu_times import FLUSH_BYTES, entry, milliseconds, on_the_host
from torch import Tensor

import scclip_fast as sf
from scclip_fast.kernels import knn

LOF_SHAPES = ((1, 5184, 1024), (1, 82944, 256), (64, 196, 768))
SHAPES = LOF_SHAPES[:2]


def neighbors(results: list[dict]) -> None:
    searches = {
        "scclip_fast": partial(sf.knn, k=bench_knn.K, backend="triton"),
        "matmul + topk": bench_knn.matmul_topk,
        "cdist + topk": bench_knn.cdist_topk,
        "FlashLib": nearest.flashlib,
    }
    for shape in LOF_SHAPES:
        x = harness.tokens("cuda", shape, "float32")
        half = x.half()
        results.append(entry("lof", shape, "float32", "floor", lambda h=half: h @ h.mT))
        calls = {
            "scclip_fast": partial(sf.lof_scores, x, bench_knn.K, backend="triton"),
            "published": partial(bench_lof.published, x),
        }
        for name, call in calls.items():
            results.append(entry("lof", shape, "float32", name, call))
        for name, call in searches.items():
            check = None if shape[0] > 1 else checked(name, x, x, True, bench_knn.K)
            results.append(entry("knn", shape, "float32", name, partial(call, x), check))


def bank(results: list[dict]) -> None:
    """Queries in a bank, with the kernels and with more neighbours than their lists hold."""
    queries, x = nearest.two_sets("cuda")
    halves = queries.half(), x.half()
    for k in (bench_knn.K, 400):
        op = f"knn of queries, k = {k}"
        calls = {
            "floor": partial(nearest.products, *halves),
            "scclip_fast": partial(sf.knn, x, k, queries=queries),
            "matmul + topk": partial(nearest.matmul_topk, queries, x, k),
        }
        for name, call in calls.items():
            check = None if name == "floor" else checked(name, queries, x, False, k)
            results.append(entry(op, nearest.SHAPE, "float32", name, call, check))


def checked(name: str, *search) -> Callable[[tuple[Tensor, Tensor]], dict]:
    """The check of a result; for the kernels, it counts the undecided rows too."""
    same = partial(nearest.same_sets, *search)
    if name != "scclip_fast" or search[-1] > knn.MOST_NEIGHBORS_FOR_HALF:
        return same
    return lambda found: same(found) | nearest.undecided_rows(*search)


def flex_aggregate(values: Tensor, features: Tensor) -> Tensor:
    """Aggregates by FlexAttention with log S as score, as softmax(log w) = w / sum w."""
    unit = F.normalize(features, dim=-1).unsqueeze(1)
    return _flex(_log_threshold, unit, unit, values.unsqueeze(1), 1.0)[:, 0]


def _log_threshold(score, b, h, q, k):
    return torch.where(score >= bench_aggregate.BETA, score.clamp(min=1e-6).log(), -math.inf)


@torch.compile(dynamic=False)
def _flex(score_mod, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, score_mod=score_mod, scale=scale)


def two_products(values: Tensor, features: Tensor) -> Tensor:
    """Computes the matrix products alone, in half precision, for 8192 rows at a time."""
    v, f = values.half()[0], features.half()[0]
    unit = F.normalize(f, dim=-1)
    return torch.cat([(rows @ unit.T) @ v for rows in unit.split(8192)])


def aggregation(results: list[dict]) -> None:
    for shape in SHAPES:
        for dtype in ("float16", "float32"):
            values = harness.tokens("cuda", shape, dtype, seed=2)
            features = harness.tokens("cuda", shape, dtype)
            calls = {
                "floor": two_products,
                "scclip_fast": partial(sf.aggregate, backend="triton"),
                "eager": bench_aggregate.published,
                "FlexAttention": flex_aggregate,
            }
            expected = sf.aggregate(values, features, backend="torch").float()

            def error(out, expected=expected):
                if out.shape != expected.shape:
                    return {}
                return dict(error=((out.float() - expected).norm() / expected.norm()).item())

            for name, call in calls.items():
                call = partial(call, values, features)
                results.append(entry("aggregate", shape, dtype, name, call, error))


def attention(results: list[dict]) -> None:
    shape = SHAPES[0]
    for dtype in ("float16", "float32"):
        q, k, v = harness.heads("cuda", shape, dtype)
        features = harness.tokens("cuda", shape, dtype)
        merged = v.transpose(1, 2).flatten(2)

        def floor(q=q, k=k, v=v, f=features, merged=merged):
            self_half = F.scaled_dot_product_attention(q, k, v)
            return self_half, torch.matmul(torch.matmul(f, f.mT), merged)

        calls = {
            "floor": floor,
            "scclip_fast": partial(bench_attention.ours("triton"), q, k, v, features),
            "eager": partial(bench_attention.published, q, k, v, features),
            "SDPA + content": partial(bench_attention.sdpa, q, k, v, features),
        }
        for name, call in calls.items():
            results.append(entry("blended_attention", shape, dtype, name, call))


def repair(results: list[dict]) -> None:
    """Compares with a copy of the tokens, and with torch's pooling of their grid."""
    for shape in SHAPES:
        grid = (math.isqrt(shape[1]),) * 2
        mask = bench_repair.outliers("cuda", shape)
        for dtype in ("bfloat16", "float32"):
            x = harness.tokens("cuda", shape, dtype)
            results.append(entry("repair", shape, dtype, "floor", x.clone))
            for name, backend in {"scclip_fast": "triton", "pooling": "torch"}.items():
                call = partial(sf.repair, x, mask, grid, backend=backend)
                results.append(entry("repair", shape, dtype, name, call))


def upsampling(results: list[dict]) -> None:
    """Compares labels of a photo of 24 million pixels with the writing of the results alone."""
    shape, size = (151, 288, 288), (4000, 6000)
    for dtype in ("float32", "float16"):
        maps = bench_upsample.scores("cuda", shape, dtype)
        labels, values = sf.upsampled_labels(maps, size, backend="triton")

        def error(found, values=values):
            return dict(error=(found[1].float() - values).abs().max().item())

        def floor(labels=labels, values=values):
            return labels.fill_(1), values.fill_(1)

        calls = {
            "floor": floor,
            "scclip_fast": partial(sf.upsampled_labels, maps, size, backend="triton"),
            "bands": partial(sf.upsampled_labels, maps, size, backend="torch"),
            "interpolate + argmax": partial(bench_upsample.interpolate_argmax, maps, size),
        }
        for name, call in calls.items():
            check = None if name == "floor" else error
            results.append(entry("upsampled_labels", shape, dtype, name, call, check))


def host(results: list[dict]) -> None:
    """Measures how long Python takes to enqueue a call; it takes longer than the GPU at times."""
    shape = SHAPES[0]
    for dtype in ("float16", "float32"):
        x = harness.tokens("cuda", shape, dtype)
        q, k, v = harness.heads("cuda", shape, dtype)
        scores = sf.lof_scores(x)
        calls = {
            "knn": partial(sf.knn, x, bench_knn.K, backend="triton"),
            "lof_scores": partial(sf.lof_scores, x, bench_knn.K, backend="triton"),
            "outlier_mask": partial(sf.outlier_mask, scores, backend="triton"),
            "aggregate": partial(sf.aggregate, x, x, backend="triton"),
            "blended_attention": partial(bench_attention.ours("triton"), q, k, v, x),
        }
        for name, call in calls.items():
            op = f"host time of {name}"
            results.append(entry(op, shape, dtype, "scclip_fast", call, clock=on_the_host))


def outliers(results: list[dict]) -> None:
    """Compares the mask of outliers with a copy of the scores, and with a sort."""
    for shape in ((1, 5184), (1, 82944), (64, 196)):
        scores = torch.rand(shape, device="cuda")
        results.append(entry("outlier_mask", shape, "float32", "floor", scores.clone))
        for name, backend in {"scclip_fast": "triton", "sort": "torch"}.items():
            call = partial(sf.outlier_mask, scores, backend=backend)
            results.append(entry("outlier_mask", shape, "float32", name, call))


def calibration(results: list[dict]) -> None:
    """Compares SC-CLIP with the frozen tower: ViT-L/14, 1008 pixels, random weights."""
    from scclip_fast.clip import SCCLIP, create_model

    encoder, _ = create_model("ViT-L-14-quickgelu", precision="fp16", device="cuda")
    frozen = SCCLIP(encoder.model, method="clip")
    for batch in (1, 8):
        images = torch.randn(batch, 3, 1008, 1008, device="cuda")
        for name, model in {"floor": frozen, "scclip_fast": encoder}.items():
            call = torch.inference_mode()(partial(model.encode_dense, images))
            results.append(entry("SC-CLIP", tuple(images.shape), "float16", name, call))


def segmentation(results: list[dict]) -> None:
    """Compares the stages of a full-size SAM3 with the frozen model."""
    model = bench_sam3.loaded("cuda", "bfloat16")
    for op, configs in bench_sam3.CONFIGS.items():
        call = bench_sam3.call(op, "cuda", "bfloat16")
        for provider, config in configs.items():
            with bench_sam3.installed(model, config):
                results.append(entry(op, bench_sam3.SHAPE, "bfloat16", provider, call))


def vocabulary(results: list[dict]) -> None:
    """Compares the labels of a photo with 151 classes by a full-size SAM3 with a prompt a pass."""
    shape = (vocabularies.CLASSES[-1], *vocabularies.SIZE)
    for name, call in vocabularies.calls(shape[0], "cuda", "bfloat16").items():
        results.append(entry("Sam3Segmenter", shape, "bfloat16", name, call))


def ceilings() -> dict:
    """Measures the best rates of the GPU: a half-precision product (FLOP/s), a copy (bytes/s)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    big = torch.empty(2**30, device="cuda")
    other = torch.empty_like(big)
    product = milliseconds(lambda: a @ a, flush)
    copy = milliseconds(lambda: other.copy_(big), flush)
    return dict(flops=2 * 8192**3 / product * 1e3, bytes=2 * big.nbytes / copy * 1e3)


PARTS = {
    part.__name__: part
    for part in (
        *(neighbors, bank, aggregation, attention, repair, upsampling, outliers),
        *(host, calibration, segmentation, vocabulary),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; results of other parts are kept"
    )
    parser.add_argument("part", choices=PARTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: list[dict] = []
    PARTS[arguments.part](results)
    out = arguments.out
    before = json.loads(out.read_text()) if out.exists() else dict(results=[])
    kept = [r for r in before["results"] if r["op"] not in {new["op"] for new in results}]
    about = harness.provenance("cuda") | dict(ceilings=ceilings())
    out.write_text(json.dumps(about | dict(results=kept + results), indent=1) + "\n")


if __name__ == "__main__":
    main()
