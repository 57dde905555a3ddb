"""The memory beside the model that a large photo with many names takes.

`python tests/test_segment_memory.py` measures it, in a process of its own.
"""

import json
import sys

import pytest
import torch
from measure import measure
from own_process import output_of
from tiny_clip import tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

MIB = 2**20
SIZE, NAMES = (1500, 2000), 151  # all maps at once are 1.8 GB
# An eighth of the 1 GiB that 24 million pixels may take, plus a batch of windows.
MOST = 128 * MIB + 64 * MIB


def peak():
    """Returns the peak in bytes; None if the system does not report it."""
    # A window has 14 x 14 patches, as in ViT-B/16, but the model is small.
    encoder = SCCLIP(tiny_clip(layers=2, patch_size=16, image_size=224), method="clip")
    names = [f"name {index}" for index in range(NAMES)]
    segmenter = Segmenter(encoder, tokenizer(), names, templates=["{}"], short_side=None)
    segmenter(torch.zeros(300, 300, 3, dtype=torch.uint8))
    photo = torch.randint(256, (15, 20, 3), dtype=torch.uint8)
    photo = photo.repeat_interleave(100, 0).repeat_interleave(100, 1)
    done = measure(lambda: segmenter(photo))
    assert done.result.shape == SIZE and len(done.result.unique()) > 1
    return done.peak_bytes


@pytest.mark.slow
def test_windows_of_a_large_photo_with_many_names():
    peak_bytes = output_of(__file__)["peak"]
    if peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert peak_bytes <= MOST, f"{peak_bytes / MIB:.0f} MiB"


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"peak": peak()}))
