"""How commands reach the controller; and what they do themselves where none runs."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import time
from collections import deque
from contextlib import contextmanager

from cafs import atomic, linux, stopping
from cafs.errors import BusyError, CafsError, NotFound, RemoteError, describe, of_code
from pool import sockets, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    Result = TypeVar("Result")

    from pool.calling import Function as Function
    from pool.session import CallError as CallError

_BEGIN_S = 10.0
_PIECE = 1 << 18
_LOOK_S = 0.02


def incomplete(job: dict[str, Any]) -> list[str]:
    """What of an ended job's output is not there, a sentence each."""
    usage, names = job["usage"], {"out": "standard output", "err": "standard error"}
    found = [f"job {job['id']}: {one}" for one in usage.get("missing", ())]
    for stream, (start, end) in usage.get("left_out", {}).items():
        found.append(f"job {job['id']}: {end - start} bytes of its {names[stream]} were left out: output_max in pool.toml")
    return found


def __getattr__(name: str) -> Any:
    """Function and CallError, when they are wanted: the controller's commands are not to wait for them."""
    if name == "Function":
        from pool.calling import Function

        return Function
    if name == "CallError":
        from pool.session import CallError

        return CallError
    raise AttributeError(name)


def _ended() -> NoController:
    return NoController("the controller has ended", hint="cpool serve &")


class NoController(RemoteError):
    """None runs: what can be done without one, may be."""


class Stored:
    """What is on this disk of ended jobs, where no controller runs: asked as one is."""

    def __init__(self, directory: str) -> None:
        self._state = state.State(directory)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._state.close()

    def has(self, number: int) -> bool:
        """Whether a job has ended, and all that it has written is here.  Raises NotFound."""
        from pool import outputs

        job = self._state.job(number)
        streams = outputs.streams_of(job)
        return job.state in state.ENDED and all(outputs.stored(self._state, job, one, 0) is not None for one in streams)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """job, read."""
        from pool import outputs

        job = self._state.job(fields["id"])
        if do == "job":
            return {"job": job.shown()}
        offset, attempt = fields["offset"], fields.get("attempt", 0)
        found = outputs.stored(self._state, job, fields["stream"], offset, 0 if attempt == job.attempt else attempt)
        if attempt and found is None:
            raise NotFound(f"nothing is kept of attempt {attempt} of job {job.id}")
        data, following = found or (b"", offset)
        return {
            "data": base64.b64encode(data).decode(), "next": following, "end": following == offset, "job": job.shown()
        }  # fmt: skip


def output(client: Client | Stored, number: int, stream: str) -> Iterator[bytes]:
    """All that an ended job has written, a piece at a time.  Raises CafsError."""
    offset = 0
    while True:
        found = client.ask("read", id=number, stream=stream, offset=offset)
        if found["data"]:
            yield base64.b64decode(found["data"])
        elif found["end"]:
            return
        elif found["next"] == offset:
            stopping.wait(seconds=_LOOK_S)  # its agent has it, and it is on its way
        offset = found["next"]


class Client:
    """A connection.  wait_s: for a controller that nobody has seen yet; one that begins is waited for.  Raises NoController."""

    def __init__(self, directory: str, *, wait_s: float = 0.0) -> None:
        self._held = b""
        self._tag = 0
        self._events: deque[dict[str, Any]] = deque()
        self._socket = _connected(directory, wait_s)
        self.is_ours = False

    def fileno(self) -> int:
        """Of the connection."""
        return self._socket.fileno()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_for(self, ids: list[int], *, output: bool = False) -> None:
        """Have the ends of jobs come as events.  output: with what they have written, if it is little."""
        self._send("wait", ids=ids, output=output)

    def event(self, *, wait: bool = True) -> dict[str, Any] | None:
        """The end of a job; None if there is none yet and it is not to be waited for.  Raises CafsError."""
        while not self._events:
            found = self._next(wait=wait)
            if found is None:
                return None
            self._sort(found)
        return self._events.popleft()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Ask, and wait for the answer.  Raises CafsError, which may be the controller's."""
        tag = self._send(do, **fields)
        while True:
            found = self._next(wait=True)
            assert found is not None
            if found.get("tag") == tag:
                return found
            self._sort(found)

    def settle(self) -> None:
        """Wait until each worker was reached, or cannot be; not for long."""
        deadline = time.monotonic() + _BEGIN_S
        while time.monotonic() < deadline:
            nodes = self.ask("nodes")["nodes"]
            if all(one["state"] != "connecting" or one["reason"] for one in nodes):
                return
            stopping.wait(seconds=_LOOK_S)

    def _sort(self, found: dict[str, Any]) -> None:
        if "job" in found and found.get("tag") is None:
            self._events.append(found)

    def _send(self, do: str, **fields: Any) -> int:
        self._tag += 1
        try:
            self._socket.sendall(json.dumps({"do": do, "tag": self._tag, **fields}).encode() + b"\n")
        except OSError:  # of this socket: a broken pipe would be taken for our output's
            raise _ended() from None
        return self._tag

    def _next(self, *, wait: bool) -> dict[str, Any] | None:
        while b"\n" not in self._held:
            if wait:
                stopping.wait(self._socket)
            try:
                data = self._socket.recv(_PIECE, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            if not data:
                raise _ended()
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise of_code(found["code"], found["error"], hint=found["hint"])
        return found


def _connected(directory: str, wait_s: float) -> socket.socket:
    began = time.monotonic()
    while True:
        try:
            return sockets.connect(directory)
        except OSError:
            may_wait_s = _BEGIN_S if wait_s and state.is_locked(directory) else wait_s
            if time.monotonic() >= began + may_wait_s:
                raise NoController("no controller runs for this pool", hint="cpool serve &") from None
        stopping.wait(seconds=_LOOK_S)


def by_either(directory: str, asked: Callable[[Client], Result], alone: Callable[[state.State], Result]) -> Result:
    """What the controller does or, where none runs, we do; one that comes or goes meanwhile is waited for.

    Raises CafsError.
    """
    deadline = time.monotonic() + _BEGIN_S
    while True:
        try:
            with Client(directory) as client:
                return asked(client)
        except NoController:
            pass
        try:
            with state.locked(directory, wait_s=0):
                return alone(state.State(directory))
        except state.LockedError:
            if time.monotonic() > deadline:
                raise
        stopping.wait(seconds=_LOOK_S)


def _is_there(directory: str) -> bool:
    """Whether a controller listens."""
    try:
        sockets.connect(directory).close()
        return True
    except OSError:
        return False


def serve(directory: str, config: str | None = None, *, places: bool = True) -> None:
    """Be the controller.  config: instead of pool.toml.  Raises BusyError if there is one.

    places: start jobs from the beginning; else not before a job comes that somebody waits for.
    """
    from pool import settings
    from pool.controller import Controller

    found = settings.read_file(config) if config else settings.read(directory)
    linux.raise_descriptor_limit()
    with state.locked(directory, wait_s=_BEGIN_S, unless=lambda: _is_there(directory)):  # a command may have it for a moment
        controller = Controller(directory, found)
        controller.waiting.is_open = places
        controller.run()


def tick(directory: str, seconds: float, config: str | None = None) -> None:
    """Be the controller for a moment.  Raises BusyError if there is one."""
    from pool import settings
    from pool.controller import Controller

    found = settings.read_file(config) if config else settings.read(directory)
    with state.locked(directory):
        Controller(directory, found).run_for(seconds)


@contextmanager
def controlled(directory: str) -> Iterator[Client]:
    """A connection to the controller; if there is none, to one of ours that ends with us, and jobs that run go on.

    Ours starts no job that is queued, before one is submitted by somebody who waits for it.
    """
    try:
        client = Client(directory)
    except NoController:
        client = None
    if client is not None:
        with client:
            yield client
        return
    found, child = _begin(directory)
    found.is_ours = True
    try:
        with found:
            yield found
            if os.waitpid(child, os.WNOHANG)[0]:
                child = 0  # another command was faster, and has its own
            else:
                found.ask("end", jobs=False, grace_s=0)
        if child:
            os.waitpid(child, 0)  # when no other command uses it
            child = 0
    finally:
        if child:
            _end(child)


@contextmanager
def reading(directory: str, number: int) -> Iterator[Client | Stored]:
    """Whom to ask what a job has written: the controller; else the disk, if all is there; else one of ours for a moment."""
    try:
        client: Client | Stored = Client(directory)
    except NoController:
        client = Stored(directory)
        if not client.has(number):
            with controlled(directory) as ours:
                ours.settle()
                yield ours
            return
    with client:
        yield client


def cancel(directory: str, ids: list[int], grace_s: float) -> None:
    """By the controller, or by one of ours that ends when they have."""
    with controlled(directory) as client:
        client.ask("cancel", ids=ids, grace_s=grace_s)
        if client.is_ours:
            client.wait_for(ids)
            for _ in set(ids):
                client.event()


def down(directory: str, grace_s: float) -> None:
    """Cancel all jobs and end agents and controller; where none runs, by one of ours."""
    try:
        with Client(directory, wait_s=_LOOK_S) as client:
            client.ask("end", jobs=True, grace_s=grace_s)
            return
    except NoController:
        found, child = _begin(directory)
    try:
        with found:
            found.settle()
            found.ask("end", jobs=True, grace_s=grace_s)
            stopping.wait(found)  # it closes the connection when it has ended
        os.waitpid(child, 0)
        child = 0
    finally:
        if child:
            _end(child)


def _begin(directory: str) -> tuple[Client, int]:
    """(a connection, the process of a controller of ours).  While another begins, or ends, it is tried again."""
    deadline = time.monotonic() + _BEGIN_S
    while True:
        child = os.fork()
        if not child:
            _be_controller(directory)
        while True:
            try:
                return Client(directory), child
            except NoController:
                if time.monotonic() > deadline:
                    _end(child)
                    raise
                status = os.waitpid(child, os.WNOHANG)
                if status[0]:
                    if os.waitstatus_to_exitcode(status[1]):
                        raise  # it has said why
                    break
                stopping.wait(seconds=0.005)
        stopping.wait(seconds=0.02)


def _be_controller(directory: str) -> None:
    """Never returns."""
    try:
        linux.die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends us
        serve(directory, places=False)
    except BusyError:
        os._exit(0)
    except CafsError as error:
        atomic.write_all(2, f"cpool: {error}\n".encode())
        os._exit(1)
    except OSError as error:
        atomic.write_all(2, f"cpool: {describe(error)}\n".encode())
        os._exit(1)
    finally:
        os._exit(0)


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
