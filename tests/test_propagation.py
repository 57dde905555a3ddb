"""LPOSS: its graph and its solution against dense linear algebra, and its segmenter.

Mutations, with the test that each made fail: A without its transpose, no weight by distance, the
step of another column (`test_equals_dense_linear_algebra`); windows propagated one by one
(`test_windows_are_propagated_together`).
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import photo, tiny_clip, tokenizer
from tiny_proxy import tiny_proxy

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter, propagation
from scclip_fast.segment import cosines as segment_cosines
from scclip_fast.segment.propagation import propagate


def dense(scores, tokens, places, k, steps=None):
    """The paper's equations with matrices of all patches; `steps` of None solves exactly."""
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(tokens, dim=-1).T
    nearest = cosines.topk(k, dim=-1).indices  # the patch itself is among them
    kept = torch.zeros_like(cosines).scatter(1, nearest, 1)
    near = torch.exp(-0.01 * torch.cdist(places, places))
    affinity = kept * cosines.clamp(min=0) ** 3 * near
    affinity = affinity + affinity.T
    affinity.fill_diagonal_(0)
    degree = affinity.sum(dim=1)
    degree[degree == 0] = 1
    graph = affinity / (degree[:, None] * degree).sqrt()
    system = torch.eye(len(tokens), dtype=tokens.dtype) - 0.95 * graph
    return torch.linalg.solve(system, 0.05 * scores)


@pytest.mark.parametrize("n", [2, 40, 500])
def test_equals_dense_linear_algebra(n, monkeypatch):
    monkeypatch.setattr(propagation, "STEPS", 200)
    scores, tokens = torch.randn(n, 7), torch.randn(n, 5)
    scores[:, 3] = 0  # a column that has no residual to begin with
    places = 300 * torch.rand(n, 2)
    expected = dense(scores.double(), tokens.double(), places.double(), min(400, n))
    found = propagate(scores, tokens, places)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    monkeypatch.undo()
    rough = propagate(scores, tokens, places)  # ten steps, as published
    assert (rough - expected).abs().max() < 0.2 * expected.abs().max()


def test_a_patch_without_neighbours():
    tokens = torch.eye(4)  # at right angles: no patch is like another
    scores = torch.randn(4, 3)
    torch.testing.assert_close(propagate(scores, tokens, torch.zeros(4, 2)), 0.05 * scores)
    assert torch.equal(propagate(scores[:1], tokens[:1], torch.zeros(1, 2)), scores[:1])


@pytest.fixture(scope="module")
def encoder():
    return SCCLIP(tiny_clip(layers=3), method="lposs", proxy=tiny_proxy("dinov2"))


NAMES = ["sky", "tree", "person, man"]


def segmenter(encoder, **settings):
    return Segmenter(encoder, tokenizer(), NAMES, templates=["{}"], **settings)


def test_windows_are_propagated_together(encoder, monkeypatch):
    """The patches of all windows of an image are one graph, by their places in the image."""
    calls = []

    def propagate_windows(*arguments):
        calls.append((*arguments, propagation.propagate_windows(*arguments)))
        return calls[-1][-1]

    monkeypatch.setattr(segment_cosines, "propagate_windows", propagate_windows)
    monkeypatch.setattr(propagation, "STEPS", 200)
    segmenter(encoder, short_side=48, slide_crop=36, slide_stride=18)(photo(50, 70))
    ((maps, tokens, windows, size, found),) = calls
    assert size == (48, 67)
    assert len(maps) == len(windows) > 2 and maps[0].shape == (4, 6, 6)
    middle = 6 * torch.arange(6) + 3.0
    places = [torch.cartesian_prod(r.start + middle, c.start + middle) for r, c in windows]
    groups = [[each.flatten(1).mT for each in group] for group in (maps, tokens)] + [places]
    expected = dense(*(torch.cat(group).double() for group in groups), k=36 * len(maps))
    for window, each in zip(found, expected.split(36), strict=True):
        torch.testing.assert_close(window.flatten(1).mT.double(), each, rtol=0, atol=1e-4)


@pytest.mark.parametrize("crop", [36, None])
def test_images_of_a_list_are_apart(encoder, crop):
    images = [photo(50, 70), photo(60, 40)]
    made = segmenter(encoder, short_side=48, slide_crop=crop, slide_stride=18)
    together = made(images)
    assert [labels.shape for labels in together] == [(50, 70), (60, 40)]
    assert all(
        torch.equal(labels, made(image)) for labels, image in zip(together, images, strict=True)
    )


def test_a_window_larger_than_the_image():
    """The patches of a window of 60 pixels on an image of 36 x 48 divide the image alone."""
    places = propagation._middles(slice(0, 60), 36, 6), propagation._middles(slice(0, 60), 48, 8)
    assert places[0].tolist() == [3, 9, 15, 21, 27, 33] and places[1][-1] == 45
    maps, tokens = torch.rand(3, 6, 8), torch.rand(5, 6, 8)
    (found,) = propagation.propagate_windows(
        [maps], [tokens], [(slice(0, 60), slice(0, 60))], (36, 48)
    )
    grid = torch.cartesian_prod(*places)
    expected = propagate(maps.flatten(1).mT, tokens.flatten(1).mT, grid)
    torch.testing.assert_close(found.flatten(1).mT, expected)
