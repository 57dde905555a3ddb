"""Train the CLIP of the drawn scenes: python -m scclip_fast.scenes.train --out FOLDER

The loss is contrastive, as CLIP's: no label gives the position of anything. The first stage trains
on random windows of scenes, with captions of what lies in them; four windows cost as much as a
whole scene. The second stage trains on whole scenes. All come from a pool of 3 GB of scenes, which
is drawn first. Training takes about 45 minutes on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..extras import needs
from .draw import CLASSES, GROUNDS, caption, scene

with needs("clip"):
    import numpy as np
    import open_clip
    from safetensors.torch import save_file

    from ..clip.openclip_tower import OpenClipTower

CONFIG = Path(__file__).with_name("open_clip_config.json")
POOL = 20_000  # scenes, drawn once
WARMUP = 100  # steps of rising learning rate
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
VISIBLE_SHAPE = 0.4  # a caption names a shape if its window has this share of the shape's pixels
VISIBLE_GROUND = 0.05  # and a ground if it fills this share of the window's pixels
REPORT = 20  # steps between two lines of progress


class Stage(NamedTuple):
    steps: int
    images: int  # per step
    side: int | None  # of each image's window, in patches; None for whole images


STAGES = (Stage(1000, 128, side=7), Stage(400, 64, side=None))


class Pool:
    """Keeps scenes in memory and makes batches of windows with captions."""

    def __init__(self, size: int, config: dict) -> None:
        with ProcessPoolExecutor() as workers:
            scenes = list(workers.map(partial(scene, "train"), range(size), chunksize=100))
        self.images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
        self.labels = [s.labels for s in scenes]
        self.areas = [_areas(s.labels) for s in scenes]
        # The class is the last two words: colour and shape, or a ground.
        self.phrases = [{_class(phrase): phrase for phrase in s.phrases} for s in scenes]
        preprocess = config["preprocess_cfg"]
        self.mean = 255 * torch.tensor(preprocess["mean"])[:, None, None]
        self.std = 255 * torch.tensor(preprocess["std"])[:, None, None]
        self.patch = config["model_cfg"]["vision_cfg"]["patch_size"]

    def batch(
        self, rng: np.random.Generator, count: int, side: int | None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Draws windows (B, 3, h, w) of images, their corners (B, 2) in patches, and captions."""
        chosen = rng.choice(len(self.images), count, replace=False)
        grid = self.images.shape[-1] // self.patch
        side = side or grid
        corners = rng.integers(0, grid - side + 1, (count, 2))
        crops, captions = [], []
        for index, (y, x) in zip(chosen, corners * self.patch, strict=True):
            rows, columns = (slice(start, start + side * self.patch) for start in (y, x))
            crops.append(self.images[index, :, rows, columns])
            text = caption(rng, self._visible(index, rows, columns))
            template = rng.choice(open_clip.OPENAI_IMAGENET_TEMPLATES)
            captions.append(template(text) if rng.random() < 0.5 else text)
        pixels = (torch.stack(crops) - self.mean) / self.std
        return pixels, torch.from_numpy(corners), captions

    def _visible(self, index: int, rows: slice, columns: slice) -> list[str]:
        """Phrases of all classes that a window shows enough of, or of the one it shows most of."""
        areas = _areas(self.labels[index][rows, columns])
        enough = VISIBLE_SHAPE * self.areas[index]
        enough[: len(GROUNDS)] = VISIBLE_GROUND * areas.sum()
        phrases = self.phrases[index]
        visible = [phrase for c, phrase in phrases.items() if areas[c] > enough[c]]
        return visible or [phrases[areas.argmax()]]


def _class(phrase: str) -> int:
    """Index of the class that a phrase names, such as "striped red star"."""
    return CLASSES.index(" ".join(phrase.split()[-2:]))


def _areas(labels: np.ndarray) -> np.ndarray:
    """Number of pixels of each class."""
    return np.bincount(labels.ravel(), minlength=len(CLASSES))


def encode_windows(model: nn.Module, pixels: Tensor, corners: Tensor) -> Tensor:
    """Features (B, E) of windows (B, 3, h, w) with the positional embedding of their corners."""
    tower = OpenClipTower(model)
    patches = tower.patch_embedding(pixels)
    rows, columns = (
        corners[:, axis, None] + torch.arange(patches.shape[2 + axis]) for axis in (0, 1)
    )
    places = rows[:, :, None] * tower.grid_size[1] + columns[:, None, :]
    positions = tower.positional_embedding
    patches = patches.flatten(2).mT + positions[1:][places.flatten(1)]
    class_token = (tower.prefix_tokens + positions[:1]).expand(len(pixels), 1, -1)
    tokens = tower.norm_before(torch.cat([class_token, patches], dim=1))
    # For few tokens, plain matrix products are the faster attention.
    plain = tokens.shape[1] < 64
    with sdpa_kernel(SDPBackend.MATH if plain else SDPBackend.FLASH_ATTENTION):
        for block in tower.blocks:
            tokens = tower.run_block(block, tokens)
    return tower.unit_features(tokens[:, 0])


def train(model: nn.Module, tokenizer: open_clip.SimpleTokenizer, pool: Pool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    start = time.monotonic()
    for images, side in (stage[1:] for stage in STAGES for _ in range(stage.steps)):
        pixels, corners, captions = pool.batch(rng, images, side)
        loss = contrastive_loss(model, pixels, corners, tokenizer(captions))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if schedule.last_epoch % REPORT == 0:
            minutes = (time.monotonic() - start) / 60
            print(
                f"step {schedule.last_epoch:>4}  loss {loss.item():.3f}  {minutes:.1f} min",
                flush=True,
            )


def contrastive_loss(model: nn.Module, pixels: Tensor, corners: Tensor, texts: Tensor) -> Tensor:
    """CLIP's loss: each image must find its caption in the batch, and each caption its image."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = encode_windows(model, pixels, corners)
        text = model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * image.float() @ text.float().T
    target = torch.arange(len(texts))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _rate(step: int) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine down to 2 %."""
    progress = max(0, step - WARMUP) / (sum(stage.steps for stage in STAGES) - WARMUP)
    return min(1, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def _groups(model: nn.Module) -> list[dict]:
    """Parameter groups of the optimizer: gains and biases have no weight decay."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0},
    ]


def save(model: nn.Module, folder: Path) -> None:
    """Writes the model in half precision, for open_clip's "local-dir:"."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if folder.resolve() != CONFIG.parent:
        shutil.copy(CONFIG, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = json.loads(CONFIG.read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    print(f"drawing {POOL} scenes", flush=True)
    train(model, tokenizer, Pool(POOL, config), args.seed)
    save(model, args.out)


if __name__ == "__main__":
    main()
