"""Files that are read and written in threads while a model works.

Pillow decodes and encodes without holding Python's lock, so that threads use several cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    read: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yields each item with the future of read(item), in order.

    Args:
        read: runs in threads. What it raises, `Future.result` raises.
        items: the arguments of `read`.
        count: the most results that wait in memory, besides the one that is yielded.
    """
    with ThreadPoolExecutor(thread_name_prefix="read") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                if len(waiting) > count:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:  # the caller has stopped early
            for _, future in waiting:
                future.cancel()


def batches(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Yields lists of `count` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, count)):
        yield batch


class Behind:
    """A context whose `call` runs functions in threads. Its end waits for them.

    Args:
        count: the most calls that wait in memory. With more, `call` waits.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._waiting: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(thread_name_prefix="write")

    def call(self, function: Callable, *args: object) -> None:
        """Runs function(*args) in a thread, and raises what an earlier call raised."""
        while self._waiting and (len(self._waiting) >= self._count or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *args))

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._pool.shutdown()
        if kind is None:
            while self._waiting:
                self._waiting.popleft().result()
