"""What the half-precision search decides: python bench/certificate.py [TOKENS WIDTH]

Runs its kernels (without a GPU in Triton's interpreter, a few minutes a kind) on several kinds of
features and compares with float64: candidates a row, those that must be measured, rows without a
certificate, and certificates that are wrong, which there must be none of.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from scclip_fast import chunked
from scclip_fast.kernels import nearest

K = 30
HEADER = (
    "| features | candidates p50 / p99 / max | to be measured p50 / p99 | undecided | wrong |",
    "|---|--:|--:|--:|--:|",
)


def gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d)


def clusters(n: int, d: int) -> Tensor:
    return 4 * torch.randn(12, d)[torch.randint(12, (n,))] + torch.randn(n, d)


def image(n: int, d: int) -> Tensor:
    """Smooth regions and noise, as neighbouring patches are alike."""
    side = math.ceil(n**0.5)
    coarse = torch.randn(1, d, side // 6, side // 6)
    regions = F.interpolate(coarse, (side, side), mode="bicubic")[0].flatten(1).T[:n]
    return regions + 0.3 * torch.randn(n, d)


def massive_channels(n: int, d: int) -> Tensor:
    x = image(n, d)
    x[:, :3] += 200 * (1 + 0.01 * torch.randn(n, 3))
    return x


def flat_regions(n: int, d: int) -> Tensor:
    """A quarter of an image is sky: its tokens differ by a thousandth of the others' spread."""
    x = image(n, d)
    x[: n // 4] = x[0] + 1e-3 * torch.randn(n // 4, d)
    return x


def giant_tokens(n: int, d: int) -> Tensor:
    x = image(n, d)
    x[::97] *= 20
    return x


KINDS = (gaussian, clusters, image, massive_channels, flat_regions, giant_tokens)


def row(kind, n: int, d: int) -> dict:
    torch.manual_seed(0)
    x = kind(n, d)
    table, undecided = run(x)
    decided = torch.ones(n, dtype=torch.bool)
    decided[undecided] = False
    table[undecided] = -1
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
        wrong=wrong.sum().item(),
    )


def run(x: Tensor) -> tuple[Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = x[None].to(device)
    n, d = x.shape[1:]
    splits = nearest.splits(1, n)
    tokens = nearest.rounded(x, chunked.finite_mean(x).squeeze(1), splits)
    table, listed, count = nearest.decide(tokens, splits, 0, n, n, d, K)
    return table[0, :n].cpu(), listed[0, : count.item()].cpu().long()


def neighbors(x: Tensor) -> Tensor:
    """float64's neighbours, of centred features by a product."""
    x = x.double() - x.double().mean(dim=0)
    squares = x.square().sum(dim=1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    return distances.fill_diagonal_(torch.inf).topk(K, largest=False).indices


def line(found: dict) -> str:
    if found["candidates"] is None:
        return f"| {found['features']} | | | {found['undecided']:.2%} | {found['wrong']} |"
    counts = " / ".join(f"{value:.0f}" for value in found["candidates"])
    measured = " / ".join(f"{value:.0f}" for value in found["measured"])
    share = f"{found['undecided']:.2%}"
    return f"| {found['features']} | {counts} | {measured} | {share} | {found['wrong']} |"


if __name__ == "__main__":
    n, d = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (5184, 1024)
    print(*HEADER, sep="\n")
    rows = []
    for kind in KINDS:
        rows.append(row(kind, n, d))
        print(line(rows[-1]), flush=True)
    out = Path(__file__).parent / "results" / f"certificate-{n}x{d}.json"
    out.write_text(json.dumps(dict(k=K, tokens=n, width=d, rows=rows), indent=1) + "\n")
