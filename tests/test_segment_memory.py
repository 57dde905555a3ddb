"""The memory beside the model that a large photo with many names takes.

`python tests/test_segment_memory.py` measures it, in a process of its own.
"""

import json
import sys
from functools import partial

import pytest
import torch
from measure import measure
from own_process import output_of
from sam3_packages import Package
from tiny_clip import tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

MIB = 2**20
NAMES = 151
#: The peak in bytes by case, for photos of the sizes of `peaks`.
MOST = {
    # All maps at once are 1.8 GB. The bound is an eighth of the 1 GiB that 24 million pixels may
    # take, plus a batch of windows.
    "windows of 3 million pixels": (128 + 64) * MIB,
    "24 million pixels": 1024 * MIB,  # all maps at once are 14.5 GB
    "24 million pixels, SAM3": 1024 * MIB,
}


def peaks():
    """Yields each case and its peak in bytes, or None if the system does not report it."""
    names = [f"name {index}" for index in range(NAMES)]
    # A window has 14 x 14 patches, as in ViT-B/16, but the model is small.
    encoder = SCCLIP(tiny_clip(layers=2, patch_size=16, image_size=224), method="clip")
    clip = partial(Segmenter, encoder, tokenizer(), names, templates=["{}"])
    yield "windows of 3 million pixels", peak(clip(short_side=None), (1500, 2000))
    yield "24 million pixels", peak(clip(), (4000, 6000))
    letters = [first + second for first in "abcdefghijklm" for second in "abcdefghijkl"]
    sam3 = Package("transformers").segmenter(letters[:NAMES], prob_thd=0.0)
    yield "24 million pixels, SAM3", peak(sam3, (4000, 6000))


def peak(segmenter, size):
    """Returns the peak in bytes of a call with a photo (H, W)."""
    segmenter(torch.zeros(300, 300, 3, dtype=torch.uint8))
    photo = torch.randint(256, (size[0] // 100, size[1] // 100, 3), dtype=torch.uint8)
    photo = photo.repeat_interleave(100, 0).repeat_interleave(100, 1)
    done = measure(lambda: segmenter(photo))
    assert done.result.shape == size and len(done.result.unique()) > 1
    return done.peak_bytes


@pytest.fixture(scope="module")
def measured():
    return output_of(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", MOST)
def test_large_photos_with_many_names(case, measured):
    if measured[case] is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert measured[case] <= MOST[case], f"{measured[case] / MIB:.0f} MiB"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(peaks())))
