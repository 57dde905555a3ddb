"""The methods beside SC-CLIP equal their literal forms, on squares, rectangles and batches.

Mutations, with the test that each made fail: a bias of 1 for the class token, twice the variance
(`test_naclip`); middle attention without the class token, one block's input for another's, another
share, the sum of the middle blocks for their mean (`test_resclip`).
"""

import published_clip
import published_methods
import pytest
import torch
from tiny_clip import images, tiny_clip

from scclip_fast.clip import SCCLIP, methods

EXACT = 1e-9
SIZES = [(32, 32), (24, 56)]
BATCHES = (1, 3)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def expected(encoder, image, method, *args):
    """Features (h, w, E) of an image (3, H, W) by a function of `published_methods`."""
    visual = encoder.model.visual
    layers, grid = published_clip.layer_outputs(visual, image)
    projected = visual.ln_post(method(visual, layers, grid, *args)) @ visual.proj
    return (projected / projected.norm(dim=1, keepdim=True)).reshape(*grid, -1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("chunk", [2**26, 1])
def test_naclip(size, batch, chunk, monkeypatch):
    monkeypatch.setattr(methods, "OMEGA_BYTES", chunk)
    encoder = SCCLIP(tiny_clip(layers=3).double(), method="naclip")
    x = images(batch, *size).double()
    for dense, image in zip(encoder(x), x, strict=True):
        ref = expected(encoder, image, published_methods.naclip)
        torch.testing.assert_close(dense, ref, rtol=0, atol=EXACT)


@pytest.mark.parametrize("layers, middle", [(12, [5, 6, 7, 8]), (4, [1, 2]), (2, [1])])
def test_resclip(layers, middle):
    encoder = SCCLIP(tiny_clip(layers=layers).double(), method="resclip")
    for size, batch in zip(SIZES, BATCHES, strict=True):
        x = images(batch, *size).double()
        for dense, image in zip(encoder(x), x, strict=True):
            ref = expected(encoder, image, published_methods.resclip, middle)
            torch.testing.assert_close(dense, ref, rtol=0, atol=EXACT)
