"""jsonl: handlers: programs in a container that get a line and answer with one.  cpool-function(7), HANDLERS.

Part of the agent's program: standard library only, Python 3.9.  It is the job of an instance: the container is below it, and it
stands between its programs and the function host, as the shim does in an image with Python.

usage: agent.pyz lines DIRECTORY/jobs/ID.ATTEMPT CONCURRENCY WORDS-OF-CRUN... -- IMAGE PROGRAM...
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import select
import shlex
import signal
import subprocess
import time

from pool import calls, cgroup, loop, sockets
from pool.hosted import OUTCOME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PIECE = 1 << 16
_WAIT_S = 0.05
_KILL_S = 5.0
_BEGIN_S = 60.0
_QUIET_S = 0.3
"""How long the first programs of a version are looked at, whether they write before they are asked."""

_FAILURES_MAX = 3
_SHOWN_MAX = 200
_NOT_BEGUN = (125, 126, 127)
"""What crun itself ends with if there is no such program."""

_OUT = "/run/cpool/out/"


class Program:
    """One process of the handler.  call: the id of what it is working on, b'' if nothing."""

    def __init__(self, server: Lines, words: list[str]) -> None:
        self._server = server
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self._in, self.out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self.out, False)
        self._unsent, self._held = b"", b""
        self.call = b""
        self.answered = 0
        self._is_writing = False
        server.loop.add(self.out, self._read)

    def give(self, call: bytes, line: bytes) -> None:
        """A call."""
        self.call = call
        self._unsent = line + b"\n"
        self._write(0)

    def _write(self, _: int) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._in, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""  # it has ended: reading says so
        if bool(self._unsent) != self._is_writing:
            self._is_writing = bool(self._unsent)
            if self._is_writing:
                self._server.loop.add(self._in, self._write, select.EPOLLOUT)
            else:
                self._server.loop.remove(self._in)

    def _read(self, _: int) -> None:
        try:
            data = os.read(self.out, _PIECE)
        except BlockingIOError:
            return
        if not data:
            return self._server.ended(self)
        self._held += data
        if not self.call:
            return self._server.fails(self, f"its program wrote {_shown(self._held)} before it was asked")
        line, newline, rest = self._held.partition(b"\n")
        if len(line) > calls.VALUE_MAX:
            return self._server.fails(self, "its line is longer than 1 MiB")
        if newline and rest:
            return self._server.fails(self, "it wrote more than a line")
        if newline:
            self._held = b""
            self._server.answer(self, line)

    def is_quiet(self, wait_s: float = 0) -> bool:
        """Whether it has written nothing since its answer, and writes nothing for so long, nor ends."""
        return not select.select([self.out], [], [], wait_s)[0]

    def close(self) -> None:
        """It sees the end of its input; what it writes from now on nobody reads."""
        self._server.loop.remove(self.out)
        if self._is_writing:
            self._server.loop.remove(self._in)
            self._is_writing = False
        assert self.process.stdin and self.process.stdout
        for file in (self.process.stdin, self.process.stdout):
            try:
                file.close()
            except OSError:
                pass


class Lines:
    """directory: of the job.  run: words of crun for the container; image, program: what is in it."""

    def __init__(self, directory: str, many: int, run: list[str], image: str, program: list[str]) -> None:
        self.loop = loop.Loop()
        self._many, self._run, self._image, self._program = many, run, image, program
        with open(os.path.join(directory, "calls", "token"), encoding="ascii") as file:
            job, token = file.read().split()
        place = os.path.join(os.path.dirname(os.path.dirname(directory)), "calls", "in")
        self._name = run[run.index("--name") + 1]
        self._wire = loop.Wire(self.loop, sockets.connect_within(place, 10), self._heed, self._lost)
        self._wire.say(calls.control("hello", protocol=calls.PROTOCOL, job=job, token=token))
        self._programs: list[Program] = []
        self._holder: subprocess.Popen[bytes] | None = None
        self._waiting: list[tuple[bytes, int, bytes]] = []
        self._failures = 0
        self._outcome = os.open(os.path.join(directory, OUTCOME), os.O_RDONLY | os.O_CLOEXEC)
        self._kills, self._kills_before = "", 0
        self._is_ending = False

    def serve(self, *, is_sure: bool) -> int:
        """Until it is told to end.  is_sure: not before the container runs."""
        if self._many > 1:
            words = [*self._run, "-i", "--entrypoint", "sh", self._image, "-c", "read line"]  # it ends with us
            self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            if not self._runs(self._holder):
                return self._fail("its container has not started; with --concurrency its image needs sh")
        for _ in range(self._many):
            self._begin()
        if is_sure and self._many == 1 and not self._runs(self._programs[0].process):
            return self._fail("its program does not run")
        if is_sure and not self._programs[0].is_quiet(_QUIET_S):
            written = os.read(self._programs[0].out, _PIECE)
            is_early = f"its program wrote {_shown(written)} before it was asked"
            return self._fail(is_early if written else "its program ends at once")
        self._wire.say(calls.control("ready", ahead=True))
        self.loop.flush()
        self.loop.run()
        return 0 if self._is_ending else 1

    def _fail(self, message: str) -> int:
        error = {"kind": "start", "type": "", "message": message, "traceback": ""}
        self._wire.say(calls.control("failed", error=error))
        self.loop.flush()
        return 1

    def _runs(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the container is there; whether it is."""
        deadline = time.monotonic() + _BEGIN_S
        while process.poll() is None and time.monotonic() < deadline:
            done = subprocess.run([self._run[0], "inspect", self._name], capture_output=True, check=False)
            try:
                state = json.loads(done.stdout)["State"] if not done.returncode else {}
                if state.get("Running"):
                    self._kills = cgroup.kills_of(int(state["Pid"]))
                    return True
            except (ValueError, LookupError, TypeError):
                pass
            time.sleep(_WAIT_S)
        return False

    def _begin(self) -> None:
        """One more process of the program."""
        if self._many == 1:
            words = [*self._run, "-i", "--entrypoint", self._program[0], self._image, *self._program[1:]]
        else:
            words = [self._run[0], "exec", "-i", self._name, *self._program]
        self._programs.append(Program(self, words))

    def _heed(self, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.CALL:
            self._waiting.append((call, flags, body))
            self._next()
        elif kind == calls.CANCEL:
            if any(one[0] == call for one in self._waiting):
                self._waiting = [one for one in self._waiting if one[0] != call]
                self._wire.say(calls.failed(call, "cancelled", "the call was cancelled"))
            for program in list(self._programs):
                if program.call == call:
                    self.fails(program, "the call was cancelled", kind="cancelled")
        elif kind == calls.CONTROL and calls.said(body)["is"] == "end":
            self._end()

    def _next(self) -> None:
        """Give what waits to who is free."""
        for program in self._programs:
            if self._waiting and not program.call and program.is_quiet():
                call, flags, body = self._waiting.pop(0)
                is_bytes = flags & calls.BYTES and not flags & calls.REFERENCE
                line = json.dumps({"$bytes": base64.b64encode(body).decode()}).encode() if is_bytes else body
                program.give(call, line.replace(b"\n", b" "))

    def answer(self, program: Program, line: bytes) -> None:
        """What a program says."""
        try:
            flags, body = _packed(line)
        except ValueError as error:
            return self.fails(program, f"its line is not JSON: {_shown(line)}: {error}")
        call, program.call = program.call, b""
        program.answered += 1
        self._failures = 0
        self._wire.say(calls.frame(calls.ANSWER, call, body, flags=flags))
        self._next()

    def fails(self, program: Program, why: str, kind: str = "protocol") -> None:
        """It does not do what it is to do: another takes its place, and its call has failed."""
        self._programs.remove(program)
        program.close()
        self._kill(program.process)
        if program.call:
            self._wire.say(calls.failed(program.call, kind, why))
        if not self._is_ending:
            self._replace(program, why, is_bad=not program.call)

    def ended(self, program: Program) -> None:
        """It has ended by itself."""
        self._programs.remove(program)
        program.close()
        code = program.process.wait()
        if self._is_ending:
            self.loop.is_over = not self._programs
            return
        if program.call:
            why = f"the program has ended in the call, exit code {code}" + ": it had no memory left" * self._was_too_large()
            self._wire.say(calls.failed(program.call, "died", why))
        if code in _NOT_BEGUN and not program.answered:
            self._failures = _FAILURES_MAX
        self._replace(program, f"its program ends at once, exit code {code}", is_bad=True)

    def _replace(self, program: Program, why: str, *, is_bad: bool) -> None:
        """Begin another.  is_bad: it does so by itself; so many of those that have answered nothing are the instance's end."""
        self._failures += is_bad and not program.answered
        if self._failures >= _FAILURES_MAX:
            self._fail(why)
            self.loop.is_over = True
            return
        self._begin()
        self._next()

    def _was_too_large(self) -> bool:
        """Whether one was ended for that since we looked last; after crun has ended, or while the container is there."""
        found = cgroup.kills(self._kills) if self._many > 1 else None
        found = cgroup.noted_kills(self._outcome) if found is None else found
        before, self._kills_before = self._kills_before, found if self._many > 1 else 0  # a container each, or one for all
        return found > before

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """The program, and not crun, which cleans up."""
        if self._many == 1:
            subprocess.run([self._run[0], "kill", "-s", "KILL", self._name], capture_output=True, check=False)
        else:
            for pid in _inside(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it has ended meanwhile
        try:
            process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _end(self) -> None:
        self._is_ending = True
        for program in self._programs:
            self.loop.remove(program.process.stdout.fileno())  # type: ignore[union-attr]
            program.close()
        for program in self._programs:
            try:
                program.process.wait(10)
            except subprocess.TimeoutExpired:
                self._kill(program.process)
        if self._holder:
            assert self._holder.stdin
            self._holder.stdin.close()
            self._holder.wait()
        self.loop.is_over = True

    def _lost(self, _: str) -> None:
        """There is no function host any more: nobody would hear an answer."""
        self._end()


def _packed(line: bytes) -> tuple[int, bytes]:
    """(flags, body) of an answer.  Raises ValueError."""
    found: Any = calls.checked(line)
    if isinstance(found, dict) and set(found) == {"$bytes"} and isinstance(found["$bytes"], str):
        try:
            return calls.BYTES, base64.b64decode(found["$bytes"], validate=True)
        except binascii.Error as error:
            raise ValueError("no base64") from error
    if isinstance(found, dict) and set(found) == {"$ref"} and str(found["$ref"]).startswith(_OUT):
        return calls.REFERENCE, json.dumps(found).encode()
    return 0, calls.compact(line)


def _shown(written: bytes) -> str:
    """The first line, for a message."""
    line = written.split(b"\n")[0]
    return repr(line[:_SHOWN_MAX].decode("utf-8", "replace")) + "..." * (len(line) > _SHOWN_MAX)


def _inside(above: int) -> list[int]:
    """The processes below one that are in a namespace of processes of their own (proc(5), NSpid)."""
    parents: dict[int, int] = {}
    nested = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file if ":" in line)
        except OSError:
            continue
        parents[int(name)] = int(fields["PPid"])
        if len(fields["NSpid"].split()) > len(_own().split()):
            nested.add(int(name))
    found = {above}
    for _ in range(len(parents)):
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            break
        found |= more
    return sorted(found & nested)


def _own() -> str:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(line.partition(":")[2] for line in file if line.startswith("NSpid:"))


def main(words: list[str]) -> int:
    """As of the usage above."""
    directory, many = words[0], int(words[1])
    at = words.index("--")
    with open(os.path.join(directory, "about.json"), encoding="utf-8") as file:
        is_sure = bool(json.load(file).get("is_first"))
    program = shlex.split(words[at + 2])
    return Lines(directory, many, words[2:at], words[at + 1], program).serve(is_sure=is_sure)
