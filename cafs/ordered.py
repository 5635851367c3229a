"""Run tasks on threads and take the results in the order of the tasks, with a bounded number in flight."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], threads: int, window: int, drop: Callable[[Task], None]
) -> Iterator[Result]:
    """Yield function(task) in order; at most WINDOW tasks are taken ahead.

    If the consumer stops or anything fails, tasks that did not start are given to DROP, once each.
    """
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(function, task)))
                if len(waiting) >= window:
                    yield waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        finally:
            for task, future in waiting:
                if future.cancel():
                    drop(task)
