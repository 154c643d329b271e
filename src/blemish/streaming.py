"""Doing something to a stream of items, ahead of the consumer or many at once, in order and with bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
"""That decode, or write: codecs leave Python's lock to others, and one thread would starve a fast GPU."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    cost: Callable[[Item], float],
    budget: float,
    workers: int = THREADS,
    most: int = 64,
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by threads ahead of the consumer.

    At most `most` items, and items of a total `cost` of at most `budget` (or a single one), are under way. An
    exception of `function`, or of `items`, is raised at its turn.
    """
    waiting: deque[tuple[float, Future[Result]]] = deque()
    under_way = 0.0
    failure: Exception | None = None
    iterator = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                try:
                    item = next(iterator)
                    price = cost(item)
                except StopIteration:
                    break
                except Exception as error:  # its turn comes after what is waiting
                    failure = error
                    break
                while waiting and (under_way + price > budget or len(waiting) >= most):
                    paid, future = waiting.popleft()
                    under_way -= paid
                    yield future.result()
                waiting.append((price, pool.submit(function, item)))
                under_way += price
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
    if failure is not None:
        raise failure


def grouped(items: Iterable[Item], full: Callable[[Sequence[Item], Item], bool]) -> Iterator[list[Item]]:
    """Neighbours in lists; `full` tells of the list so far, never empty, whether the next item must begin another."""
    waiting: list[Item] = []
    for item in items:
        if waiting and full(waiting, item):
            yield waiting
            waiting = []
        waiting.append(item)
    if waiting:
        yield waiting
