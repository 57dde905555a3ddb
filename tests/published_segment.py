"""The published rules of segmentation, written out for one window, name and class at a time."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from tiny_clip import tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(image):
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((image.float() / 255 - mean) / std).permute(2, 0, 1)[None]


def text_features(encoder, names, templates):
    return open_clip.build_zero_shot_classifier(encoder.model, tokenizer(), names, templates).T


@torch.no_grad()
def cosines(encoder, text, pixels):
    """Returns the cosines (names, H, W) of pixels (1, 3, H, W), upsampled to their size."""
    patches = (encoder(pixels) @ text.T).permute(0, 3, 1, 2)
    return F.interpolate(patches, pixels.shape[2:], mode="bilinear")[0]


def windows(size, crop, stride):
    """Returns (top, bottom, left, right) of each window, in the order of the published loop."""
    steps = [max(side - crop + stride - 1, 0) // stride + 1 for side in size]
    ends = [
        [min(step * stride + crop, side) for step in range(count)]
        for side, count in zip(size, steps, strict=True)
    ]
    return [(max(y - crop, 0), y, max(x - crop, 0), x) for y in ends[0] for x in ends[1]]


def maps(encoder, text, pixels, crop, stride):
    """Returns the mean over windows, which are encoded one at a time."""
    total = torch.zeros(len(text), *pixels.shape[2:], dtype=text.dtype)
    count = torch.zeros(pixels.shape[2:])
    for top, bottom, left, right in windows(pixels.shape[2:], crop, stride):
        window = pixels[:, :, top:bottom, left:right]
        total[:, top:bottom, left:right] += cosines(encoder, text, window)
        count[top:bottom, left:right] += 1
    return total / count


def probabilities(cosines, owners, scale=40.0):
    """Returns (classes, H, W): a softmax over names, then the best name of each class."""
    softmax = (scale * cosines).softmax(dim=0)
    best = [
        torch.stack([softmax[i] for i, owner in enumerate(owners) if owner == c]).amax(dim=0)
        for c in range(max(owners) + 1)
    ]
    return torch.stack(best)
