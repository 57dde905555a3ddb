"""Draws the results of bench/targets.py: python bench/roofline.py RESULT.json

Draws the roofline RESULT.svg beside the file: operations a second over operations a byte of inputs
and outputs, under the measured rates of the GPU's product and copy. bench/report.py prints the
tables.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from report import OURS, by_op_and_shape

BYTES = {"float32": 4, "float16": 2}
WORK = {"knn": (1, 1.1), "aggregate": (2, 3), "blended_attention": (4, 5)}  # products, tensors
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 440, 70, 50
X, Y = (50, 20000), (1, 1000)  # FLOP a byte, TFLOP/s
COLORS = {OURS: "#0072b2", "eager": "#d55e00", "matmul + topk": "#d55e00", "FlashLib": "#009e73"}


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    drawing = picture(by_op_and_shape(results), results["ceilings"])
    path.with_suffix(".svg").write_text(drawing + "\n")


def work(op: str, shape: tuple, dtype: str) -> tuple[float, float]:
    """Counts operations of the products, and bytes of inputs and outputs."""
    batch, n, d = shape
    products, tensors = WORK[op]
    return products * 2.0 * batch * n * n * d, tensors * batch * n * d * BYTES[dtype]


def picture(groups: dict, ceilings: dict) -> str:
    """An SVG on logarithmic axes."""

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x, y = (
            (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
            for value, (low, high) in ((intensity, X), (rate, Y))
        )
        return LEFT + x * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - 20)

    top = ceilings["flops"] / 1e12
    ridge = ceilings["flops"] / ceilings["bytes"]
    roof = [at(X[0], X[0] * ceilings["bytes"] / 1e12), at(ridge, top), at(X[1], top)]
    corners = " ".join(f"{x:.0f},{y:.0f}" for x, y in roof)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<polyline fill="none" stroke="black" points="{corners}"/>',
        text(LEFT, HEIGHT - 12, "operations a byte of inputs and outputs"),
        text(8, 14, "TFLOP/s"),
        text(*at(X[1] / 4, top * 1.06), f"fp16 product: {top:.0f} TFLOP/s"),
    ]
    lines += [text(20, at(X[0], rate)[1] + 4, str(rate)) for rate in (1, 10, 100, 1000)]
    lines += [text(at(b, 1)[0] - 10, HEIGHT - 32, f"{b:,}") for b in (100, 1000, 10000)]
    for (op, shape, dtype), entries in groups.items():
        if op not in WORK:
            continue
        operations, size = work(op, shape, dtype)
        for name, entry in entries.items():
            if name in COLORS and "milliseconds" in entry:
                x, y = at(operations / size, operations / entry["milliseconds"] / 1e9)
                lines.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{COLORS[name]}"/>')
                label = f"{op} {shape[1]:,} × {shape[2]:,} {dtype}"
                lines += [text(x + 6, y + 4, label)] if name == OURS else []
    for i, (name, color) in enumerate(COLORS.items()):
        lines.append(f'<circle cx="{LEFT + 20}" cy="{40 + 16 * i}" r="4" fill="{color}"/>')
        lines.append(text(LEFT + 30, 44 + 16 * i, name))
    return "\n".join([*lines, "</svg>"])


def text(x: float, y: float, content: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{content}</text>'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
