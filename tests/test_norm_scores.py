"""The norm rule, and artefacts that LOF takes for a cluster and the norm rule finds."""

import numpy as np
import pytest
import torch
from cases import DEVICES, DTYPES
from tolerance import relative_error

import scclip_fast as sf
from scclip_fast.calibration import SCORES, find_outliers


def numpy_scores(x):
    norms = np.linalg.norm(x.double().numpy(), axis=-1)
    return torch.from_numpy(norms / np.median(norms, axis=-1, keepdims=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 2, 1), (3, 31, 64), (2, 196, 257)])
def test_equals_numpy(device, dtype, shape):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    scores = sf.norm_scores(x.to(device))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.shape == shape[:2]
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative_error(scores, numpy_scores(x)) < tolerance
    alone = torch.stack([sf.norm_scores(image.to(device)) for image in x])
    assert torch.equal(alone, scores)
    strided = x.to(device).mT.contiguous().mT
    assert relative_error(sf.norm_scores(strided), numpy_scores(x)) < tolerance


def test_tokens_that_are_not_finite():
    x = torch.randn(2, 40, 8)
    expected = sf.norm_scores(x[:, 3:])
    x[:, 0, 0], x[:, 1, 3], x[:, 2] = torch.nan, torch.inf, -torch.inf
    scores = sf.norm_scores(x)
    assert scores[:, :3].isnan().all() and torch.equal(scores[:, 3:], expected)
    with pytest.raises(ValueError, match=r"6 token.* first is token 0 of image 0"):
        sf.norm_scores(x, check_finite=True)
    assert sf.norm_scores(torch.full((5, 2), torch.nan)).isnan().all()


def test_zero_median():
    """If the median norm is 0, the norms are the scores, so that large norms differ."""
    x = torch.zeros(41, 4)
    assert torch.equal(sf.norm_scores(x), torch.zeros(41))
    x[:3, 0] = torch.tensor([2.0, 3.0, 1e30])
    assert sf.norm_scores(x).tolist() == pytest.approx([2, 3, 1e30] + [0] * 38)
    assert sf.outlier_mask(sf.norm_scores(x), 0.05).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_out_of_range(scale):
    """Squares of 1e-30 and 1e30 are 0 and infinity in float32."""
    x = torch.randn(50, 16)
    assert torch.allclose(sf.norm_scores(x * scale), sf.norm_scores(x), rtol=1e-5)


def test_norms_beyond_every_finite_number():
    x = torch.full((50, 16), torch.finfo(torch.float32).max)
    x[3] /= 16
    scores = sf.norm_scores(x)
    assert scores[3] == 0.25 and torch.equal(scores[4:], torch.ones(46))


@pytest.mark.parametrize("largest", [1e25, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("others", [1e-10, 1.0])
def test_the_largest_token_is_an_outlier(largest, others):
    """A norm or score that exceeds every finite number is replaced by the largest one."""
    x = others * torch.randn(50, 16)
    x[7] = largest
    scores = sf.norm_scores(x)
    assert scores.isfinite().all() and scores.argmax() == 7
    assert sf.outlier_mask(scores, 0.02).nonzero().flatten().tolist() == [7]


def test_no_gradient_and_empty_batch():
    x = torch.randn(40, 4, requires_grad=True)
    assert not sf.norm_scores(x).requires_grad
    assert sf.norm_scores(torch.empty(0, 9, 4)).shape == (0, 9)


def with_artefacts(count):
    """37 x 37 smooth tokens, and the mask of `count` artefacts of 5 times the norm, all alike."""
    side, width = 37, 64
    x = torch.linspace(0, 1, side)
    waves = torch.stack([f(a * x) for a in (2, 3, 5) for f in (torch.sin, torch.cos)])
    field = torch.einsum("ay,bx,abd->yxd", waves, waves, torch.randn(6, 6, width))
    tokens = field.flatten(0, 1) + 0.02 * torch.randn(side * side, width)
    where = torch.randperm(side * side)[:count]
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    norm = 5 * tokens.norm(dim=-1).median()
    tokens[where] = norm * direction + 0.02 * torch.randn(count, width)
    mask = torch.zeros(side * side, dtype=torch.bool)
    mask[where] = True
    return tokens, mask


@pytest.mark.parametrize("count", [30, 31, 60])
def test_alike_artefacts(count):
    """LOF with k = 30 finds 30 artefacts, but none of 31, whose neighbours are each other."""
    tokens, artefacts = with_artefacts(count)
    recall = {}
    for score in SCORES:
        found = find_outliers(tokens[None], 30, 0.05, score)
        recall[score] = found.mask[0][artefacts].double().mean().item()
        assert found.mask.sum() in ((69,) if score != "either" else range(69, 139))
    assert recall == {"lof": float(count <= 30), "norm": 1.0, "either": 1.0}
    scores = sf.norm_scores(tokens)
    assert scores[artefacts].min() > 4 and scores[~artefacts].max() < 4


@pytest.mark.parametrize("score", SCORES)
def test_find_outliers(score):
    x = torch.randn(2, 50, 6) * torch.rand(2, 50, 1)
    lof, norm = sf.lof_scores(x, 5), sf.norm_scores(x)
    masks = {"lof": sf.outlier_mask(lof, 0.1), "norm": sf.outlier_mask(norm, 0.1)}
    masks["either"] = masks["lof"] | masks["norm"]
    assert not torch.equal(masks["lof"], masks["norm"])
    scores, mask = find_outliers(x, 5, 0.1, score)
    assert torch.equal(scores, norm if score == "norm" else lof)
    assert torch.equal(mask, masks[score])
    assert find_outliers(x, 50, 0.1, score) is None
