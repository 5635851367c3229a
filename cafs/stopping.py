"""To be told to end, by SIGTERM, SIGHUP or Ctrl-C: that is noted, and obeyed where nothing is half done.

A handler runs between any two instructions of the main thread: what it raised could be lost in a destructor or a callback of
fork, or leave a lock held.  So it notes a number, and the interpreter writes a byte (signal.set_wakeup_fd), also where the main
thread is in a read(2) that the signal came before.  `check` raises Ended, `wait` does when it has waited; who comes to neither
within LATE_S is ended by a thread, and leaves what SIGKILL leaves.
"""

from __future__ import annotations

import _thread  # threading would be loaded for this alone
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

LATE_S = 2.0
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """A signal told us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Noted:
    """number: of the signal that has come, 0 for none; is_obeyed: Ended was raised for it, at obeyed_s (monotonic clock)."""

    def __init__(self) -> None:
        self.number = 0
        self.is_obeyed = False
        self.obeyed_s = 0.0
        self.has_alarm = False
        self.reads = self.writes = -1


_noted = _Noted()
_MAIN = _thread.get_ident()


def heed(numbers: Iterable[int] = NUMBERS) -> None:
    """From now on these are noted, those that somebody else has handled or ignored excepted."""
    if _noted.reads < 0:
        os.register_at_fork(after_in_child=_forget)
    _noted.reads, _noted.writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in numbers:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _note)
    signal.set_wakeup_fd(_noted.writes, warn_on_full_buffer=False)
    if os.geteuid():
        _noted.has_alarm = True  # no threads: an ordinary user's commands enter a user namespace, which only a lone thread may
    else:
        _thread.start_new_thread(_end_late, (_noted.reads,))


def _note(number: int, _frame: object) -> None:
    if _noted.is_obeyed and time.monotonic() - _noted.obeyed_s > LATE_S:
        os._exit(128 + number)  # told again, while tidying up takes too long
    _noted.number = number
    if _noted.has_alarm and not _noted.is_obeyed:
        signal.alarm(int(LATE_S))  # SIGALRM ends us


def _forget() -> None:
    """In a child: it ends as any process does, unless it heeds signals itself."""
    for number in NUMBERS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
    if _noted.reads >= 0:
        signal.set_wakeup_fd(-1)
        os.close(_noted.reads)
        os.close(_noted.writes)
    _noted.has_alarm = False
    _noted.number, _noted.is_obeyed, _noted.reads, _noted.writes = 0, False, -1, -1


def _end_late(reads: int) -> None:
    while not _noted.is_obeyed:
        select.select([reads], [], [])
        time.sleep(LATE_S)
        for number in _taken(reads):
            if signal.getsignal(number) is _note and not _noted.is_obeyed:
                os._exit(128 + number)


def _taken(reads: int) -> bytes:
    try:
        return os.read(reads, 4096)
    except BlockingIOError:
        return b""  # it was a signal that somebody else handles


def number() -> int:
    """Of the signal that told us to end, 0 if none has."""
    return _noted.number


def check() -> None:
    """Raises Ended, once and in the main thread, if we were told to."""
    if _noted.number and not _noted.is_obeyed and _thread.get_ident() == _MAIN:
        _noted.is_obeyed, _noted.obeyed_s = True, time.monotonic()
        if _noted.has_alarm:
            signal.alarm(0)
        raise Ended(_noted.number)


def wait(*files: Any, seconds: float | None = None) -> list[Any]:
    """Those of the files, or descriptors, that can be read.  Raises Ended."""
    check()
    known = {one if isinstance(one, int) else one.fileno(): one for one in files}
    poll = select.poll()
    # In the main thread alone: another one would take the byte away that wakes it.
    hears = _thread.get_ident() == _MAIN and _noted.reads >= 0 and not _noted.is_obeyed
    for fd in [*known, *([_noted.reads] if hears else [])]:
        poll.register(fd, select.POLLIN)
    while True:
        ready = poll.poll(None if seconds is None else seconds * 1000)
        check()
        found = [known[fd] for fd, _ in ready if fd in known]
        if len(found) < len(ready):
            _taken(_noted.reads)
        if found or seconds is not None:
            return found


def note(numbers: Iterable[int]) -> int:
    """A descriptor, for a loop, from which the number of each of these that comes can be read, a byte."""
    reads, writes = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writes, False)

    def write(number: int, _frame: object) -> None:
        try:
            os.write(writes, bytes([number]))
        except BlockingIOError:
            pass  # there is plenty to read

    for number in numbers:
        signal.signal(number, write)
    return reads


def on_signals(numbers: Iterable[int], call: Callable[[int], object]) -> None:
    """Call CALL, from a thread, with the number of each of these that comes."""
    reads = note(numbers)

    def run() -> None:
        while data := os.read(reads, 64):
            for number in data:
                call(number)

    _thread.start_new_thread(run, ())
