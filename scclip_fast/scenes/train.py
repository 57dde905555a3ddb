"""Train the CLIP of the drawn scenes: python -m scclip_fast.scenes.train --out FOLDER

Captions alone teach the model: they name what a window shows, and nothing tells where. There are
two losses:

- CLIP's contrastive loss, between the class token and the whole caption.
- Partial labels (Jin and Ghahramani, "Learning with multiple labels", NeurIPS 2002) for patches: a
  patch has one of the names of its window, and none that only other windows have. Which one is the
  present model's guess, under the condition that each name has a least share of the patches
  (expectation and maximisation); otherwise grounds would take all patches, because nearly every
  window has one. Half of this loss is that of the last block's attention alone, without residual
  and MLP. In CLIPs that saw photos by the hundred million it is aligned with the text by itself,
  which ClearCLIP, SC-CLIP and their relatives rely on; in this one it would not be.

A checkpoint in the folder is continued, with the same batches as without the interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..extras import needs
from .draw import GROUNDS
from .pool import Batch, Pool

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
LEAST_SHARES = {5: 0.2, 7: 0.12, 14: 0.05}  # of the patches of a window, by its side in patches
RES_CLS = 0.3  # weight of the class token in SC-CLIP's last block
ROUNDS = 4  # of raising names to their least share
BEST_WEIGHT, CAPTION_WEIGHT = 0.1, 0.25  # of the two smaller losses
REPORT = 50  # steps between two lines of progress
CHECKPOINT = 250  # steps between two checkpoints


class Windows(NamedTuple):
    """The windows of a step: their number, and their side in patches; 14 is a whole scene."""

    count: int
    side: int


class Stage(NamedTuple):
    steps: int
    windows: tuple[Windows, ...]  # in turn


SMALL, LARGE, WHOLE = Windows(128, 5), Windows(64, 7), Windows(16, 14)
STAGES = (Stage(1500, (SMALL, LARGE, SMALL, SMALL)), Stage(1550, (SMALL, LARGE, WHOLE, LARGE)))


class Losses(NamedTuple):
    patches: Tensor  # the partial labels of all patches
    attention: Tensor  # the same, by the attention of the last block alone
    best: Tensor  # the same as the first, of the surest patch of each shape
    captions: Tensor  # CLIP's loss

    def total(self) -> Tensor:
        dense = (self.patches + self.attention) / 2
        return dense + BEST_WEIGHT * self.best + CAPTION_WEIGHT * self.captions


class Encoded(NamedTuple):
    """Unit vectors in the space of the text."""

    tokens: Tensor  # (B, 1 + N, E), the class token first
    attended: Tensor  # (B, N, E), by the last block's attention of keys, as SC-CLIP has it


Encode = Callable[[nn.Module, Tensor, Tensor], Encoded]


def encode_windows(model: nn.Module, pixels: Tensor, corners: Tensor) -> Encoded:
    """Encodes windows (B, 3, h, w), with the positional embedding of their corners (B, 2)."""
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
        for block in tower.blocks[:-1]:
            tokens = tower.run_block(block, tokens)
        last = tower.blocks[-1]
        _, k, v = tower.qkv(last, tokens[:, 1:])
        attended = tower.merge_heads(last, F.scaled_dot_product_attention(k, k, v))
        attended = attended + RES_CLS * tokens[:, :1]
        tokens = tower.run_block(last, tokens)
    return Encoded(tower.unit_features(tokens), tower.unit_features(attended))


def losses(
    model: nn.Module,
    tokenizer: open_clip.SimpleTokenizer,
    batch: Batch,
    dtype: torch.dtype,
    encode: Encode,
) -> Losses:
    """The losses of a batch, computed in `dtype` but for the last products."""
    names = list(dict.fromkeys(chain(*batch.names)))
    named = torch.tensor([[name in of_window for name in names] for of_window in batch.names])
    texts = list(dict.fromkeys(batch.captions))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        encoded = encode(model, batch.pixels, batch.corners)
        prompts = tokenizer([*map(batch.template, names), *texts])
        text = model.encode_text(prompts, normalize=True)
    tokens, attended = (features.float() for features in encoded)
    text = model.logit_scale.exp() * text.float()
    log_p, log_p_attended = (
        (features @ text[: len(names)].T).log_softmax(dim=-1)
        for features in (tokens[:, 1:], attended)
    )
    least = LEAST_SHARES[math.isqrt(log_p.shape[1])]
    shapes = named & torch.tensor([name not in GROUNDS for name in names])
    return Losses(
        partial_labels(log_p, named, least),
        partial_labels(log_p_attended, named, least),
        -log_p.amax(dim=1)[shapes].mean(),
        contrastive(tokens[:, 0] @ text[len(names) :].T, list(map(texts.index, batch.captions))),
    )


def partial_labels(log_p: Tensor, named: Tensor, least: float) -> Tensor:
    """The cross entropy of the names of patches, half of it with equal weight for each name.

    Args:
        log_p: (B, N, names), the model's logarithmic probabilities of the names of a patch.
        named: (B, names) bool, the names of each window.
        least: the share of the patches that each of these names has at least, about.
    """
    guess = guessed(log_p.detach().exp(), named, least)
    by_name = -(guess * log_p).sum(dim=1)
    of_patches = by_name.sum() / log_p[..., 0].numel()
    of_names = (by_name / guess.sum(dim=1).clamp(min=1e-3))[named].mean()
    return (of_patches + of_names) / 2


def guessed(p: Tensor, named: Tensor, least: float) -> Tensor:
    """Probabilities (B, N, names) of the names of each window, from those of all names."""
    guess = p.where(named[:, None], 0) + 1e-6 * named[:, None]
    guess = guess / guess.sum(dim=-1, keepdim=True)
    for _ in range(ROUNDS):
        shares = guess.mean(dim=1, keepdim=True).clamp(min=1e-8)
        guess = guess * (least / shares).clamp(min=1)
        guess = guess / guess.sum(dim=-1, keepdim=True)
    return guess


def contrastive(logits: Tensor, owners: list[int]) -> Tensor:
    """CLIP's loss for logits (B, texts). Equal captions are one text, whose images are all right.

    Args:
        owners: the text of each image.
    """
    right = torch.tensor(owners)
    shares = F.normalize(F.one_hot(right, logits.shape[1]).T.float(), p=1)  # of a text's images
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, shares)) / 2


def train(
    model: nn.Module,
    tokenizer: open_clip.SimpleTokenizer,
    pool: Pool,
    seed: int,
    folder: Path,
    encode: Encode,
) -> None:
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    dtype, start = fast_dtype(), time.monotonic()
    plan = [
        stage.windows[turn % len(stage.windows)] for stage in STAGES for turn in range(stage.steps)
    ]
    recent = []
    for step in range(schedule.last_epoch, len(plan)):
        batch = pool.windows(np.random.default_rng((seed, step)), *plan[step])
        found = losses(model, tokenizer, batch, dtype, encode)
        optimizer.zero_grad()
        found.total().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        recent.append([loss.item() for loss in found])
        done = step + 1
        if done % REPORT == 0:
            means = "  ".join(
                f"{name} {mean:.3f}"
                for name, mean in zip(Losses._fields, np.mean(recent, axis=0), strict=True)
            )
            minutes = (time.monotonic() - start) / 60
            print(f"step {done:>5}  {means}  {minutes:.1f} min", flush=True)
            recent.clear()
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the vision tower, which takes a C++ compiler and minutes, and halves a step",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    config = json.loads(CONFIG.read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    if args.start is not None:
        model.load_state_dict(load_file(args.start))  # copied, hence still float32
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    print(f"drawing {POOL} scenes", flush=True)
    pool = Pool(POOL, config)
    encode = torch.compile(encode_windows, dynamic=False) if args.compile else encode_windows
    train(model, tokenizer, pool, args.seed, args.out, encode)
    save(model, args.out)


if __name__ == "__main__":
    main()
