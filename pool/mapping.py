"""cpool map: a job for each line of standard input: results as they come or in order, a job log, going on after a break.

The forms of {}, the exit code and the columns of the job log are GNU parallel's.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from dataclasses import dataclass, field

from cafs import atomic, stopping
from cafs.errors import DIFFERS, CafsError, IncompleteError, RemoteError, UsageError
from pool import results
from pool.arguments import Arguments, expand
from pool.client import NoController, incomplete, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, BinaryIO

    from pool.client import Client

AHEAD = 500
"""How many jobs are with the controller at once."""

_BATCH = 50
_STREAMS = ("out", "err")
_FILES_MAX = 2 << 20
"""Of the files of jobs that are submitted together, where it is enough."""

_HEAD = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"
_FAILED_MAX = 100
_SAID_S, _SAID_TERMINAL_S = 5.0, 0.2


@dataclass(slots=True)
class Options:
    """template: words of the command.  spec: what all jobs have.  eta: say how long it will take.

    files: (more of a job's spec, contents as of inputs.keep) for its arguments and number.  bring: gets the files that an ended
    job has left; how many are not there.
    """

    template: list[str]
    spec: dict[str, Any]
    priority: int = 0
    files: Callable[[list[str], int], tuple[dict[str, Any], dict[str, str]]] | None = None
    bring: Callable[[Client, dict[str, Any]], int] | None = None
    keep_order: bool = False
    tag: bool = False
    halt: int = 0
    joblog: str = ""
    resume: bool = False
    resume_failed: bool = False
    results: str = ""
    eta: bool = False
    done: set[int] = field(default_factory=set)


def already_done(path: str, *, failed_too: bool) -> set[int]:
    """The numbers in a job log.  failed_too: also of those that failed."""
    found: set[int] = set()
    try:
        text = atomic.read_file(path, 1 << 30).decode(errors="replace")
    except FileNotFoundError:
        return found
    for line in text.splitlines()[1:]:
        columns = line.split("\t")
        if len(columns) == 9 and columns[0].isdigit() and (failed_too or columns[6] == columns[7] == "0"):
            found.add(int(columns[0]))
    return found


def _tagged(data: bytes, tag: bytes, *, is_new: bool) -> bytes:
    """With the tag before each line that begins in it.  is_new: one begins with it."""
    body, end = (data[:-1], b"\n") if data.endswith(b"\n") else (data, b"")
    return (tag if is_new and data else b"") + body.replace(b"\n", b"\n" + tag) + end


def _raise_if_alone(error: CafsError) -> None:
    """A worker that is lost is one job's trouble, a controller that has ended that of all."""
    if isinstance(error, NoController):
        raise error


class Eta:
    """How long it will take, on standard error: in one line on a terminal, else in a line every few seconds."""

    def __init__(self, many: int) -> None:
        self._left, self._done = many, 0
        self._began = self._said = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def one_less(self) -> None:
        """There was nothing to be done for one."""
        self._left -= 1

    def one_done(self) -> None:
        """Says how many are left, and for how long by what it has taken so far."""
        self._left, self._done, now = self._left - 1, self._done + 1, time.monotonic()
        if self._left and now - self._said < (_SAID_TERMINAL_S if self._is_terminal else _SAID_S):
            return
        self._said = now
        each = (now - self._began) / self._done
        end = "\r" if self._is_terminal and self._left else "\n"
        sys.stderr.write(f"ETA: {each * self._left:.0f}s Left: {self._left} AVG: {each:.2f}s{end}")
        sys.stderr.flush()


class Map:
    """One run of cpool map; `run` returns its exit code."""

    def __init__(self, client: Client, options: Options) -> None:
        self._client = client
        self._options = options
        self._numbers: dict[int, tuple[int, list[str], list[str]]] = {}  # id -> number, arguments, command
        self._ready: dict[int, Callable[[], None]] = {}
        """What prints what each has written, by number."""
        self._rows: dict[int, bytes] = {}
        self._next = 1
        self._failed = 0
        self._has_halted = False
        self._lacking: dict[str, None] = {}
        """What is not there of what jobs have written, as it was said."""
        self._log: BinaryIO | None = None
        self._eta: Eta | None = None
        self._coming: Arguments | None = None
        """Where arguments come from, if they have to be waited for."""

    def run(self, arguments: Iterable[list[str]]) -> int:
        """Run a job for each group of arguments and print what it has written; return the exit code.  Raises CafsError."""
        options = self._options
        if options.joblog:
            if (options.resume or options.resume_failed) and os.path.exists(options.joblog):
                options.done = already_done(options.joblog, failed_too=not options.resume_failed)
            self._log = open(options.joblog, "ab", buffering=0)
            if not self._log.tell():
                self._log.write(_HEAD.encode())
        elif options.resume or options.resume_failed:
            raise UsageError("--resume needs --joblog FILE")
        if options.eta:
            arguments = list(arguments)
            self._eta = Eta(len(arguments))
        groups = enumerate(arguments, 1)
        self._coming = arguments if isinstance(arguments, Arguments) else None
        try:
            self._go_on(groups)
        except BaseException:
            self._leave()
            raise
        return min(self._failed, _FAILED_MAX + 1) or (DIFFERS if self._lacking else 0)

    def _go_on(self, groups: Iterator[tuple[int, list[str]]]) -> None:
        is_over = False
        while not is_over or self._numbers:
            while self._may_submit(is_over) and (self._is_at_hand() or not self._numbers):
                is_over = not self._submit(groups)
                self._hear()
            if self._has_to_halt() and not self._has_halted:
                is_over = self._has_halted = True
                self._client.ask("cancel", ids=list(self._numbers), grace_s=10)
            if self._coming and self._may_submit(is_over):
                stopping.wait(self._coming.source, self._client)  # whichever comes first: an argument, or an end
                self._hear()
            elif self._numbers and (found := self._client.event()):
                self._finished(found)

    def _may_submit(self, is_over: bool) -> bool:
        return not is_over and len(self._numbers) < AHEAD and not self._has_to_halt()

    def _is_at_hand(self) -> bool:
        return self._coming is None or self._coming.is_at_hand()

    def _hear(self) -> None:
        """What has ended meanwhile."""
        while found := self._client.event(wait=False):
            self._finished(found)

    def _leave(self) -> None:
        """Before all has ended: what has not begun goes with our connection, what runs goes on, and that is said."""
        try:
            open_ones = self._client.ask("jobs", all=False, limit=10 * AHEAD)["jobs"] if self._numbers else []
        except CafsError:
            return  # there is no controller any more
        running = [
            str(one["id"]) for one in open_ones if one["id"] in self._numbers and one["state"] in ("starting", "running")
        ]
        if running:
            sys.stderr.write(f"cpool: jobs that go on, until cpool cancel {' '.join(running)}\n")

    def _has_to_halt(self) -> bool:
        return bool(self._options.halt) and self._failed >= self._options.halt

    def _submit(self, groups: Iterator[tuple[int, list[str]]]) -> bool:
        """Some more; False if there are none."""
        options = self._options
        batch, specs = [], []
        contents: dict[str, str] = {}
        for number, arguments in groups:
            if number in options.done:
                self._ready[number] = lambda: None
                self._print(number)
                self._eta.one_less() if self._eta else None
                continue
            command = expand(options.template, arguments, number)
            more, files = options.files(arguments, number) if options.files else ({}, {})
            batch.append((number, arguments, command))
            spec = {**options.spec, **more, "command": command, "index": number, "attended": True}
            specs.append({"spec": spec, "priority": options.priority})
            contents |= files
            if len(batch) == _BATCH or sum(map(len, contents.values())) > _FILES_MAX or not self._is_at_hand():
                break
        if not batch:
            return False
        ids = self._client.ask("submit", jobs=specs, files=contents)["ids"]
        self._numbers |= dict(zip(ids, batch, strict=True))
        self._client.wait_for(ids, output=True)
        return True

    def _finished(self, found: dict[str, Any]) -> None:
        job = found["job"]
        number, arguments, command = self._numbers.pop(job["id"])
        if self._has_halted and job["state"] == "cancelled" and not job["started_s"]:
            self._ready[number] = lambda: None  # it has not begun, and is in no job log
            return self._print(number)
        code = job["code"] if job["state"] == "finished" else 255
        self._failed += code != 0
        small = {name: base64.b64decode(found[name]) for name in _STREAMS if name in found}
        if self._options.results:
            out, err = (self._pieces(job["id"], name, small) for name in _STREAMS)
            results.keep(self._options.results, number, arguments, out, err)
        if self._options.bring and job["state"] == "finished":
            try:
                absent = self._options.bring(self._client, self._client.ask("job", id=job["id"])["job"])
                self._lacking |= dict.fromkeys([f"job {job['id']}: files"] if absent else [])
            except (IncompleteError, RemoteError) as error:
                _raise_if_alone(error)
                self._lack([str(error)])
        if self._eta:
            self._eta.one_done()
        self._ready[number] = lambda: self._write(job, arguments, small)
        self._rows[number] = self._row(number, job, code, command)
        self._print(number)

    def _print(self, number: int) -> None:
        if not self._options.keep_order:
            return self._print_now(number)
        while self._next in self._ready:
            self._print_now(self._next)
            self._next += 1

    def _print_now(self, number: int) -> None:
        """Then it is in the job log: what is there was printed."""
        self._ready.pop(number)()
        row = self._rows.pop(number, b"")
        if self._log and row:
            self._log.write(row)

    def _pieces(self, job: int, stream: str, small: dict[str, bytes]) -> Iterator[bytes]:
        """Of what a job has written."""
        if stream in small:
            yield small[stream]
            return
        try:
            yield from output(self._client, job, stream)
        except (IncompleteError, RemoteError) as error:
            _raise_if_alone(error)
            self._lack([str(error)])

    def _write(self, job: dict[str, Any], arguments: list[str], small: dict[str, bytes]) -> None:
        """What a job has written; that some is not there, on standard error."""
        tag = " ".join(arguments).encode("utf-8", "surrogateescape") + b"\t" if self._options.tag else b""
        for fd, stream in enumerate(_STREAMS, 1):
            is_new = True
            for data in self._pieces(job["id"], stream, small):
                atomic.write_all(fd, _tagged(data, tag, is_new=is_new) if tag else data)
                is_new = data.endswith(b"\n")
        self._lack(incomplete(job if small else self._client.ask("job", id=job["id"])["job"]))

    def _lack(self, lacking: list[str]) -> None:
        for one in [one for one in lacking if one not in self._lacking]:
            sys.stderr.write(f"cpool: {one}\n")
        self._lacking |= dict.fromkeys(lacking)

    @staticmethod
    def _row(number: int, job: dict[str, Any], code: int, command: list[str]) -> bytes:
        """Of the job log."""
        shown = " ".join(command).replace("\t", " ").replace("\n", " ")
        wall = job["usage"].get("wall_s", 0)
        ended = [max(code, 0), 0 if code >= 0 else 9]
        columns = [number, job["worker"], f"{job['started_s'] or 0:.3f}", f"{wall:.3f}", 0, 0, *ended]
        return "\t".join(map(str, [*columns, shown])).encode("utf-8", "surrogateescape") + b"\n"
