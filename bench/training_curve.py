"""Draw the losses of `scclip_fast.scenes.train`: python bench/training_curve.py CSV --out PNG

The file has a row for each line of the training's log: the step, and the means of the losses since
the line before.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

LABELS = {
    "patches": "partial labels of patches",
    "attention": "the same, attention alone",
    "best": "surest patch of a shape",
    "captions": "captions, contrastive",
}


def draw(rows: list[dict[str, str]], out: Path) -> None:
    """Draws each loss that has numbers over the steps."""
    figure = Figure(figsize=(7.2, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss, mean of 50 steps", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path, help="step and losses, as CSV")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    with args.log.open(newline="") as file:
        draw(list(csv.DictReader(file)), args.out)


if __name__ == "__main__":
    main()
