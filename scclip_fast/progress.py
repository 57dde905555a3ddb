"""A progress bar for what takes long on the torch path, for a caller that wants one.

    with progress.shown_by(tqdm):
        scclip_fast.lof(features)  # a bar of the tiles of columns that are searched

The ops themselves show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Bar = Callable[[list], Iterable]

_bar: ContextVar[Bar] = ContextVar("bar", default=iter)


@contextmanager
def shown_by(bar: Bar) -> Iterator[None]:
    """Inside, `bar` wraps the list of steps of each search, as tqdm wraps what it counts."""
    token = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(token)


def steps(todo: Iterable[T]) -> Iterable[T]:
    """The same, watched by the bar of the context."""
    return _bar.get()(list(todo))
