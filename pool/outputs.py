"""What jobs have written: with their end if it is little, else fetched from the agent in pieces into a file.

Only what is here as a whole is forgotten there.
"""

from __future__ import annotations

import base64
import json
import os

from cafs import atomic
from pool import frames
from pool.state import ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pool.controller import Controller
    from pool.state import Job
    from pool.workers import Remote

_PIECE = 1 << 18
_MOST = 80 << 20
"""More no agent keeps of a stream."""

_STREAMS = ("out", "err")


def streams_of(job: Job) -> list[str]:
    """What is fetched of a job, in this order: when the last is here all is."""
    return [*(f"file{number}" for number in range(len(job.spec.get("out", ())))), *_STREAMS]


class Outputs:
    """Those that are being fetched, and questions that agents have not answered."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._asked: dict[int, tuple[Remote, Callable[[bytes, int], None], Callable[[], None]]] = {}
        self._number = 0
        self._fetching: dict[tuple[int, int], Remote] = {}
        os.makedirs(os.path.join(controller.directory, "logs"), mode=0o700, exist_ok=True)

    def path(self, number: int, stream: str) -> str:
        """Of a file that has all of it."""
        return os.path.join(self._controller.directory, "logs", f"{number}.{stream}")

    def ask(
        self,
        remote: Remote,
        number: int,
        attempt: int,
        stream: str,
        offset: int,
        then: Callable[[bytes, int], None],
        lost: Callable[[], None],
    ) -> None:
        """A piece of what a job has written so far, and where the next begins.  lost: called if no answer can come."""
        self._number += 1
        self._asked[self._number] = remote, then, lost
        fields = {"id": number, "attempt": attempt, "stream": stream, "offset": offset, "size": _PIECE}
        self._controller.send(remote, frames.message("read", request=self._number, **fields))

    def answered(self, remote: Remote, request: int, following: int, data: bytes) -> None:
        """By an agent.  Raises ValueError if it was not asked that."""
        asked = self._asked.get(request)
        if asked is None or asked[0] is not remote:
            raise ValueError("an answer to what was not asked")
        del self._asked[request]
        asked[1](data, following)

    def lost(self, remote: Remote) -> None:
        """It answers no more."""
        for request, (other, _, lost) in list(self._asked.items()):
            if other is remote:
                del self._asked[request]
                lost()
        self._fetching = {key: other for key, other in self._fetching.items() if other is not remote}

    def fetch_or_forget(self, remote: Remote, number: int, attempt: int, said: dict[str, Any]) -> None:
        """After an end was recorded, or was refused: what is still to be had of it."""
        controller = self._controller
        known = controller.state.job(number) if controller.state.has_job(number) else None
        is_last = known is not None and (known.attempt, known.worker) == (attempt, remote.name) and known.state in ENDED
        is_here = controller.state.output(number) is not None or os.path.exists(self.path(number, "err"))
        if known is None or not is_last or is_here:
            controller.forget(remote, number, attempt)
        elif "out" in said and "err" in said and not known.spec.get("out"):
            out, err = (base64.b64decode(said[stream], validate=True) for stream in _STREAMS)
            controller.state.keep_output(number, out, err)
            controller.forget(remote, number, attempt)
        elif (number, attempt) not in self._fetching:
            self._fetching[number, attempt] = remote
            self._fetch(remote, number, attempt, streams_of(known), 0, 0)

    def _fetch(self, remote: Remote, number: int, attempt: int, streams: list[str], offset: int, size: int) -> None:
        """streams: that are not here yet; size: how much of the first of them is.  What its agent has left out is noted, so
        that offsets mean the same here and there."""
        stream = streams[0]
        part = self.path(number, stream) + ".part"

        def then(data: bytes, following: int) -> None:
            if data and size < _MOST:
                is_gap = following != offset + len(data)
                if is_gap:
                    self._note_gap(number, stream, offset, following)
                    data = b""
                with open(part, "r+b" if size else "wb") as file:
                    file.seek(size)
                    file.write(data)
                self._fetch(remote, number, attempt, streams, following, size + len(data))
                return
            if not size:
                open(part, "wb").close()
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.rename(part, self.path(number, stream))
            atomic.fsync_directory(os.path.dirname(part))
            if streams[1:]:
                self._fetch(remote, number, attempt, streams[1:], 0, 0)
            else:
                self._fetching.pop((number, attempt), None)
                self._controller.forget(remote, number, attempt)

        self.ask(remote, number, attempt, stream, offset, then, lambda: None)

    def _note_gap(self, number: int, stream: str, start: int, end: int) -> None:
        atomic.replace_file(self.path(number, stream) + ".gap", json.dumps([start, end]).encode(), 0o600)

    def read(self, number: int, stream: str, offset: int, size: int) -> tuple[bytes, int]:
        """(a piece of a file that is here, where the next begins); offsets are the agent's."""
        try:
            start, end = json.loads(atomic.read_file(self.path(number, stream) + ".gap", 100))
        except (OSError, ValueError):
            start = end = 1 << 62
        if start <= offset < end:
            return b"\n[cpool: %d bytes left out]\n" % (end - offset), end
        place = offset if offset < start else offset - (end - start)
        with open(self.path(number, stream), "rb") as file:
            file.seek(place)
            data = file.read(min(size, start - offset) if offset < start else size)
        return data, offset + len(data)
