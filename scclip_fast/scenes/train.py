"""Train the CLIP of the drawn scenes: python -m scclip_fast.scenes.train --out FOLDER

The loss is contrastive, as CLIP's: no label gives the position of anything. Most batches are
windows of scenes, as a window of 5 x 5 patches costs an eighth of a whole scene. Two kinds of
batches take turns. In the first, each window shows one shape, as a photograph of a thing does, and
its caption is the name. Half of these batches have shapes of one colour, so that only the outline
tells them apart. In the second, windows or whole scenes have captions of all that lies in them.

A checkpoint in the folder is continued, with the same batches as without the interruption.
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
from .draw import CLASSES, COLORS, GROUNDS, caption, scene

with needs("clip"):
    import numpy as np
    import open_clip
    from safetensors.torch import load_file, save_file

    from ..clip.openclip_tower import OpenClipTower

CONFIG = Path(__file__).with_name("open_clip_config.json")
POOL = 10_000  # scenes, 1.5 GB, drawn once
WARMUP = 100  # steps of rising learning rate
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
VISIBLE_SHAPE = 0.4  # a caption names a shape if its window has this share of the shape's pixels
VISIBLE_GROUND = 0.05  # and a ground if it fills this share of the window's pixels
REPORT = 20  # steps between two lines of progress
CHECKPOINT = 200  # steps between two checkpoints


class Stage(NamedTuple):
    steps: int
    images: int  # per step
    sides: tuple[int | None, ...]  # of the windows, in patches, in turn; None for whole scenes


STAGES = (Stage(3000, 128, (4, 5, 6, 7)), Stage(300, 64, (7, None)))


class Batch(NamedTuple):
    pixels: Tensor  # (B, 3, h, w), normalised
    corners: Tensor  # (B, 2), the first row and column of each window, in patches
    captions: list[str]


class Thing(NamedTuple):
    """A shape in a scene of the pool."""

    scene: int
    name: str
    center: np.ndarray  # row and column, in pixels
    extent: int  # the longer side of its box, in pixels


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
        self.things = [thing for index in range(size) for thing in self._things(index)]
        preprocess = config["preprocess_cfg"]
        self.mean = 255 * torch.tensor(preprocess["mean"])[:, None, None]
        self.std = 255 * torch.tensor(preprocess["std"])[:, None, None]
        self.patch = config["model_cfg"]["vision_cfg"]["patch_size"]
        self.grid = self.images.shape[-1] // self.patch

    def named(self, rng: np.random.Generator, count: int, side: int) -> Batch:
        """Windows of one shape each, with its name; in half of the batches, all of one colour.

        In the other half, a quarter of the windows lies anywhere and has the name of what fills
        most of it, mostly a ground.
        """
        color, bare = None, False
        if rng.random() < 0.5:
            color, bare = rng.choice(list(COLORS)), rng.random() < 0.5
        things = self._fitting(color, side)
        chosen = [things[i] for i in rng.choice(len(things), min(count, len(things)), False)]
        centers = np.stack([thing.center for thing in chosen]) / self.patch
        corners = np.round(centers - side / 2 + rng.uniform(-1, 1, centers.shape))
        corners = corners.clip(0, self.grid - side).astype(np.int64)
        # In a batch of one colour, the name of the shape alone is a caption as true.
        names = [thing.name.split()[1] if bare else thing.name for thing in chosen]
        scenes = [thing.scene for thing in chosen]
        if color is None:
            anywhere = len(chosen) // 4
            scenes[:anywhere] = rng.choice(len(self.images), anywhere, replace=False)
            corners[:anywhere] = rng.integers(0, self.grid - side + 1, (anywhere, 2))
            for i, (rows, columns) in enumerate(self._slices(corners[:anywhere], side)):
                names[i] = CLASSES[_areas(self.labels[scenes[i]][rows, columns]).argmax()]
        return self._windows(scenes, corners, side, names, rng)

    def described(self, rng: np.random.Generator, count: int, side: int | None) -> Batch:
        """Windows anywhere, or whole scenes, with captions of what they show."""
        side = side or self.grid
        chosen = rng.choice(len(self.images), count, replace=False)
        corners = rng.integers(0, self.grid - side + 1, (count, 2))
        captions = []
        for index, (rows, columns) in zip(chosen, self._slices(corners, side), strict=True):
            captions.append(caption(rng, self._visible(index, rows, columns)))
        return self._windows(chosen, corners, side, captions, rng)

    def _windows(self, scenes, corners: np.ndarray, side: int, captions: list[str], rng) -> Batch:
        # One template a batch: equal contents keep equal captions.
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        template = templates[rng.integers(len(templates))] if rng.random() < 0.5 else str
        places = zip(scenes, self._slices(corners, side), strict=True)
        crops = torch.stack(
            [self.images[index, :, rows, columns] for index, (rows, columns) in places]
        )
        pixels = (crops - self.mean) / self.std
        return Batch(pixels, torch.from_numpy(corners), [template(text) for text in captions])

    def _slices(self, corners: np.ndarray, side: int) -> list[tuple[slice, slice]]:
        starts = (corners * self.patch).tolist()
        pixels = side * self.patch
        return [(slice(y, y + pixels), slice(x, x + pixels)) for y, x in starts]

    def _fitting(self, color: str | None, side: int) -> list[Thing]:
        """The shapes, of one colour or of any, whose box a window holds and is not lost in."""
        most = side * self.patch
        return [
            thing
            for thing in self.things
            if most / 2 <= thing.extent <= most and (color is None or thing.name.startswith(color))
        ]

    def _things(self, index: int) -> list[Thing]:
        things = []
        for number in np.flatnonzero(self.areas[index]):
            if number >= len(GROUNDS):
                places = np.argwhere(self.labels[index] == number)
                low, high = places.min(axis=0), places.max(axis=0)
                extent = int((high - low).max()) + 1
                things.append(Thing(index, CLASSES[number], (low + high + 1) / 2, extent))
        return things

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
    features = tower.norm_and_project(tokens)
    averages = model.visual.pool_type == "avg"
    return F.normalize(features[:, 1:].mean(dim=1) if averages else features[:, 0], dim=-1)


def contrastive_loss(
    model: nn.Module, tokenizer: open_clip.SimpleTokenizer, batch: Batch, dtype: torch.dtype
) -> Tensor:
    """CLIP's loss. Equal captions are one text, whose images are all right."""
    texts = list(dict.fromkeys(batch.captions))
    right = torch.tensor([texts.index(caption) for caption in batch.captions])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        image = encode_windows(model, batch.pixels, batch.corners)
        text = model.encode_text(tokenizer(texts), normalize=True)
    logits = model.logit_scale.exp() * image.float() @ text.float().T
    shares = F.normalize(F.one_hot(right, len(texts)).T.float(), p=1)  # of each text's images
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, shares)) / 2


def train(
    model: nn.Module, tokenizer: open_clip.SimpleTokenizer, pool: Pool, seed: int, folder: Path
) -> None:
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    dtype, start = fast_dtype(), time.monotonic()
    plan = [(stage, turn) for stage in STAGES for turn in range(stage.steps)]
    for step, (stage, turn) in enumerate(plan):
        if step < schedule.last_epoch:
            continue
        rng = np.random.default_rng((seed, step))
        side = stage.sides[turn // 2 % len(stage.sides)]
        draw = pool.described if turn % 2 or side is None else pool.named
        loss = contrastive_loss(model, tokenizer, draw(rng, stage.images, side), dtype)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        done = step + 1
        if done % REPORT == 0:
            minutes = (time.monotonic() - start) / 60
            print(f"step {done:>5}  loss {loss.item():.3f}  {minutes:.1f} min", flush=True)
        if done % CHECKPOINT == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, which it then replaces."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 1024).to(dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(5):
            x @ x
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


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
    weights = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if folder.resolve() != CONFIG.parent:
        shutil.copy(CONFIG, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--start", type=Path, help="weights to go on from, as this command saves")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    config = json.loads(CONFIG.read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    if args.start is not None:
        model.load_state_dict(load_file(args.start))  # copied, hence still float32
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    print(f"drawing {POOL} scenes", flush=True)
    train(model, tokenizer, Pool(POOL, config), args.seed, args.out)
    save(model, args.out)


if __name__ == "__main__":
    main()
