"""The mIoU of SC-CLIP without each stage, on drawn scenes: python bench/ablation.py --out JSON

Every variant segments the same scenes, so that differences are paired. Each seed draws other
scenes; the intervals are a bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
from report import FULL, ablation_table
from tqdm import tqdm

from scclip_fast.clip import SCCLIPConfig, create_model
from scclip_fast.clip.config import STAGES
from scclip_fast.clip.shared_layers import SharedLayers
from scclip_fast.evaluate import PROTOCOLS, compare_clip, confusion_matrix, provenance
from scclip_fast.evaluate.metric import areas, bootstrap, iou
from scclip_fast.scenes.draw import CLASSES, GROUNDS, HELD_OUT, scene
from scclip_fast.segment import Segmenter

BASELINES = {
    **{"CLIP": "clip", "MaskCLIP": "maskclip", "SCLIP": "sclip", "ClearCLIP": "clearclip"},
    **{"NACLIP": "naclip", "ResCLIP": "resclip"},
}
GROUPS = {
    "all": list(range(len(CLASSES))),
    "grounds": [i for i, name in enumerate(CLASSES) if name in GROUNDS],
    "shapes": [i for i, n in enumerate(CLASSES) if n not in GROUNDS and n not in HELD_OUT],
    "held out": [i for i, name in enumerate(CLASSES) if name in HELD_OUT],
}
RESAMPLES = 2000


def variants(depth: int) -> dict[str, tuple[str, SCCLIPConfig]]:
    """Returns method and configuration of the baselines, of SC-CLIP, and of SC-CLIP with less."""
    full = SCCLIPConfig.for_depth(depth)
    none = replace(full, **dict.fromkeys(STAGES, False))
    return {
        **{name: (method, full) for name, method in BASELINES.items()},
        FULL: ("scclip", full),
        **{f"without {s}": ("scclip", replace(full, **{s: False})) for s in STAGES},
        "without all five": ("scclip", none),
    }


def measure(encoder: SharedLayers, tokenizer, indices: range) -> dict[str, np.ndarray]:
    """Returns areas (images, 3, C) of each variant, see `scclip_fast.evaluate.metric.areas`."""
    protocol = PROTOCOLS["scenes"]
    options = dict(short_side=protocol.short_side, logit_scale=protocol.logit_scale)
    segmenter = Segmenter(encoder, tokenizer, CLASSES, **options)
    comparison = compare_clip(segmenter, variants(len(encoder.tower.blocks)))
    measured = {name: [] for name in comparison.settings}
    for index in tqdm(indices, unit="scene"):
        image, labels, _ = scene("benchmark", index)
        for name, found in comparison(image).items():
            confusion = confusion_matrix(found.labels, labels, len(CLASSES))
            measured[name].append(areas(confusion))
    return {name: np.stack(by_image) for name, by_image in measured.items()}


def mean_iou(summed: np.ndarray, group: str = "all") -> np.ndarray:
    """Averages areas (..., 3, C) to (...), in per cent, over the classes of a group that occur."""
    return 100 * np.nanmean(iou(summed)[..., GROUPS[group]], axis=-1)


def interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % interval of resampled values."""
    return [round(float(end), 2) for end in np.quantile(values, (0.025, 0.975))]


def summarise(measured: dict[str, np.ndarray], seeds: int) -> list[dict]:
    resampled = {name: mean_iou(bootstrap(a, RESAMPLES, seed=0)) for name, a in measured.items()}
    rows = []
    for name, by_image in measured.items():
        by_seed = mean_iou(np.stack([images.sum(axis=0) for images in np.split(by_image, seeds)]))
        total = by_image.sum(axis=0)
        row = {"variant": name}
        row |= {group: round(float(mean_iou(total, group)), 2) for group in GROUPS}
        row["ci95"] = interval(resampled[name])
        row["by_seed"] = [round(float(value), 2) for value in by_seed]
        row["minus_full_ci95"] = interval(resampled[name] - resampled[FULL])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="scenes", help="name of a model, as for scclip_fast.clip.create_model"
    )
    parser.add_argument("--scenes", type=int, default=100, help="scenes of each seed")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    encoder, tokenizer = create_model(args.model)
    shared = SharedLayers(encoder.model)
    measured = measure(shared, tokenizer, range(args.seeds * args.scenes))
    rows = summarise(measured, args.seeds)
    print(ablation_table({"rows": rows}))
    if args.out:
        about = harness.provenance("cpu")
        about |= {"weights": provenance.weights_digest(encoder), "versions": provenance.versions()}
        about |= {"scenes": args.scenes, "seeds": args.seeds}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
