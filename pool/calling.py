"""Function: calls from Python, and what the commands use.

from pool.client import Function
Function("resize").call({"url": "a.jpg"})
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager

from cafs import paths
from cafs.errors import NotFound, RemoteError
from pool import calls, sockets
from pool.session import CallError, Session, id_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
    from typing import Any

_PIECE = 1 << 18
_AGAIN_S = 10.0
_BEGIN_S = 5.0
PARALLEL = 64


def _connect(directory: str, wait_s: float) -> socket.socket:
    """To the router of a pool; if a controller runs, it is waited for.  Raises RemoteError."""
    place = f"{directory}/router"
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return sockets.connect(place)
        except OSError:
            try:
                sockets.connect(directory).close()
            except OSError:
                raise RemoteError("no controller runs for this pool", hint="cpool serve &") from None
            if time.monotonic() > deadline:
                raise RemoteError("the router does not answer", hint="is a function deployed? cpool fn ls") from None
        time.sleep(0.02)


class Connection:
    """To the router, for one thread.  Raises RemoteError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.session = Session()
        self._socket = _connect(directory, _BEGIN_S)
        self._opened: dict[tuple[str, str], int] = {}
        self.owners: dict[tuple[str, str], str] = {}
        """Whose the functions are that were opened."""

        self._is_renewing = self._has_heard = False
        self._renewed = 0

    def close(self) -> None:
        """What has no answer goes on."""
        self._socket.close()

    def _renew(self) -> None:
        """The router has ended; another one takes up what the one before had begun.  Raises RemoteError."""
        if not self._has_heard:
            raise RemoteError("the router has ended the connection", hint="may this user use the pool?")
        before, deadline = self._opened, time.monotonic() + _AGAIN_S
        self._is_renewing, self._has_heard = True, False
        self._renewed += 1
        try:
            while True:
                self._socket.close()
                self._socket = _connect(self._directory, max(deadline - time.monotonic(), 0))
                self.session.renew()
                self._opened = {}
                try:
                    self.session.again({number: self.open(*key) for key, number in before.items()})
                    return
                except OSError as error:  # that was still the one before
                    if time.monotonic() > deadline:
                        raise RemoteError("the router has ended") from error
                    time.sleep(0.02)
        finally:
            self._is_renewing = False

    def open(self, tenant: str, name: str) -> int:
        """The router's number of a function.  Raises NotFound."""
        while (tenant, name) not in self._opened:
            found = self.reply(self.session.ask("open", name=name, tenant=tenant))
            if found is None:
                continue
            if found["is"] == "error":
                raise NotFound(str(found["message"]), hint="cpool fn ls")
            self._opened[tenant, name] = int(found["number"])
            self.owners[tenant, name] = str(found["tenant"])
        return self._opened[tenant, name]

    def reply(self, tag: int) -> dict[str, Any] | None:
        """To a control; None if it is to be asked again, as the router has ended."""
        renewed = self._renewed
        while tag not in self.session.replies:
            self.turn()
            if self._renewed != renewed:
                return None
        return self.session.replies.pop(tag)

    def turn(self) -> list[bytes]:
        """Send what is to be sent, wait for something; the calls that are done by it."""
        try:
            if self.session.out:
                out, self.session.out = self.session.out, bytearray()
                self._socket.sendall(out)
            data = self._socket.recv(_PIECE)
            if not data:
                raise ConnectionResetError
            self._has_heard = True
        except OSError:
            if self._is_renewing:
                raise
            self._renew()
            return []
        return self.session.feed(data)

    def wait(self, call: bytes) -> Any:
        """The answer.  Raises CallError."""
        try:
            one = self.session.pending[call]
            while not one.is_done:
                self.turn()
        except BaseException:  # Ctrl-C, most likely
            self._abandon(call)
            raise
        return self.session.take(call)

    def _abandon(self, call: bytes) -> None:
        self.session.pending.pop(call, None)
        self.session.cancel(call)
        try:
            self._socket.sendall(self.session.out)
            self.session.out = bytearray()
        except OSError:
            pass  # then nobody is there to hear it


class Function:
    """A function that is deployed in a pool.  directory: of the pool; tenant: whose it is, for the pool's owner."""

    def __init__(self, name: str, *, directory: str | None = None, tenant: str = "") -> None:
        self.name, self.tenant = name, tenant
        self._directory = directory or paths.pool()
        self._free: list[Connection] = []
        self._lock = threading.Lock()
        self._async: dict[int, AsyncConnection] = {}

    def __enter__(self) -> Function:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Its connections."""
        while self._free:
            self._free.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[tuple[Connection, int]]:
        """One that no other thread uses, kept for the next call."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = Connection(self._directory)
        is_well = False
        try:
            number = connection.open(self.tenant, self.name)
            yield connection, number
            is_well = True
        except CallError:
            is_well = True
            raise
        finally:
            if is_well:
                self._free.append(connection)
            else:
                connection.close()

    def _fields(self, owner: str, key: str | None, timeout_s: float | None, *, idempotent: bool) -> dict[str, Any]:
        return {
            "call": id_of(owner, self.name, key) if key is not None else None,
            "ms": max(int(timeout_s * 1000), 1) if timeout_s else 0,
            "flags": calls.IDEMPOTENT if idempotent else 0,
        }

    def call(self, value: Any, *, key: str | None = None, timeout_s: float | None = None, idempotent: bool = False) -> Any:
        """Its answer: JSON, or bytes; a list, if the handler gives several.

        value: JSON, or bytes.  key: the same key again is the same call; timeout_s: in all; idempotent: it may be done twice if
        its worker is lost.  Raises CallError, CafsError.
        """
        with self._connection() as (connection, number):
            fields = self._fields(connection.owners[self.tenant, self.name], key, timeout_s, idempotent=idempotent)
            return connection.wait(connection.session.begin(number, value, **fields))

    def stream(self, value: Any, *, timeout_s: float | None = None) -> Iterator[Any]:
        """What a handler gives that is a generator, as it comes; one value, if it is none.  Raises CallError, CafsError."""
        with self._connection() as (connection, number):
            session = connection.session
            call = session.begin(number, value, **self._fields("", None, timeout_s, idempotent=False))
            one = session.pending[call]
            one.takes = False
            given = 0
            try:
                while not one.is_done or given < len(one.items):
                    while given < len(one.items):
                        item, one.items[given] = one.items[given], None
                        given += 1
                        session.out += calls.frame(calls.MORE, call, a=1)
                        yield item
                    if not one.is_done:
                        connection.turn()
            except BaseException:
                connection._abandon(call)
                raise
            answer = session.take(call)
            if answer is not one.items:
                yield answer

    def map(
        self,
        inputs: Iterable[Any],
        *,
        parallel: int = PARALLEL,
        ordered: bool = True,
        return_errors: bool = False,
        idempotent: bool = False,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """Answers of many, PARALLEL at a time, in their order or as they come.  inputs are read as they are needed.

        return_errors: a CallError is given in the place of its answer, instead of raised.  progress: is told how many are done.
        """
        for _, answer in self.map_numbered(inputs, parallel, ordered, idempotent, timeout_s, progress):
            if isinstance(answer, CallError) and not return_errors:
                raise answer
            yield answer

    def map_numbered(
        self,
        inputs: Iterable[Any],
        parallel: int = PARALLEL,
        ordered: bool = True,
        idempotent: bool = False,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(number of the input, answer or CallError)."""
        fields = self._fields("", None, timeout_s, idempotent=idempotent)
        with self._connection() as (connection, _):
            session, source = connection.session, enumerate(inputs)
            running: dict[bytes, int] = {}
            waiting: dict[int, Any] = {}
            following = done = 0
            is_over = False
            try:
                while True:
                    while not is_over and len(running) + len(waiting) < max(parallel, 1):
                        one = next(source, None)
                        is_over = one is None
                        if one:
                            number = connection.open(self.tenant, self.name)  # another one after another router
                            running[session.begin(number, one[1], **fields)] = one[0]
                    if not running and is_over:
                        break
                    for call in connection.turn():
                        at = running.pop(call)
                        try:
                            answer = session.take(call)
                        except CallError as error:
                            answer = error
                        done += 1
                        if not ordered:
                            yield at, answer
                        else:
                            waiting[at] = answer
                    while following in waiting:
                        yield following, waiting.pop(following)
                        following += 1
                    if progress:
                        progress(done)
            except BaseException:
                for call in running:
                    session.cancel(call)
                connection._abandon(next(iter(running), calls.NOBODY))
                raise

    def spawn(self, value: Any, *, key: str | None = None, timeout_s: float | None = None) -> str:
        """Begin a call, and leave it; its id, for `result`.  Raises CafsError."""
        with self._connection() as (connection, number):
            fields = self._fields(connection.owners[self.tenant, self.name], key, timeout_s, idempotent=False)
            fields["flags"] |= calls.SPAWN
            session = connection.session
            call = session.begin(number, value, **fields)
            one = session.pending[call]
            while call not in session.begun and not one.is_done:
                connection.turn()
            if one.data:
                while not one.is_done:  # its value is taken from here
                    connection.turn()
            has_begun = call in session.begun
            session.begun.discard(call)
            session.pending.pop(call)
            if one.error and not has_begun:
                raise one.error
            return call.hex()

    def result(self, call: str, *, wait: bool = True) -> Any:
        """Of one that was begun before.  Raises CallError, StateOfCall."""
        return result(call, wait=wait, directory=self._directory, tenant=self.tenant)

    # The same, for asyncio.

    async def _connected(self) -> AsyncConnection:
        """One for each event loop."""
        loop = asyncio.get_running_loop()
        found = self._async.get(id(loop))
        if found is None or found.is_closed:
            found = self._async[id(loop)] = AsyncConnection(self._directory)
        await found.begin()
        return found

    async def acall(
        self, value: Any, *, key: str | None = None, timeout_s: float | None = None, idempotent: bool = False
    ) -> Any:
        """As `call`."""
        connection = await self._connected()
        number, owner = await connection.open(self.tenant, self.name)
        return await connection.call(number, value, **self._fields(owner, key, timeout_s, idempotent=idempotent))

    async def amap(
        self,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        parallel: int = PARALLEL,
        return_errors: bool = False,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """As `map`, in the order of the inputs."""
        tasks: deque[asyncio.Task[Any]] = deque()

        async def one(value: Any) -> Any:
            try:
                return await self.acall(value, timeout_s=timeout_s, idempotent=idempotent)
            except CallError as error:
                return error

        try:
            async for value in _asynchronous(inputs):
                tasks.append(asyncio.ensure_future(one(value)))
                if len(tasks) >= parallel:
                    yield _given(await tasks.popleft(), return_errors)
            while tasks:
                yield _given(await tasks.popleft(), return_errors)
        finally:
            for task in tasks:
                task.cancel()


def _given(answer: Any, return_errors: bool) -> Any:
    if isinstance(answer, CallError) and not return_errors:
        raise answer
    return answer


async def _asynchronous(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if hasattr(inputs, "__aiter__"):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one


class AsyncConnection:
    """To the router, for one event loop; many calls at once."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._session = Session()
        self._waits: dict[bytes, asyncio.Future[Any]] = {}
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._opened: dict[tuple[str, str], asyncio.Task[tuple[int, str]]] = {}
        self._begun = asyncio.ensure_future(self._begin())
        self.is_closed = False

    async def begin(self) -> None:
        """Wait until there is a connection.  Raises RemoteError."""
        try:
            await asyncio.shield(self._begun)
        except Exception:
            self.is_closed = True
            raise

    async def _begin(self) -> None:
        connection = await asyncio.to_thread(_connect, self._directory, _BEGIN_S)
        self._reader, self._writer = await asyncio.open_connection(sock=connection)
        self._task = asyncio.ensure_future(self._hear())

    async def _hear(self) -> None:
        try:
            while data := await self._reader.read(_PIECE):
                for call in self._session.feed(data):
                    wait = self._waits.pop(call, None)
                    try:
                        answer = self._session.take(call)
                    except Exception as error:
                        if wait and not wait.done():
                            wait.set_exception(error)
                        continue
                    if wait and not wait.done():
                        wait.set_result(answer)
                for tag in list(self._session.replies):
                    self._replies.pop(tag).set_result(self._session.replies.pop(tag))
                self._send()
        except OSError:
            pass
        finally:
            self.is_closed = True
            for one in [*self._waits.values(), *self._replies.values()]:
                if not one.done():
                    one.set_exception(RemoteError("outcome unknown: the router has ended"))

    def _send(self) -> None:
        if self._session.out:
            out, self._session.out = self._session.out, bytearray()
            self._writer.write(out)

    async def open(self, tenant: str, name: str) -> tuple[int, str]:
        """(as of Connection, whose it is)."""
        key = tenant, name
        if key not in self._opened or (self._opened[key].done() and self._opened[key].exception()):
            self._opened[key] = asyncio.ensure_future(self._open(tenant, name))
        return await asyncio.shield(self._opened[key])

    async def _open(self, tenant: str, name: str) -> tuple[int, str]:
        tag = self._session.ask("open", name=name, tenant=tenant)
        wait = self._replies[tag] = asyncio.get_running_loop().create_future()
        self._send()
        found = await wait
        if found["is"] == "error":
            raise NotFound(str(found["message"]), hint="cpool fn ls")
        return int(found["number"]), str(found["tenant"])

    async def call(self, number: int, value: Any, **fields: Any) -> Any:
        """Its answer.  Raises CallError, CafsError."""
        if fields["call"] in self._waits:  # the same key is the same call
            return await asyncio.shield(self._waits[fields["call"]])
        call = self._session.begin(number, value, **fields)
        wait = self._waits[call] = asyncio.get_running_loop().create_future()
        self._send()
        try:
            return await wait
        except asyncio.CancelledError:
            self._session.pending.pop(call, None)
            self._waits.pop(call, None)
            self._session.cancel(call)
            self._send()
            raise


def result(call: str, *, wait: bool = True, directory: str | None = None, tenant: str = "") -> Any:
    """Of a call that was spawned.  tenant: whose alone, for the pool's owner.  Raises CallError, StateOfCall, CafsError."""
    try:
        identity = bytes.fromhex(call)
    except ValueError:
        identity = b""
    if len(identity) != 16:
        raise NotFound(f"{call!r} is no id of a call")
    connection = Connection(directory or paths.pool())
    try:
        connection.session.await_answer(identity, tenant, is_to_wait=wait)
        return connection.wait(identity)
    finally:
        connection.close()


def stats(directory: str | None = None) -> list[dict[str, Any]]:
    """Of all functions, as `cpool fn ls` has it.  Raises RemoteError."""
    connection = Connection(directory or paths.pool())
    try:
        tag = connection.session.ask("stats")
        found: list[dict[str, Any]] = []
        while True:
            reply = connection.reply(tag)
            if reply is None:
                raise RemoteError("the router has ended")
            found += reply["functions"]
            if not reply["more"]:
                return found
    finally:
        connection.close()
