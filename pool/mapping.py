"""cpool map: a job for each line of standard input: results as they come or in order, a job log, going on after a break.

The forms of {}, the exit code and the columns of the job log are GNU parallel's.
"""

from __future__ import annotations

import base64
import os
import re
import select
import sys
import time
from dataclasses import dataclass, field

from cafs import atomic
from cafs.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO

    from pool.client import Client

AHEAD = 500
"""How many jobs are with the controller at once."""

_BATCH = 50

_HEAD = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"
_FORMS = re.compile(r"\{(?:|\.|/|//|/\.|#|[1-9][0-9]{0,3})\}")
_FAILED_MAX = 100


@dataclass(slots=True)
class Options:
    """template: words of the command.  spec: what all jobs have.  size: arguments a job."""

    template: list[str]
    spec: dict[str, Any]
    separator: bytes = b"\n"
    size: int = 1
    keep_order: bool = False
    tag: bool = False
    halt: int = 0
    joblog: str = ""
    resume: bool = False
    resume_failed: bool = False
    done: set[int] = field(default_factory=set)


def expand(template: list[str], arguments: list[str], number: int) -> list[str]:
    """The command for some arguments; they come last if nothing names them."""

    def put(match: re.Match[str]) -> str:
        inner = match[0][1:-1]
        if inner == "#":
            return str(number)
        if inner.isdigit():
            return arguments[int(inner) - 1] if int(inner) <= len(arguments) else ""
        return " ".join(_form(inner, one) for one in arguments)

    if not any(_FORMS.search(word) for word in template):
        return [*template, *arguments]
    found = []
    for word in template:
        if word == "{}":
            found += arguments
        else:
            found.append(_FORMS.sub(put, word))
    return found


def _form(kind: str, argument: str) -> str:
    if kind == ".":
        return os.path.splitext(argument)[0]
    if kind == "/":
        return os.path.basename(argument)
    if kind == "//":
        return os.path.dirname(argument) or "."
    if kind == "/.":
        return os.path.splitext(os.path.basename(argument))[0]
    return argument


def arguments_of(source: BinaryIO, separator: bytes, size: int) -> Iterator[list[str]]:
    """Groups of SIZE arguments."""
    held, group = b"", []
    while True:
        data = source.read1(1 << 16) if hasattr(source, "read1") else source.read(1 << 16)
        held += data
        *whole, held = held.split(separator) if data else [held, b""]
        for one in whole if data else [one for one in whole if one]:
            group.append(os.fsdecode(one))
            if len(group) == size:
                yield group
                group = []
        if not data:
            break
    if group:
        yield group


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


class Map:
    """One run of cpool map; `run` returns its exit code."""

    def __init__(self, client: Client, options: Options) -> None:
        self._client = client
        self._options = options
        self._numbers: dict[int, tuple[int, list[str], list[str]]] = {}  # id -> number, arguments, command
        self._ready: dict[int, tuple[bytes, bytes]] = {}
        self._rows: dict[int, bytes] = {}
        self._next = 1
        self._failed = 0
        self._log: BinaryIO | None = None

    def run(self, source: BinaryIO) -> int:
        """Raises CafsError."""
        options = self._options
        if options.joblog:
            if (options.resume or options.resume_failed) and os.path.exists(options.joblog):
                options.done = already_done(options.joblog, failed_too=not options.resume_failed)
            self._log = open(options.joblog, "ab", buffering=0)
            if not self._log.tell():
                self._log.write(_HEAD.encode())
        elif options.resume or options.resume_failed:
            raise UsageError("--resume needs --joblog FILE")
        groups = enumerate(arguments_of(source, options.separator, options.size), 1)
        is_over = False
        while not is_over or self._numbers:
            while not is_over and len(self._numbers) < AHEAD and not self._has_to_halt():
                is_over = not self._submit(groups)
                while found := self._client.event(wait=False):
                    self._finished(found)
            if self._has_to_halt() and not is_over:
                is_over = True
                self._client.ask("cancel", ids=list(self._numbers), grace_s=10)
            if self._numbers and (found := self._client.event()):
                self._finished(found)
        return min(self._failed, _FAILED_MAX + 1)

    def _has_to_halt(self) -> bool:
        return bool(self._options.halt) and self._failed >= self._options.halt

    def _submit(self, groups: Iterator[tuple[int, list[str]]]) -> bool:
        """Some more; False if there are none."""
        batch = []
        for number, arguments in groups:
            if number in self._options.done:
                self._ready[number] = b"", b""
                self._print(number)
                continue
            batch.append((number, arguments, expand(self._options.template, arguments, number)))
            if len(batch) == _BATCH or not _is_at_hand(sys.stdin.buffer):
                break
        if not batch:
            return False
        specs = [{"spec": {**self._options.spec, "command": command, "index": number}} for number, _, command in batch]
        ids = self._client.ask("submit", jobs=specs)["ids"]
        self._numbers |= dict(zip(ids, batch, strict=True))
        self._client.wait_for(ids, output=True)
        return True

    def _finished(self, found: dict[str, Any]) -> None:
        job = found["job"]
        number, arguments, command = self._numbers.pop(job["id"])
        code = job["code"] if job["state"] == "finished" else 255
        self._failed += code != 0
        out, err = (
            base64.b64decode(found[name]) if name in found else self._output(job["id"], name) for name in ("out", "err")
        )
        if self._options.tag:
            tag = " ".join(arguments).encode("utf-8", "surrogateescape") + b"\t"
            out, err = (b"".join(tag + line for line in one.splitlines(keepends=True)) for one in (out, err))
        self._ready[number] = out, err
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
        self._write(*self._ready.pop(number))
        row = self._rows.pop(number, b"")
        if self._log and row:
            self._log.write(row)

    @staticmethod
    def _write(out: bytes, err: bytes) -> None:
        atomic.write_all(1, out) if out else None
        atomic.write_all(2, err) if err else None

    def _output(self, number: int, stream: str) -> bytes:
        parts: list[bytes] = []
        offset = 0
        while True:
            found = self._client.ask("read", id=number, stream=stream, offset=offset)
            offset = found["next"]
            parts.append(base64.b64decode(found["data"]))
            if found["end"]:
                return b"".join(parts)
            if not parts[-1]:
                time.sleep(0.01)  # its agent has it, and it is on its way

    @staticmethod
    def _row(number: int, job: dict[str, Any], code: int, command: list[str]) -> bytes:
        """Of the job log."""
        shown = " ".join(command).replace("\t", " ").replace("\n", " ")
        wall = job["usage"].get("wall_s", 0)
        ended = [max(code, 0), 0 if code >= 0 else 9]
        columns = [number, job["worker"], f"{job['started_s'] or 0:.3f}", f"{wall:.3f}", 0, 0, *ended]
        return "\t".join(map(str, [*columns, shown])).encode("utf-8", "surrogateescape") + b"\n"


def _is_at_hand(source: BinaryIO) -> bool:
    """Whether more can be read without waiting; what is held in its buffer counts."""
    try:
        return bool(select.select([source], [], [], 0)[0])
    except (OSError, ValueError):
        return True
