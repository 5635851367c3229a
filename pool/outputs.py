"""What jobs have written: with their end if it is little, else fetched from the agent in pieces into a file.

Only what is here as a whole is forgotten there; what cannot be had any more is noted in the job's usage, as 'missing'.
"""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass

from cafs import atomic
from cafs.errors import CafsError, IncompleteError, RemoteError
from pool import frames, workers
from pool.state import ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pool.controller import Controller
    from pool.state import Job, State
    from pool.workers import Remote

_PIECE = 1 << 18
_SYNC = 16 << 20
"""So much is made durable at once: of all of a large file that would keep the loop from everything else for too long."""

_AGAIN_S = 5.0
"""When a fetch is gone on with for which there was no room here."""

_STREAMS = ("out", "err")


def streams_of(job: Job) -> list[str]:
    """What is fetched of a job, in this order: when the last is here all is."""
    return [*(f"file{number}" for number in range(len(job.spec.get("out", ())))), *_STREAMS]


def gaps_of(said: dict[str, Any]) -> dict[str, list[int]]:
    """What an agent has left out: [start, end] of each stream that is not whole.  Raises ValueError, TypeError, LookupError."""
    found = {}
    for stream in _STREAMS:
        if stream in said.get("left_out", {}):
            start, end = said["left_out"][stream]
            if type(start) is not int or type(end) is not int or not 0 <= start <= end <= _size(said, stream):
                raise ValueError("a part that is none")
            found[stream] = [start, end]
    return found


def _size(said: dict[str, Any], stream: str) -> int:
    """Of a stream, as an agent says it.  Raises ValueError, TypeError, LookupError."""
    size = said["files"][int(stream[4:])] if stream.startswith("file") else said[f"{stream}_size"]
    if type(size) is not int or not -1 <= size < 1 << 62:
        raise ValueError("a size that is none")
    return max(size, 0)


@dataclass(slots=True)
class _Fetch:
    """Of one attempt at a job.  left: streams that are not here yet, each with its size and what was left out of it.

    offset, kept: how far the first of them is, there and here.  is_earlier: it was not the last attempt.
    problem: why it stands still; again: until when.  is_asking: the next piece is on its way.
    """

    remote: Remote
    number: int
    attempt: int
    left: list[tuple[str, int, tuple[int, int]]]
    offset: int = 0
    kept: int = 0
    is_earlier: bool = False
    problem: str = ""
    again: float = 0.0
    is_asking: bool = False


def _wanted(said: dict[str, Any], streams: Iterable[str]) -> list[tuple[str, int, tuple[int, int]]]:
    """As of _Fetch.left.  Raises ValueError, TypeError, LookupError."""
    gaps = gaps_of(said)
    return [(name, _size(said, name), (*gaps.get(name, (0, 0)),)) for name in streams]


class Outputs:
    """Those that are being fetched, and questions that agents have not answered."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._asked: dict[int, tuple[Remote, Callable[[bytes, int], None], Callable[[], None]]] = {}
        self._number = 0
        self._fetching: dict[tuple[int, int], _Fetch] = {}
        os.makedirs(os.path.join(controller.directory, "logs"), mode=0o700, exist_ok=True)

    def path(self, number: int, stream: str) -> str:
        """Of a file that has all of it."""
        return path_of(self._controller.directory, number, stream)

    def is_fetching(self, remote: Remote) -> bool:
        """Whether what jobs have written is still to come from a worker."""
        return any(one.remote is remote for one in self._fetching.values())

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
        self._fetching = {key: one for key, one in self._fetching.items() if one.remote is not remote}

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
        else:
            self._begin(_Fetch(remote, number, attempt, _wanted(said, streams_of(known))))

    def fetch_earlier(self, remote: Remote, number: int, attempt: int, said: dict[str, Any]) -> None:
        """What an attempt has written that was not the last; no files."""
        self._begin(_Fetch(remote, number, attempt, _wanted(said, _STREAMS), is_earlier=True))

    def _begin(self, fetch: _Fetch) -> None:
        key = fetch.number, fetch.attempt
        if key not in self._fetching:
            self._fetching[key] = fetch
            self._go_on(fetch)

    def _go_on(self, fetch: _Fetch) -> None:
        """Ask for the next piece, or be done."""
        try:
            while fetch.left:
                stream, size, (start, end) = fetch.left[0]
                fetch.offset = end if start <= fetch.offset < end else fetch.offset
                if fetch.offset < size:
                    fetch.is_asking = True
                    then = lambda data, _: self._came(fetch, data)  # noqa: E731
                    return self.ask(fetch.remote, fetch.number, fetch.attempt, stream, fetch.offset, then, lambda: None)
                self._keep(fetch)
        except OSError as error:
            return self._stand_still(fetch, error)
        del self._fetching[fetch.number, fetch.attempt]
        self._controller.forget(fetch.remote, fetch.number, fetch.attempt)

    def _came(self, fetch: _Fetch, data: bytes) -> None:
        """A piece has; none: there is less than its agent has said."""
        fetch.is_asking = False
        stream, size, (start, _) = fetch.left[0]
        data = data[: (start if fetch.offset < start else size) - fetch.offset]
        try:
            if data:
                with open(self._part(fetch), "r+b" if fetch.kept else "wb") as file:
                    file.seek(fetch.kept)
                    file.write(data)
                    file.flush()
                    if (fetch.kept + len(data)) // _SYNC > fetch.kept // _SYNC:
                        os.fdatasync(file.fileno())
        except OSError as error:
            return self._stand_still(fetch, error)
        if not data:
            job = self._controller.state.job(fetch.number)
            missing = f"{size - fetch.offset} bytes of {name_of(job, stream)} are not there any more"
            self._controller.state.change(job, usage={**job.usage, "missing": [*job.usage.get("missing", ()), missing]})
            fetch.offset = size
        fetch.offset, fetch.kept, fetch.problem = fetch.offset + len(data), fetch.kept + len(data), ""
        self._go_on(fetch)

    def _place(self, fetch: _Fetch) -> str:
        attempt = fetch.attempt if fetch.is_earlier else 0
        return path_of(self._controller.directory, fetch.number, fetch.left[0][0], attempt)

    def _part(self, fetch: _Fetch) -> str:
        return self._place(fetch) + ".part"

    def _keep(self, fetch: _Fetch) -> None:
        """The first stream is here.  Raises OSError."""
        part = self._part(fetch)
        with open(part, "ab" if fetch.kept else "wb") as file:
            os.fsync(file.fileno())
        os.rename(part, self._place(fetch))
        atomic.fsync_directory(os.path.dirname(part))
        del fetch.left[0]
        fetch.offset = fetch.kept = 0

    def _stand_still(self, fetch: _Fetch, error: OSError) -> None:
        """There is no room here: that is said to whoever asks, and it is gone on with when there is."""
        fetch.problem = f"cannot keep what job {fetch.number} has written: {error.strerror or error}"
        fetch.again = time.monotonic() + _AGAIN_S

    def mind(self) -> None:
        """Once a second."""
        now = time.monotonic()
        for fetch in [one for one in self._fetching.values() if one.problem and one.again <= now and not one.is_asking]:
            fetch.again = time.monotonic() + _AGAIN_S
            self._go_on(fetch)

    def expect(self, job: Job) -> None:
        """That what an ended job has written, and is not here, still comes.  Raises CafsError if it does not now."""
        fetch = self._fetching.get((job.id, job.attempt))
        if fetch and fetch.problem:
            raise CafsError(fetch.problem, hint="it is fetched when there is room")
        remote = self._controller.remotes.get(job.worker)
        is_gone = remote and remote.has_greeted and fetch is None and (job.id, job.attempt) not in remote.known
        if remote is None or is_gone:
            raise IncompleteError(f"what job {job.id} has written was lost with worker {job.worker}")
        if remote.state == workers.LOST:
            raise RemoteError(f"what job {job.id} has written is on worker {job.worker}, which is lost")


def path_of(directory: str, number: int, stream: str, attempt: int = 0) -> str:
    """Of a file, in a pool's directory, that has all that a job has written.  attempt: an earlier one, 0 for the last."""
    return os.path.join(directory, "logs", f"{number}.{attempt}.{stream}" if attempt else f"{number}.{stream}")


def stored(known: State, job: Job, stream: str, offset: int, attempt: int = 0) -> tuple[bytes, int] | None:
    """(a piece of what is on this disk of an ended job, where the next begins, as its agent counts); None if it is not here."""
    kept = known.output(job.id) if stream in _STREAMS and not attempt else None
    if kept is not None:
        data = kept[stream == "err"][offset : offset + _PIECE]
        return data, offset + len(data)
    start, end = job.usage.get("left_out", {}).get(stream, (1 << 62, 1 << 62)) if not attempt else (1 << 62, 1 << 62)
    try:
        with open(path_of(known.directory, job.id, stream, attempt), "rb") as file:
            if start <= offset < end:
                return b"", end
            file.seek(offset if offset < start else offset - (end - start))
            data = file.read(min(_PIECE, start - offset) if offset < start else _PIECE)
            return data, offset + len(data)
    except FileNotFoundError:
        return None


def name_of(job: Job, stream: str) -> str:
    """In words."""
    words = {"out": "its standard output", "err": "its standard error"}
    return words.get(stream) or repr(job.spec["out"][int(stream[4:])])
