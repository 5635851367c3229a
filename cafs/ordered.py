"""Run tasks on threads and take the results in the order of the tasks, with a bounded number in flight."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from cafs import stopping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    threads: int,
    *,
    window: int,
    drop: Callable[[Task], None] = lambda task: None,
    is_light: Callable[[Task], bool] = lambda task: False,
) -> Iterator[Result]:
    """Yield function(task) in order; at most WINDOW tasks are taken ahead.

    drop: if the consumer stops or anything fails, is given each task that did not start.
    is_light: whether to do a task at once, on this thread.
    """
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                stopping.check()
                if is_light(task):
                    future: Future[Result] = Future()
                    future.set_result(function(task))
                else:
                    future = pool.submit(function, task)
                waiting.append((task, future))
                if len(waiting) >= window:
                    yield waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                stopping.check()
                yield waiting[0][1].result()
                waiting.popleft()
        finally:
            for task, future in waiting:
                if future.cancel():
                    drop(task)
