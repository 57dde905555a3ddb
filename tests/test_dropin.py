"""A small model in the style of a published repository, whose functions `dropin` replaces."""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import clusters
from published_lof import lof as lof_pytorch
from torch import nn

from scclip_fast import dropin

EXACT = dict(rtol=1e-9, atol=1e-9)


def adaptively_aggregate(feats, S):
    shares = S / (S.sum(dim=2, keepdim=True) + 1e-6)
    return torch.matmul(shares, feats.permute(1, 0, 2)).permute(1, 0, 2)


def mean_interpolation(feature_map, top_indices):
    _, _, height, width = feature_map.shape
    listed = {(int(row), int(column)) for row, column in top_indices}
    out = feature_map.clone()
    for row, column in listed:
        around = [
            feature_map[:, :, y, x]
            for y in range(max(row - 1, 0), min(row + 2, height))
            for x in range(max(column - 1, 0), min(column + 2, width))
            if (y, x) not in listed
        ]
        if around:
            out[:, :, row, column] = torch.stack(around).mean(dim=0)
    return out


class Published(nn.Module):
    """A small CLIP tower calibrated in SC-CLIP's style: sequence first, one image, index lists."""

    def __init__(self, width=16, layers=4):
        super().__init__()
        self.embedding = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(nn.MultiheadAttention(width, 2) for _ in range(layers))

    def forward(self, image):
        x = self.embedding(image)
        height, width = x.shape[2:]
        x = torch.cat([self.class_token, x.flatten(2).permute(2, 0, 1)])  # (1 + N, 1, D)
        feats = []
        for block in self.blocks[:-1]:
            x = x + block(x, x, x)[0]
            feats.append(x[1:])
        outliers, _ = lof_pytorch(feats[-1].squeeze(1))
        top = [(i // width, i % width) for i in outliers]

        def repaired(tokens):
            feature_map = tokens.permute(1, 2, 0).reshape(1, -1, height, width)
            return mean_interpolation(feature_map, top).flatten(2).permute(2, 0, 1)

        unit = F.normalize(repaired(feats[1]), dim=-1).permute(1, 0, 2)
        S = unit @ unit.mT
        S = torch.where(S < 0.4, 0, S)
        patches = adaptively_aggregate(repaired(feats[-1]), S)
        patches = self.blocks[-1](patches, patches, patches)[0] + 0.3 * x[:1]
        return adaptively_aggregate(patches, S), outliers


@torch.no_grad()
def test_a_published_model_with_its_functions_replaced(monkeypatch):
    model, image = Published().double(), torch.randn(1, 3, 40, 56).double()
    image[:, :, 8:12, 20:24] *= 9
    expected, outliers = model(image)
    calls = []

    def replaced(name):
        def call(*args):
            calls.append(name)
            return getattr(dropin, name)(*args)

        return call

    for name in ("lof_pytorch", "adaptively_aggregate", "mean_interpolation"):
        monkeypatch.setattr(sys.modules[__name__], name, replaced(name))
    features, found = model(image)
    assert len(calls) == 5 and len(outliers) == 7
    assert torch.equal(found, outliers)
    assert features.shape == (140, 1, 16)
    torch.testing.assert_close(features, expected, **EXACT)


@pytest.mark.parametrize("name", ["lof_pytorch", "detect_outlier_patches"])
@pytest.mark.parametrize("settings", [(), (5,), (12, 0.2)])
def test_lof(name, settings):
    x = clusters(1, 150, 12)[0].double()
    expected_indices, expected = lof_pytorch(x, *settings)
    indices, scores = getattr(dropin, name)(x, *settings)
    assert torch.equal(indices, expected_indices) and len(indices) > 0
    torch.testing.assert_close(scores, expected, **EXACT)
    named = dict(zip(("n_neighbors", "contamination"), settings, strict=False))
    assert torch.equal(getattr(dropin, name)(x, **named)[1], scores)


@pytest.mark.parametrize("name", ["adaptively_aggregate", "adaptive_aggregate"])
@pytest.mark.parametrize("batch", [1, 3])
def test_aggregate(name, batch):
    feats = torch.randn(70, batch, 12).double()
    S = torch.rand(batch, 70, 70).double()  # not symmetric, so that rows differ from columns
    found = getattr(dropin, name)(feats, S)
    torch.testing.assert_close(found, adaptively_aggregate(feats, S), **EXACT)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("listed", ["pairs", "tensors", "tensor"])
def test_mean_interpolation(batch, listed):
    feature_map = torch.randn(batch, 6, 5, 8).double()
    given = feature_map.clone()
    top = [(0, 0), (0, 1), (4, 7), (2, 3), (2, 4), (2, 3)]
    expected = mean_interpolation(feature_map, top)
    if listed == "tensor":
        top = torch.tensor(top)
    elif listed == "tensors":
        top = [(torch.tensor(row), torch.tensor(column)) for row, column in top]
    torch.testing.assert_close(dropin.mean_interpolation(feature_map, top), expected, **EXACT)
    assert torch.equal(feature_map, given)


def test_mean_interpolation_of_nothing_and_of_all():
    feature_map = torch.randn(2, 3, 4, 5)
    assert torch.equal(dropin.mean_interpolation(feature_map, []), feature_map)
    everything = [(row, column) for row in range(4) for column in range(5)]
    assert torch.equal(dropin.mean_interpolation(feature_map, everything), feature_map)


def test_gradients():
    feats = torch.randn(9, 2, 3).double().requires_grad_()
    S = torch.rand(2, 9, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(dropin.adaptively_aggregate, (feats, S))
    feature_map = torch.randn(2, 3, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dropin.mean_interpolation(x, [(0, 1), (2, 3)]), feature_map
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dropin.lof_pytorch([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: dropin.lof_pytorch(torch.randn(40, 1, 8)),
            ValueError,
            r"x must be \(N, D\), the tokens of one image, got shape \(40, 1, 8\)",
        ),
        (
            lambda: dropin.lof_pytorch(torch.randn(30, 8)),
            ValueError,
            "n_neighbors=30 with N=30 tokens",
        ),
        (
            lambda: dropin.adaptively_aggregate(torch.randn(2, 9, 3), torch.rand(2, 9, 9)),
            ValueError,
            r"feats must be \(N, B, D\), sequence first, .*\(2, 9, 3\) and \(2, 9, 9\)",
        ),
        (
            lambda: dropin.adaptively_aggregate(torch.randn(9, 3), torch.rand(9, 9)),
            ValueError,
            r"feats must be \(N, B, D\)",
        ),
        (
            lambda: dropin.mean_interpolation(torch.randn(3, 4, 5), [(0, 0)]),
            ValueError,
            r"feature_map must be \(B, C, H, W\), got shape \(3, 4, 5\)",
        ),
        (
            lambda: dropin.mean_interpolation(torch.randn(1, 3, 4, 5), [(0, 0), (4, 0)]),
            ValueError,
            r"within \(4, 5\), got \(4, 0\)",
        ),
        (
            lambda: dropin.mean_interpolation(torch.randn(1, 3, 4, 5), [(0, -1)]),
            ValueError,
            r"within \(4, 5\), got \(0, -1\)",
        ),
        (
            lambda: dropin.mean_interpolation(torch.randn(1, 3, 4, 5), [(0.0, 1.0)]),
            TypeError,
            "integer",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
