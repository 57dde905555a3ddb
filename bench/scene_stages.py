"""Draw what SC-CLIP does to a scene, in one picture: python bench/scene_stages.py --out PNG

The panels are the norms and LOF of the patches before the last block, and the principal components
of features: of plain CLIP, of SC-CLIP without its auxiliary branch, of this branch, and of both.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from scclip_fast.calibration import find_outliers
from scclip_fast.clip import create_model, methods
from scclip_fast.clip.proxy import CLIP_MEAN, CLIP_STD
from scclip_fast.plots.outliers import outline, pca_colours
from scclip_fast.scenes.draw import scene

SCENE = ("benchmark", 0)


@torch.inference_mode()
def panels(photo: np.ndarray) -> tuple[dict[str, np.ndarray], Tensor]:
    """Returns pictures (h, w) or (h, w, 3) by title, and the mask (h, w) of the outliers."""
    encoder, _ = create_model("scenes")
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(photo).permute(2, 0, 1) / 255 - mean) / std
    outputs, grid = encoder.layers(pixels[None])
    tower, config = encoder.tower.at(grid), encoder.config
    tokens = tower.patches(outputs[-1])
    found = find_outliers(tokens, config.outlier_n_neighbors, config.outlier_contamination)
    both, main = (
        methods.scclip(tower, outputs, grid, replace(config, multi_level=levels))
        for levels in (True, False)
    )
    plain = tower.patches(methods.clip(tower, outputs, grid, config))
    tokens_of = {
        "plain CLIP": plain,
        "SC-CLIP without auxiliary branch": main,
        "auxiliary branch": both - main,
        "SC-CLIP as published": both,
    }
    features = [tower.unit_features(each)[0] for each in tokens_of.values()]
    colours = [pca_colours([each], each)[0].unflatten(0, grid).numpy() for each in features]
    maps = tokens[0].norm(dim=-1), found.scores[0]
    norms, scores = (each.unflatten(0, grid).numpy() for each in maps)
    pictures = {"scene": photo, "norm of the patches": norms, "Local Outlier Factor": scores}
    return pictures | dict(zip(tokens_of, colours, strict=True)), found.mask[0].unflatten(0, grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    pictures, mask = panels(scene(*SCENE).image)
    figure = Figure(figsize=(15, 2.7), dpi=100, layout="constrained")
    for axes, (title, picture) in zip(
        figure.subplots(1, len(pictures)), pictures.items(), strict=True
    ):
        axes.imshow(picture, interpolation="nearest", cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        if picture.ndim == 2:
            axes.add_collection(outline(mask, "cyan"))
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
