"""What serves calls in a container: it finds a handler, tells the function host that it is there, and runs it for each call.

One file, standard library only, Python 3.8: the image brings no more.  cpool-function(7), HANDLERS and FRAMES.

usage: shim.py MODULE:FUNCTION CONCURRENCY [zygote]
"""

from __future__ import annotations

import codecs
import contextvars
import functools
import gc
import importlib
import inspect
import io
import json
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from typing import Any

    Frame = tuple[int, int, bytes, int, int, bytes]

PLACE = "/run/cpool"
CONTROL, CALL, ANSWER, ITEM, MORE, CANCEL = range(1, 7)
REFERENCE, BYTES, STREAM, ERROR = 4, 8, 16, 32
HEAD = struct.Struct(">IBBH16sII")
VALUE_MAX = 1 << 20
ITEMS_AHEAD = 16
TEXT_MAX = 64 << 10
NOBODY = bytes(16)


def plain(value: object) -> object:
    """A number or an array of numpy, pandas, torch, as Python has it: tolist() is what they share.  Raises TypeError."""
    convert = getattr(value, "tolist", None)
    if not callable(convert):
        raise TypeError("Object of type %s is not JSON serializable" % type(value).__name__)
    return convert()


encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=plain).encode
running = contextvars.ContextVar("call", default="")


class Cancelled(BaseException):
    """The call was cancelled, or took too long."""


class Leave(BaseException):
    """It is time to end."""


class Context:
    """Of a call.  id: in hexadecimal; deadline: seconds of the Epoch, or None."""

    def __init__(self, call: bytes, ms: int) -> None:
        self.id = call.hex()
        self.deadline = time.time() + ms / 1000 if ms else None

    def remaining_s(self) -> float:
        """Until the deadline; infinite without one."""
        return float("inf") if self.deadline is None else self.deadline - time.time()


class Log(io.TextIOBase):
    """Lines, each with the call in which it was printed, for whoever reads the job's output."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: dict[str, str] = {}
        self._bytes: LogOfBytes | None = None
        self.name = "<stdout>" if fd == 1 else "<stderr>"

    encoding, errors, mode = "utf-8", "replace", "w"

    @property
    def buffer(self) -> LogOfBytes:
        """What takes bytes, as programs expect it of standard output."""
        self._bytes = self._bytes or LogOfBytes(self)
        return self._bytes

    def reconfigure(self, **_: object) -> None:
        """As of io.TextIOWrapper: lines go to the log as they are, whatever is said."""

    def writable(self) -> bool:
        """As of io."""
        return True

    def fileno(self) -> int:
        """As of io."""
        return self._fd

    def write(self, text: str) -> int:
        """A whole line at a time reaches the log."""
        call = running.get()
        begun = self._lines.pop(call, "") + text
        *lines, rest = begun.split("\n")
        if len(rest) > TEXT_MAX:
            lines, rest = [*lines, rest], ""
        if rest:
            self._lines[call] = rest
        if lines:
            written = "".join(encode({"call": call, "text": line}) + "\n" if call else line + "\n" for line in lines)
            data = written.encode("utf-8", "replace")
            while data:
                data = data[os.write(self._fd, data) :]
        return len(text)

    def end(self) -> None:
        """Of a call: what has no newline yet."""
        if running.get() in self._lines:
            self.write("\n")


class LogOfBytes(io.RawIOBase):
    """The same, for bytes."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def writable(self) -> bool:
        """As of io."""
        return True

    def fileno(self) -> int:
        """As of io."""
        return self._log.fileno()

    def write(self, data: Any) -> int:
        """As of io."""
        data = bytes(data)
        self._log.write(self._decoder.decode(data))
        return len(data)


def end_lines() -> None:
    """Of a call that is over."""
    for log in (sys.stdout, sys.stderr):
        if isinstance(log, Log):
            log.end()


def frame(kind: int, call: bytes, body: bytes = b"", flags: int = 0) -> bytes:
    """One."""
    return HEAD.pack(len(body), kind, flags, 0, call, 0, 0) + body


def control(what: str, **fields: object) -> bytes:
    """An object that says what it is."""
    return frame(CONTROL, NOBODY, encode({"is": what, **fields}).encode())


def value_of(flags: int, body: bytes) -> object:
    """What a handler is given.  Raises OSError, ValueError."""
    if flags & REFERENCE:
        path = json.loads(body)["$ref"]
        with open(path, "rb") as file:
            body = file.read()
    return body if flags & BYTES else json.loads(body)


def packed(kind: int, call: bytes, value: object, flags: int = 0, place: str = PLACE) -> bytes:
    """An answer, or an item.  Raises OSError, TypeError, ValueError."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        data, flags = bytes(value), flags | BYTES
    else:
        data = encode(value).encode()
    if len(data) <= VALUE_MAX:
        return frame(kind, call, data, flags)
    if kind == ITEM:
        raise ValueError("one of several values has at most 1 MiB")
    name = call.hex() + "." + os.urandom(4).hex()
    with open(os.path.join(place, "out", name), "xb") as file:
        file.write(data)
    return frame(kind, call, encode({"$ref": PLACE + "/out/" + name, "size": len(data)}).encode(), flags | REFERENCE)


def told(kind: str, problem: BaseException) -> dict[str, str]:
    """An exception as data; of its traceback what is the handler's."""
    own = problem.__traceback__
    while own and own.tb_frame.f_code.co_filename == __file__:
        own = own.tb_next
    text = "".join(traceback.format_exception(type(problem), problem, own))
    try:
        message = str(problem)
    except Exception:
        message = "(its text cannot be made)"
    return {"kind": kind, "type": type(problem).__name__, "message": message[:TEXT_MAX], "traceback": text[-TEXT_MAX:]}


def failed(call: bytes, problem: BaseException) -> bytes:
    """An answer that is an error."""
    is_ours = (
        isinstance(problem, Cancelled) or type(problem).__name__ == "CancelledError"
    )  # asyncio's, which takes 40 ms to load
    kind = "cancelled" if is_ours else "raised"
    return frame(ANSWER, call, encode({"error": told(kind, problem)}).encode("utf-8", "replace"), ERROR)


class Channel:
    """The way to the function host.  Blocks."""

    def __init__(self, place: str, job: str = "", token: str = "", *, is_zygote: bool = False) -> None:
        with open(os.path.join(place, "token"), encoding="ascii") as file:
            own = file.read().split()
        self.job, self.token = (job, token) if job else own
        deadline = time.monotonic() + 10
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(os.path.join(place, "host", "socket"))
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        self._lock = threading.Lock()
        self._held, self._at = b"", 0
        self._pid = os.getpid()
        self.is_told = False
        self._told = self._tell = -1
        os.register_at_fork(after_in_child=self._forked)
        self.send(control("hello", protocol=1, job=self.job, token=self.token, zygote=is_zygote))

    def heed(self) -> None:
        """From now on SIGTERM is noted, and ends `next` where nothing is being done."""
        self._told, self._tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.is_told = True
        os.write(self._tell, b"x")

    def _forked(self) -> None:
        """In a child: the connection and asyncio's signal pipe are the parent's; SIGTERM ends it, as any process."""
        self.socket.close()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)

    def end_child(self, problem: BaseException | None = None) -> None:
        """End a child that a handler forked and that has returned from it, as a program ends: its parent answers the call."""
        if os.getpid() == self._pid:
            return
        if isinstance(problem, SystemExit):
            code = problem.code if isinstance(problem.code, int) else int(bool(problem.code))
        else:
            code = int(problem is not None)
            if problem:
                sys.stderr.write(told("raised", problem)["traceback"])
        end_lines()
        os._exit(code & 0xFF)

    def send(self, data: bytes) -> None:
        """All of it."""
        self.end_child()
        with self._lock:
            self.socket.sendall(data)

    def next(self, *, is_idle: bool = False) -> Frame | None:
        """The next frame; None when the host has gone, or, if idle, when SIGTERM has come.  Waits."""
        while True:
            if len(self._held) - self._at >= 32:
                size, kind, flags, _, call, a, b = HEAD.unpack_from(self._held, self._at)
                end = self._at + 32 + size
                if len(self._held) >= end:
                    body = self._held[self._at + 32 : end]
                    self._at = end
                    return kind, flags, call, a, b, body
            if is_idle and self._told in select.select([self.socket.fileno(), self._told], [], [])[0]:
                return None
            data = self.socket.recv(1 << 18)
            if not data:
                return None
            self._held, self._at = self._held[self._at :] + data, 0

    def has_more(self, seconds: float) -> bool:
        """Whether one comes within a time, or is there."""
        return self._at < len(self._held) or bool(select.select([self.socket], [], [], seconds)[0])


class Handler:
    """A function of a module, and what is around it.  Raises ImportError, AttributeError, whatever the module does."""

    def __init__(self, name: str) -> None:
        module, _, function = name.partition(":")
        sys.path[0] = os.getcwd()
        self.module = importlib.import_module(module)
        self.function = getattr(self.module, function)
        if not callable(self.function):
            raise TypeError("%s is no function" % name)
        real = inspect.unwrap(self.function)
        real = real if inspect.isroutine(real) else real.__call__
        self.is_async = inspect.iscoroutinefunction(real) or inspect.isasyncgenfunction(real)
        self.has_context = False
        try:
            signature = inspect.signature(self.function)
        except ValueError:
            return  # of some that are written in C nobody knows
        self.has_context = "context" in signature.parameters
        try:
            signature.bind(None, **({"context": None} if self.has_context else {}))
        except TypeError as problem:
            raise TypeError("%s%s cannot be called with one value: %s" % (function, signature, problem)) from None

    def begin(self) -> Any:
        """Once.  What setup() gives: to be awaited, if it is asynchronous."""
        return getattr(self.module, "setup", int)()

    def end(self) -> Any:
        """Once, and the same of teardown()."""
        return getattr(self.module, "teardown", int)()

    def call(self, call: bytes, flags: int, ms: int, body: bytes) -> Any:
        """What the function returns."""
        value = value_of(flags, body)
        return self.function(value, context=Context(call, ms)) if self.has_context else self.function(value)


def finished(function: Callable[[], Any]) -> None:
    """setup() or teardown() of a handler that is no asynchronous one: these may be."""
    found = function()
    if inspect.isawaitable(found):
        import asyncio

        async def wait() -> None:
            await found

        asyncio.run(wait())


class Serial:
    """One call at a time, in the main thread: nothing is between the socket and the handler."""

    def __init__(self, channel: Channel, handler: Handler) -> None:
        self._channel, self._handler = channel, handler
        self._waiting: list[Frame] = []
        self._current = b""
        self._is_asked = self._is_at_work = False
        """is_at_work: with the socket, where an exception would leave half a frame; is_asked: to look for a cancel then."""

        channel.heed()
        # The one handler that does more than note its signal: to cancel a call is to raise in the handler, which may sleep.
        signal.signal(signal.SIGUSR1, self._cancel)

    def _cancel(self, *_: object) -> None:
        self._is_asked = True
        if self._current and not self._is_at_work:
            self._look()

    def _look(self) -> None:
        """A signal says that a cancel may have come; only the frame says of which call.  The rest waits for its time."""
        while self._is_asked:
            self._is_asked, self._is_at_work = False, True
            try:
                while self._channel.has_more(0):
                    one = self._channel.next()
                    if one is None:
                        raise Leave
                    self._waiting.append(one)
            finally:
                self._is_at_work = False  # a signal that comes from here on is looked after by its handler
            if any(one[0] == CANCEL and one[2] == self._current for one in self._waiting):
                raise Cancelled

    def run(self) -> None:
        """Until it is told to end."""
        while not self._channel.is_told:
            one = self._waiting.pop(0) if self._waiting else self._channel.next(is_idle=True)
            if one is None:
                raise Leave
            kind, flags, call, _, ms, body = one
            if kind == CONTROL and json.loads(body)["is"] == "end":
                return
            if kind == CALL:
                self._serve(call, flags, ms, body)

    def _serve(self, call: bytes, flags: int, ms: int, body: bytes) -> None:
        token = running.set(call.hex())
        try:
            self._current, self._is_asked = call, True  # the cancel of a call that was sent ahead is there before it is begun
            try:
                self._look()
                found = self._handler.call(call, flags, ms, body)
                if inspect.isgenerator(found):
                    self._items(call, found)
                    data = packed(ANSWER, call, None, STREAM)
                else:
                    data = packed(ANSWER, call, found)
            finally:
                self._current = b""
        except Leave:
            raise
        except BaseException as problem:  # whatever it is, it is the handler's
            self._current = b""
            self._channel.end_child(problem)
            data = failed(call, problem)
        end_lines()
        running.reset(token)
        self._is_at_work = True
        self._channel.send(data)
        self._is_at_work = False

    def _items(self, call: bytes, found: Iterable[object]) -> None:
        credit = ITEMS_AHEAD
        for item in found:
            data = packed(ITEM, call, item)
            self._is_at_work = True
            try:
                while not credit:
                    credit += self._credit(call)
                self._channel.send(data)
            finally:
                self._is_at_work = False
            if self._is_asked:
                self._look()
            credit -= 1

    def _credit(self, call: bytes) -> int:
        """How many items more are wanted; other frames wait for their time."""
        for at, (kind, _, whose, many, _, _) in enumerate(self._waiting):
            if kind == MORE and whose == call:
                del self._waiting[at]
                return many
        if not self._channel.has_more(0.05):
            return 0
        one = self._channel.next()
        if one is None:
            raise Leave
        if one[2] == call and one[0] == CANCEL:
            raise Cancelled
        if one[2] == call and one[0] == MORE:
            return one[3]
        self._waiting.append(one)
        return 0


class Threads:
    """Several at a time, each in a thread."""

    def __init__(self, channel: Channel, handler: Handler, many: int) -> None:
        self._channel, self._handler = channel, handler
        self._given: queue.SimpleQueue[tuple[bytes, int, int, bytes]] = queue.SimpleQueue()
        self._running: dict[bytes, int] = {}
        self._credits: dict[bytes, queue.SimpleQueue[None]] = {}
        self._cancelled: set[bytes] = set()
        self._lock = threading.Lock()  # not a Condition: an exception that comes from outside leaves one of those locked

        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(many)]
        channel.heed()

    def run(self) -> None:
        """Until it is told to end."""
        for thread in self._threads:
            thread.start()
        while True:
            one = self._channel.next(is_idle=True)
            if one is None:
                raise Leave
            kind, flags, call, many, ms, body = one
            if kind == CALL:
                self._credits[call] = queue.SimpleQueue()
                self._credit(call, ITEMS_AHEAD)
                self._given.put((call, flags, ms, body))
            elif kind == CANCEL:
                self._cancel(call)
            elif kind == MORE:
                self._credit(call, many)
            elif json.loads(body)["is"] == "end":
                return

    def _credit(self, call: bytes, many: int) -> None:
        """So many items more of a call are wanted, if it has not ended."""
        wanted = self._credits.get(call)
        if wanted:
            for _ in range(many):
                wanted.put(None)

    def _cancel(self, call: bytes) -> None:
        """Once.  One that is not begun yet is not begun."""
        with self._lock:
            if call in self._cancelled or call not in self._credits:
                return
            self._cancelled.add(call)
            self._credit(call, 1)  # who waits for it runs Python then
            if call in self._running:
                _throw(self._running[call], Cancelled)

    def _work(self) -> None:
        while True:
            self._serve(*self._given.get())

    def _serve(self, call: bytes, flags: int, ms: int, body: bytes) -> None:
        """The exception of a cancel comes once, and between any two steps until _close is over: in the handler, or after it."""
        running.set(call.hex())
        try:
            data = self._answer(call, flags, ms, body)
            self._close(call)
        except Cancelled as problem:
            self._close(call)
            data = failed(call, problem)
        end_lines()
        self._channel.send(data)

    def _answer(self, call: bytes, flags: int, ms: int, body: bytes) -> bytes:
        try:
            self._open(call)
            found = self._handler.call(call, flags, ms, body)
            if inspect.isgenerator(found):
                self._items(call, found)
                return packed(ANSWER, call, None, STREAM)
            self._channel.end_child()
            return packed(ANSWER, call, found)
        except BaseException as problem:
            self._channel.end_child(problem)
            return failed(call, problem)

    def _open(self, call: bytes) -> None:
        with self._lock:
            if call in self._cancelled:
                raise Cancelled
            self._running[call] = threading.get_ident()

    def _close(self, call: bytes) -> None:
        """It has ended: from here on no exception comes for it.  It may be done again."""
        with self._lock:
            self._running.pop(call, None)
            self._credits.pop(call, None)
            if call in self._cancelled:
                _throw(threading.get_ident(), None)  # one that was on its way
                self._cancelled.discard(call)

    def _items(self, call: bytes, found: Iterable[object]) -> None:
        wanted = self._credits[call]
        for item in found:
            wanted.get()
            self._channel.send(packed(ITEM, call, item))


def _throw(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread as soon as it runs Python; None: one that has not been raised yet is none any more."""
    import ctypes

    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


class Tasks:
    """Several at a time, as tasks of one event loop."""

    def __init__(self, channel: Channel, handler: Handler) -> None:
        import asyncio

        self._channel, self._handler = channel, handler
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._credits: dict[bytes, asyncio.Semaphore] = {}
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def finished(self, function: Callable[[], Any]) -> None:
        """setup() or teardown(), in the loop of the calls: what they make is of that loop."""

        async def wait() -> None:
            found = function()
            if inspect.isawaitable(found):
                await found

        self._loop.run_until_complete(wait())

    def run(self) -> None:
        """Until it is told to end."""
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        self._reader, self._writer = await asyncio.open_connection(sock=self._channel.socket)
        main = asyncio.current_task()
        assert main
        loop.add_signal_handler(signal.SIGTERM, main.cancel)
        try:
            while True:
                head = await self._reader.readexactly(32)
                size, kind, flags, _, call, many, ms = HEAD.unpack(head)
                body = await self._reader.readexactly(size)
                if kind == CALL:
                    self._credits[call] = asyncio.Semaphore(ITEMS_AHEAD)
                    self._tasks[call] = loop.create_task(self._serve(call, flags, ms, body))
                    self._tasks[call].add_done_callback(functools.partial(self._over, call))
                elif kind == CANCEL and call in self._tasks:
                    self._tasks[call].cancel()
                elif kind == MORE and call in self._credits:
                    for _ in range(many):
                        self._credits[call].release()
                elif kind == CONTROL and json.loads(body)["is"] == "end":
                    return
        except (asyncio.CancelledError, asyncio.IncompleteReadError):
            return
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            loop.remove_signal_handler(signal.SIGTERM)

    async def _serve(self, call: bytes, flags: int, ms: int, body: bytes) -> None:
        running.set(call.hex())
        try:
            found = self._handler.call(call, flags, ms, body)
            if inspect.isawaitable(found):
                found = await found
            if inspect.isasyncgen(found):
                async for item in found:
                    self._channel.end_child()
                    await self._credits[call].acquire()
                    self._writer.write(packed(ITEM, call, item))
                    await self._writer.drain()
                data = packed(ANSWER, call, None, STREAM)
            else:
                data = packed(ANSWER, call, found)
        except BaseException as problem:
            self._channel.end_child(problem)
            data = failed(call, problem)
        self._channel.end_child()
        end_lines()
        self._writer.write(data)
        self._tasks.pop(call, None)

    def _over(self, call: bytes, _: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step takes none."""
        self._credits.pop(call, None)
        if self._tasks.pop(call, None):
            self._writer.write(failed(call, Cancelled()))


def server_of(channel: Channel, handler: Handler, many: int) -> Serial | Threads:
    """For MANY calls at once."""
    return Threads(channel, handler, many) if many > 1 else Serial(channel, handler)


class Zygote:
    """Has the module loaded, and forks for each instance; nothing of a call is ever in this process."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._channel = Channel(PLACE, is_zygote=True)
        self._children: set[int] = set()

    def run(self) -> None:
        """Until no instance is left, or the host has gone.  In a child it returns nothing but ends."""
        self._channel.heed()
        gc.freeze()
        self._fork(self._channel.job, self._channel.token)
        while self._children:
            if self._channel.is_told:
                return self._leave()
            if self._channel.has_more(0.2):
                one = self._channel.next()
                if one is None:
                    return
                said = json.loads(one[5])
                if said["is"] == "fork":
                    self._fork(said["job"], said["token"])
            self._reap()

    def _reap(self) -> None:
        try:
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self._children.discard(pid)
        except ChildProcessError:
            self._children.clear()

    def _leave(self) -> None:
        """End the children, and then ourselves."""
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        while self._children:
            self._children.discard(os.wait()[0])

    def _fork(self, job: str, token: str) -> None:
        if has_threads():
            return self._channel.send(control("refused", job=job))
        pid = os.fork()
        if pid:
            self._children.add(pid)
            return
        code = 1
        try:
            os.environ["CPOOL_JOB"], os.environ["CPOOL_ATTEMPT"] = job.split(".")
            own_tmp()
            reseed()
            code = serve(Channel(PLACE, job, token), self._handler)
        finally:
            sys.stdout.flush()
            os._exit(code)


def has_threads() -> bool:
    """Whether a fork would lose some."""
    return len(os.listdir("/proc/self/task")) > 1


def own_tmp() -> None:
    """A mount namespace with a /tmp of its own, and then no way to mount anything more (unshare(2), capabilities(7)).

    Raises OSError.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    newns, private = 0x20000, 0x44000
    failed = libc.unshare(newns) or libc.mount(b"none", b"/", None, private, None)
    if failed or libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, b"mode=1777"):  # nosuid, nodev
        raise OSError(ctypes.get_errno(), "a /tmp of its own cannot be made")
    drop_mounting()


def drop_mounting() -> None:
    """CAP_SYS_ADMIN, which is there for own_tmp alone.  Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    sys_admin = 21
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    failed = libc.prctl(24, sys_admin, 0, 0, 0) or libc.capget(head, sets)
    for at in range(3):
        sets[at] &= ~(1 << sys_admin)
    if failed or libc.capset(head, sets) or libc.prctl(38, 1, 0, 0, 0):  # PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "a capability cannot be dropped")


def reseed() -> None:
    """Generators that were loaded: no two instances draw the same."""
    if "random" in sys.modules:
        sys.modules["random"].seed()
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed()


def serve(channel: Channel, handler: Handler) -> int:
    """The calls of one instance; its exit code."""
    server: Serial | Threads | Tasks | None = Tasks(channel, handler) if handler.is_async else None
    settle = server.finished if isinstance(server, Tasks) else finished
    try:
        settle(handler.begin)
    except BaseException as problem:
        traceback.print_exc()
        channel.send(control("failed", error=told("start", problem)))
        return 1
    server = server or server_of(channel, handler, int(sys.argv[2]))
    is_serial = isinstance(server, Serial)
    channel.send(control("ready", serial=is_serial, ahead=is_serial))
    try:
        server.run()
    except (Leave, OSError):
        pass
    finally:
        settle(handler.end)
        sys.stdout.flush()
    return 0


def main() -> int:
    """As of the usage above."""
    is_zygote = sys.argv[3:] == ["zygote"]
    channel = None if is_zygote else Channel(PLACE)
    sys.stdout, sys.stderr = Log(1), Log(2)
    try:
        handler = Handler(sys.argv[1])
    except BaseException as problem:
        traceback.print_exc()
        (channel or Channel(PLACE)).send(control("failed", error=told("start", problem)))
        return 1
    if is_zygote and not has_threads():
        Zygote(handler).run()
        return 0
    if is_zygote:
        drop_mounting()
    return serve(channel or Channel(PLACE), handler)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
