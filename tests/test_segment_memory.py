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
NAMES = 151
#: By case: the size of the photo, the settings, and the peak in bytes.
CASES = {
    # All maps at once are 1.8 GB. The bound is an eighth of the 1 GiB that 24 million pixels may
    # take, plus a batch of windows.
    "windows of the photo": ((1500, 2000), dict(short_side=None), (128 + 64) * MIB),
    "24 million pixels": ((4000, 6000), {}, 1024 * MIB),  # all maps at once are 14.5 GB
}


def peaks():
    """Yields each case and its peak in bytes, or None if the system does not report it."""
    # A window has 14 x 14 patches, as in ViT-B/16, but the model is small.
    encoder = SCCLIP(tiny_clip(layers=2, patch_size=16, image_size=224), method="clip")
    names = [f"name {index}" for index in range(NAMES)]
    for case, (size, settings, _) in CASES.items():
        segmenter = Segmenter(encoder, tokenizer(), names, templates=["{}"], **settings)
        segmenter(torch.zeros(300, 300, 3, dtype=torch.uint8))
        photo = torch.randint(256, (size[0] // 100, size[1] // 100, 3), dtype=torch.uint8)
        photo = photo.repeat_interleave(100, 0).repeat_interleave(100, 1)
        done = measure(lambda segmenter=segmenter, photo=photo: segmenter(photo))
        assert done.result.shape == size and len(done.result.unique()) > 1
        yield case, done.peak_bytes


@pytest.fixture(scope="module")
def measured():
    return output_of(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_large_photos_with_many_names(case, measured):
    if measured[case] is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert measured[case] <= CASES[case][2], f"{measured[case] / MIB:.0f} MiB"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(peaks())))
