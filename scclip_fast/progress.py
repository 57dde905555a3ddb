"""A progress bar for long searches on the torch path, for a caller that wants one.

    with progress.shown_by(tqdm):
        scclip_fast.lof(features)  # a bar that counts the tiles of columns of each search

The ops themselves show nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .chunked.tiles import Steps, each_tile


@contextmanager
def shown_by(bar: Steps) -> Iterator[None]:
    """Wraps the list of steps of each search in `bar`, such as tqdm, inside the `with` block."""
    token = each_tile.set(bar)
    try:
        yield
    finally:
        each_tile.reset(token)
