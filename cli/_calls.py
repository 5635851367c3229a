"""What the verbs of cpool fn do: deploy, call, read lines and write them."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque

import click

from cafs import atomic, stopping
from cafs.errors import CafsError, IncompleteError, RemoteError, os_error
from cli import _pool as asking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cafs.store import Store
    from pool.calling import Function

_LOOK_S = 0.02
_LINE_MAX = 256 << 20
_BAR_S = 0.2


def function(name: str, tenant: str | None) -> Function:
    """To be called."""
    from pool.calling import Function

    return Function(name, directory=asking.directory(), tenant=tenant or "", as_text=True)


def change(what: str, name: str, tenant: str | None, **fields: Any) -> dict[str, Any]:
    """Ask the controller.  Raises CafsError."""
    return asking.ask("function", what=what, name=name, **fields, **({"tenant": tenant} if tenant is not None else {}))


def deploy(
    name: str, tenant: str | None, *, is_sure: bool, image: str, code: str | None, env: tuple[str, ...], **given: Any
) -> int:
    """Its version, when it has the calls.  Raises CafsError."""
    fields = ("handler", "concurrency", "buffer", "idle_s", "wait_s", "timeout_s", "start_s", "zygote")
    fn = {"name": name, "min": given["least"], "max": given["most"], **{field: given[field] for field in fields}}
    spec = asking.spec(
        command=(given["handler"],), image=with_code(image, code) if code else image, is_plain=False, env=env,
        workdir=code_place(code) if code else None, cpus=given["cpus"], memory=given["memory"], gpus=given["gpus"], timeout=0.0,
        retries=0, no_requeue=True, name=f"fn {name}", queue_timeout=0.0, labels=given["labels"], exclude=(), disk=0,
        strict=False, start_timeout=0.0, secrets=given["secrets"], tenant=tenant,
    )  # fmt: skip
    fn["record"] = not is_sure and _has_no_profile(spec["image"])
    version = int(change("deploy", name, tenant, spec={**spec, "fn": fn}, is_sure=is_sure)["version"])
    while True:
        rows = change("show", name, tenant)["functions"]
        row = next((one for one in rows if one["version"] == version), None)
        if row is None:
            raise CafsError(f"{name} was removed, or deployed again, meanwhile")
        if row["state"] == "failed":
            raise CafsError(f"cannot deploy {name!r}: {row['reason']}", hint=f"cpool fn logs {name}")
        if row["state"] != "trying":
            if fn["record"] and row["state"] == "current":
                _make_profile(name, version, spec["image"])
            return version
        stopping.wait(seconds=_LOOK_S)


def _store() -> Store:
    """Of the pool."""
    from cafs import paths
    from cafs.store import Store

    return Store(str(asking.ask("about")["store"] or paths.store()))


def _has_no_profile(image: str) -> bool:
    """Whether it is to be noted what the first instance reads of it."""
    from cafs import profile

    try:
        return not profile.names(_store(), bytes.fromhex(image))
    except CafsError:
        return False


def _make_profile(name: str, version: int, image: str) -> None:
    """Of what the first instance has read, for the mounts of others to bring; without it they work as well, later."""
    from cafs import image as images
    from cafs import profile, record

    jobs = asking.ask("jobs", all=False, limit=1000)["jobs"]
    mine = [
        one
        for one in jobs
        if (one["spec"].get("fn", {}).get("name"), one["spec"].get("fn", {}).get("version")) == (name, version)
    ]
    try:
        data = b""
        with asking.client() as client:
            while mine:
                found = client.ask("read", id=mine[0]["id"], stream="record", offset=len(data))
                data += base64.b64decode(found["data"])
                if not found["data"]:
                    break
        store = _store()
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            reads = list(record.parse(file.name, store.hash_name))
        if reads:
            profile.make(store, images.resolve(store, image), reads)
    except (CafsError, OSError) as error:
        sys.stderr.write(f"cpool: what {name} reads was not noted: {error}\n")


def code_place(code: str) -> str:
    """Where the directory of --code DIR[:DEST] is in the image."""
    return code.partition(":")[2] or "/code"


def with_code(image: str, code: str) -> str:
    """The digest of IMAGE with a directory as one more layer.  Raises CafsError."""
    source, place = code.partition(":")[0], code_place(code)
    if not os.path.isdir(source) or not place.startswith("/"):
        raise CafsError(f"cannot add {source!r}: it is no directory, or {place!r} no absolute path")
    builder = os.path.join(os.path.dirname(sys.executable), "cafs-build")
    if not os.access(builder, os.X_OK):
        builder = shutil.which("cafs-build") or "cafs-build"
    text = f"FROM {image}\nCOPY . {json.dumps([place]).strip('[]')}\nWORKDIR {place}\n"
    words = [builder, "-q", "-f", "-", source]
    done = subprocess.run(words, input=text, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CafsError(f"cannot add {source!r} to {image!r}")
    return done.stdout.strip()


def read_value(*, is_bytes: bool = False) -> Any:
    """Of standard input.  Raises CafsError."""
    data = sys.stdin.buffer.read()
    if is_bytes:
        return data
    return _value(data, "standard input")


def _value(text: bytes, where: str) -> Any:
    from pool import calls
    from pool.session import Json

    try:
        found = calls.checked(text)
    except ValueError as error:
        raise click.UsageError(f"{where} is no JSON: {error}") from None
    if isinstance(found, dict) and set(found) == {"$bytes"}:
        try:
            return base64.b64decode(found["$bytes"], validate=True)
        except (ValueError, TypeError):
            raise click.UsageError(f"{where}: $bytes is no base64") from None
    return Json(text)


def line_of(answer: Any) -> bytes:
    """An answer as a line of compact JSON."""
    from pool.session import as_json

    return as_json(answer) + b"\n"


def call(name: str, tenant: str | None, *, is_bytes: bool, **how: Any) -> int:
    """Print the answer, a line for each item of several; the exit code.  Raises CafsError."""
    found = function(name, tenant)
    value = read_value(is_bytes=is_bytes)
    try:
        answer = found.call(value, **how)
    except CafsError as error:
        if getattr(error, "call", "") and getattr(error, "kind", "") in ("raised", "died", "protocol", "timeout"):
            error.hint = error.hint or f"cpool fn logs {name} --call {getattr(error, 'call', '')}"
        return _failed(error)
    if is_bytes and isinstance(answer, bytes):
        atomic.write_all(1, answer)
    else:
        atomic.write_all(1, line_of(answer))
    return 0


def _failed(error: CafsError) -> int:
    """Say it, with the handler's traceback, which is no fault of ours."""
    trace = getattr(error, "traceback", "")
    if trace:
        sys.stderr.write(trace if trace.endswith("\n") else trace + "\n")
    raise error


def result(call_id: str, *, wait: bool) -> int:
    """Print the answer of a call.  Raises CafsError."""
    from pool import calling

    try:
        atomic.write_all(1, line_of(calling.result(call_id, wait=wait, directory=asking.directory(), as_text=True)))
    except CafsError as error:
        return _failed(error)
    return 0


class Journal:
    """Numbers of lines that are done, in a file."""

    def __init__(self, path: str, *, is_resumed: bool) -> None:
        self.done: set[int] = set()
        try:
            if is_resumed and os.path.exists(path):
                with open(path, encoding="ascii", errors="replace") as file:
                    self.done = {int(found[1]) for line in file if (found := re.fullmatch("([0-9]{1,18})\tok\n", line))}
            self._file = open(path, "a" if is_resumed else "w", encoding="ascii", buffering=1)
        except OSError as error:
            raise os_error(f"cannot use {path!r}", error) from error

    def note(self, number: int, *, is_well: bool) -> None:
        """After its line was written."""
        self._file.write(f"{number}\t{'ok' if is_well else 'error'}\n")


def map_lines(
    name: str,
    tenant: str | None,
    journal: str | None,
    *,
    is_resumed: bool,
    parallel: int,
    unordered: bool,
    quiet: bool,
    **how: Any,
) -> int:
    """3 if a call has failed.  Raises CafsError."""
    from pool.session import CallError

    noted = Journal(journal, is_resumed=is_resumed) if journal else None
    numbers: list[int] = []
    skipped = noted.done if noted else set()

    source = _Lines(0)

    def values() -> Iterator[Any]:
        for number, line in enumerate(source):
            if number in skipped or not line.strip():
                continue
            numbers.append(number)
            try:
                yield _value(line, f"line {number + 1}")
            except click.UsageError as error:
                yield CallError({"kind": "protocol", "message": error.message})

    failed = 0
    found = function(name, tenant)
    bar = _Bar(is_shown=not quiet)

    def show(done: int) -> None:
        sys.stdout.buffer.flush()  # whoever reads them does not wait for those that are not there yet
        bar.show(done)

    how |= {"ordered": not unordered, "progress": show, "coming": source}
    for at, answer in found.map_numbered(values(), parallel, **how):
        is_well = not isinstance(answer, CallError)
        sys.stdout.buffer.write(line_of(answer.shown() if isinstance(answer, CallError) else answer))
        failed += not is_well
        if noted:
            sys.stdout.buffer.flush()
            noted.note(numbers[at], is_well=is_well)
    bar.end()
    sys.stdout.buffer.flush()
    if failed:
        sys.stderr.write(f"cpool: {failed} of {len(numbers)} calls have failed\n")
    return 3 if failed else 0


class _Lines:
    """Of a descriptor, as they come."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lines: deque[bytes] = deque()
        self._rest, self._is_over = bytearray(), False

    def __iter__(self) -> Iterator[bytes]:
        while self._lines or not self._is_over:
            if self._lines:
                yield self._lines.popleft()
            else:
                self._read()

    def _read(self) -> None:
        stopping.wait(self.fd)
        data = os.read(self.fd, 1 << 16)
        self._is_over = not data
        first, newline, others = data.partition(b"\n")
        self._rest += first
        if len(self._rest) > _LINE_MAX:
            raise CafsError(f"a line is longer than {_LINE_MAX} bytes")
        if newline:
            *lines, rest = others.split(b"\n")
            self._lines += [bytes(self._rest), *lines]
            self._rest = bytearray(rest)
        elif not data and self._rest:
            self._lines.append(bytes(self._rest))

    def is_at_hand(self) -> bool:
        """Whether there is one more, or something to read."""
        return bool(self._lines) or self._is_over or bool(select.select([self.fd], [], [], 0)[0])


class _Bar:
    """How many calls are done, on a terminal."""

    def __init__(self, *, is_shown: bool) -> None:
        from cli._app import is_terminal

        self._is_shown = is_shown and is_terminal()
        self._began, self._next = time.monotonic(), 0.0

    def show(self, done: int) -> None:
        """From time to time."""
        now = time.monotonic()
        if self._is_shown and now >= self._next:
            self._next = now + _BAR_S
            sys.stderr.write(f"\r{done} done, {done / max(now - self._began, 0.001):.0f} a second\x1b[K")
            sys.stderr.flush()

    def end(self) -> None:
        """Nothing is left of it."""
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")


def listed() -> list[dict[str, Any]]:
    """Functions with what the router has measured, and what their instances have cost.  Raises CafsError."""
    from pool import calling

    rows = [row for row in asking.ask("function", what="ls")["functions"] if row["state"] != "previous"]
    if not rows:
        return []
    measured = {(one["tenant"], one["name"]): one for one in calling.stats(asking.directory())}
    costs = _costs(min(row["made_s"] for row in rows))
    found = []
    for row in rows:
        one = {**measured.get((row["tenant"], row["name"]), {}), **costs.get((row["tenant"], row["name"]), {})}
        base = {"name": row["name"], "tenant": row["tenant"], "version": row["version"], "state": row["state"]}
        if row["state"] == "failed":
            found.append({**base, "problem": row["reason"]})
        else:
            found.append({**one, **base, "handler": row["spec"]["fn"]["handler"], "image": row["spec"]["image"]})
    return found


def _costs(since_s: float) -> dict[tuple[str, str], dict[str, Any]]:
    """For the pool's owner, who may read its state."""
    from pool import report, settings
    from pool.state import State

    try:
        rows = report.functions(State(asking.directory()), settings.read(asking.directory()), since_s)
    except (CafsError, OSError):
        return {}
    return {(row["tenant"], row["name"]): {"cost": round(row["cost"], 6), "hours": round(row["hours"], 4)} for row in rows}


def logs(name: str, tenant: str | None, *, is_followed: bool, call_id: str | None, as_json: bool) -> None:
    """What instances of the versions that there are have written.  Raises CafsError."""
    rows = change("show", name, tenant)["functions"]
    whose, since_s = rows[0]["tenant"], min(row["made_s"] for row in rows)
    offsets: dict[tuple[int, str], int] = {}
    held: dict[tuple[int, str], bytes] = {}
    over: set[int] = set()
    with asking.client() as client:
        while True:
            jobs = client.ask("jobs", all=True, limit=1000)["jobs"]
            mine = [job for job in jobs if job["spec"].get("fn", {}).get("name") == name and job["submitted_s"] >= since_s]
            size = 0
            for job in [one for one in mine if one["spec"].get("tenant", "") == whose and one["id"] not in over]:
                ended = 0
                for stream in ("out", "err"):
                    key = job["id"], stream
                    try:
                        found = client.ask("read", id=job["id"], stream=stream, offset=offsets.get(key, 0))
                    except (IncompleteError, RemoteError) as error:
                        sys.stderr.write(f"cpool: {error}\n")
                        over.add(job["id"])
                        break
                    data = base64.b64decode(found["data"])
                    offsets[key] = found["next"]
                    size += len(data)
                    ended += not data and found["end"]
                    *lines, held[key] = (held.get(key, b"") + data).split(b"\n")
                    if not data and held[key]:
                        lines, held[key] = [*lines, held[key]], b""
                    for line in lines:
                        _print_line(line, job, stream, call_id, as_json=as_json)
                if ended == 2:
                    over.add(job["id"])
            sys.stdout.flush()
            if not size and not is_followed:
                return
            if not size:
                stopping.wait(seconds=0.1)


def _print_line(line: bytes, job: dict[str, Any], stream: str, call_id: str | None, *, as_json: bool) -> None:
    found: dict[str, Any] = {"call": "", "text": line.decode(errors="replace")}
    if line.startswith(b'{"call":'):
        try:
            said = json.loads(line)
            found = {"call": str(said["call"]), "text": str(said["text"])}
        except (ValueError, LookupError, TypeError):
            pass  # a program may write what it likes
    if call_id is not None and found["call"] != call_id:
        return
    about = {"job": job["id"], "worker": job["worker"], "stream": stream, "version": job["spec"]["fn"]["version"]}
    if as_json:
        click.echo(json.dumps({**about, **found}, sort_keys=True))
    else:
        click.echo(found["text"])
