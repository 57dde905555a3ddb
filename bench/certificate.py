"""Counts the rows that the certificates decide: python bench/certificate.py [torch] [TOKENS WIDTH]

With `torch`, counts the rows that the products of the torch path leave undecided.

Without it, runs the kernels of the half-precision search on several kinds of features and compares
with float64. (Without a GPU, Triton's interpreter takes a few minutes a kind.) Counts candidates a
row, candidates that must be measured, undecided rows, those of them that go to the search over
measured distances, as they have more than 64 candidates or no bound, and wrong rows, which lack a
neighbour or call a column sure that is none. There must be no wrong row.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import scclip_fast as sf
from scclip_fast.chunked import search
from scclip_fast.clip import create_model
from scclip_fast.kernels import knn
from scclip_fast.kernels.knn_details.table import positions
from scclip_fast.scenes.draw import scene

K = 30
PASSES = ("candidates", "float64", "differences")  # of the torch path, beyond the first look
HEADER = (
    "| features | candidates p50 / p99 / max | measured p50 / p99 | undecided | searched | wrong |",
    "|---|--:|--:|--:|--:|--:|",
)


def gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d)


def clusters(n: int, d: int) -> Tensor:
    return 4 * torch.randn(12, d)[torch.randint(12, (n,))] + torch.randn(n, d)


def image(n: int, d: int) -> Tensor:
    """Smooth regions with noise, as neighbouring patches of an image are alike."""
    side = math.ceil(n**0.5)
    coarse = torch.randn(1, d, side // 6, side // 6)
    regions = F.interpolate(coarse, (side, side), mode="bicubic")[0].flatten(1).T[:n]
    return regions + 0.3 * torch.randn(n, d)


def massive_channels(n: int, d: int) -> Tensor:
    x = image(n, d)
    x[:, :3] += 200 * (1 + 0.01 * torch.randn(n, 3))
    return x


def flat_regions(n: int, d: int) -> Tensor:
    """An image with a quarter of sky, whose tokens differ by a thousandth of the others' spread."""
    x = image(n, d)
    x[: n // 4] = x[0] + 1e-3 * torch.randn(n // 4, d)
    return x


def giant_tokens(n: int, d: int) -> Tensor:
    x = image(n, d)
    x[::97] *= 20
    return x


def vit(n: int, d: int) -> Tensor:
    """The last block but one of the small CLIP of scenes, 160 wide, on one scene."""
    encoder, _ = create_model("scenes")
    side = math.ceil(n**0.5)
    drawn = scene("benchmark", 0, (16 * side, 16 * side)).image
    pixels = torch.from_numpy(drawn).permute(2, 0, 1).float().div(255).sub(0.45).div(0.27)
    with torch.no_grad():
        return encoder.tower.block_outputs(pixels[None])[0][-2][0, 1:][:n]


KINDS = (gaussian, clusters, image, massive_channels, flat_regions, giant_tokens, vit)


def row(kind, n: int, d: int) -> dict:
    torch.manual_seed(0)
    x = kind(n, d)
    n = len(x)
    table, undecided, left = run(x)
    decided = torch.ones(n, dtype=torch.bool)
    decided[left] = False
    table[left] = -1
    exists = table >= 0
    sure = table >= 2**30
    member = torch.zeros(n, n, dtype=torch.bool)
    member.scatter_(1, neighbors(x), True)
    columns = (table & (2**30 - 1)).long() * exists
    true = member.gather(1, columns) & exists
    wrong = decided & ((true.sum(dim=1) != K) | (sure & ~true).any(dim=1))
    count = exists.sum(dim=1)[decided].double()
    open_ = (exists & ~sure).sum(dim=1)[decided].double()
    levels = torch.tensor([0.5, 0.99, 1.0], dtype=torch.double)
    empty = not len(count)
    return dict(
        features=kind.__name__,
        candidates=None if empty else count.quantile(levels).tolist(),
        measured=None if empty else open_.quantile(levels[:2]).tolist(),
        undecided=len(undecided) / n,
        left=len(left) / n,
        wrong=wrong.sum().item(),
    )


def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The table by token, the undecided tokens, and those of them left to the search.

    A panel leaves undecided rows to the search alone, bins to `collect` first.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = x[None].to(device)
    n = x.shape[1]
    position = positions(n)
    if n <= knn.MOST_COLUMNS_OF_PANEL:
        ((_, _, table, searched),) = knn.by_panel(x, x, True, K)
        left = searched.tokens[0, : searched.n_tokens.item()].long().cpu()
        return table[0].cpu()[position], left, left
    shares, halves = knn.rounded_for_bins(x, x, True)
    table, undecided = knn.decide(*halves, True, shares, 0, n, K)
    listed = undecided.positions[0, : undecided.n_positions.item()].long().cpu()
    unbounded = undecided.tokens[0, : undecided.n_tokens.item()].long().cpu()
    knn.collect(*halves, True, undecided, table, 0)
    left = undecided.tokens[0, : undecided.n_tokens.item()].long().cpu()
    back = torch.full((table.shape[1],), -1).index_put((position,), torch.arange(n))
    return table[0].cpu()[position], torch.cat([back[listed], unbounded]), left


def neighbors(x: Tensor) -> Tensor:
    """The neighbours in float64, by a product of centred features."""
    x = x.double() - x.double().mean(dim=0)
    squares = x.square().sum(dim=1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    return distances.fill_diagonal_(torch.inf).topk(K, largest=False).indices


def line(row: dict) -> str:
    if row["candidates"] is None:
        return f"| {row['features']} | | | {row['undecided']:.2%} | {row['left']:.2%} | 0 |"
    counts = " / ".join(f"{value:.0f}" for value in row["candidates"])
    measured = " / ".join(f"{value:.0f}" for value in row["measured"])
    share = f"{row['undecided']:.2%} | {row['left']:.2%}"
    return f"| {row['features']} | {counts} | {measured} | {share} | {row['wrong']} |"


def torch_path(n: int, d: int) -> None:
    """Prints how many rows of each kind the passes of the torch path leave to the next one."""
    print("| features | candidates | float64 | differences |", "|---|--:|--:|--:|", sep="\n")
    for kind in KINDS:
        torch.manual_seed(0)
        x = kind(n, d)
        search.counts.clear()
        sf.lof_scores(x, K, backend="torch")
        shares = (search.counts[name] / search.counts["product"] for name in PASSES)
        print("|", kind.__name__, *(f"| {share:.2%}" for share in shares), "|", flush=True)


if __name__ == "__main__":
    on_torch = sys.argv[1:2] == ["torch"]
    sizes = sys.argv[1 + on_torch :]
    n, d = map(int, sizes) if sizes else (5184, 1024)
    if on_torch:
        sys.exit(torch_path(n, d))
    print(*HEADER, sep="\n")
    rows = []
    for kind in KINDS:
        rows.append(row(kind, n, d))
        print(line(rows[-1]), flush=True)
    out = Path(__file__).parent / "results" / f"certificate-{n}x{d}.json"
    about = harness.provenance("cuda" if torch.cuda.is_available() else "cpu")
    out.write_text(json.dumps(about | dict(k=K, tokens=n, width=d, rows=rows), indent=1) + "\n")
