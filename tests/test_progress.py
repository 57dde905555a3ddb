"""The bar that a caller shows during a long search."""

from itertools import combinations_with_replacement

import pytest
import torch

import scclip_fast as sf
from scclip_fast import chunked, progress
from scclip_fast.chunked import tiles


def test_a_bar_sees_every_step_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", 2**16)
    x, seen = torch.randn(2, 100, 8), []
    expected = sf.lof_scores(x, 5, backend="torch")

    def bar(steps):
        for step in steps:
            yield step
            seen.append(step)

    with progress.shown_by(bar):
        scores = sf.lof_scores(x, 5, backend="torch")
    assert torch.equal(scores, expected)
    parts = slice(0, 50), slice(50, 100)
    assert seen == 2 * [*combinations_with_replacement(parts, 2)]


def test_a_bar_of_tiles_of_columns(monkeypatch):
    monkeypatch.setattr(tiles, "MAX_COLUMNS", 32)
    x, queries, seen = torch.randn(2, 100, 8), torch.randn(2, 9, 8), []
    with progress.shown_by(lambda steps: seen.extend(steps) or steps):
        chunked.nearest(x, 5, queries)
    assert seen == [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 100)]


def test_the_bar_ends_with_the_context():
    def bar(steps):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), progress.shown_by(bar):
        sf.knn(torch.randn(10, 4), 3, backend="torch")
    sf.knn(torch.randn(10, 4), 3, backend="torch")
