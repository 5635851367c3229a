"""Function: calls from Python, and what the commands use.

from pool.client import Function
Function("resize").call({"url": "a.jpg"})
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from contextlib import contextmanager
from typing import Protocol

from cafs import paths
from cafs.errors import NotFound, RemoteError
from pool import calls
from pool.asyncconnection import AsyncConnection
from pool.connection import Connection
from pool.session import CallError, id_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
    from typing import Any

PARALLEL = 64


class Coming(Protocol):
    """Where inputs come from.  fd: can be read when there is more."""

    fd: int

    def is_at_hand(self) -> bool:
        """Whether one more comes without waiting."""


class Function:
    """A function that is deployed in a pool.  directory: of the pool; tenant: whose it is, for the pool's owner."""

    def __init__(self, name: str, *, directory: str | None = None, tenant: str = "", as_text: bool = False) -> None:
        self.name, self.tenant, self._as_text = name, tenant, as_text
        self._directory = directory or paths.pool()
        self._free: list[Connection] = []
        self._async: dict[tuple[int, int], AsyncConnection] = {}

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
        connection = self._take()
        is_well = False
        try:
            number = connection.open(self.tenant, self.name)
            yield connection, number
            is_well = True
        except CallError:
            is_well = True
            raise
        finally:
            if is_well and connection.is_own:
                self._free.append(connection)
            else:
                connection.close()

    def _take(self) -> Connection:
        """A free one.  Those that were there when this process was forked are its parent's."""
        while True:
            try:
                connection = self._free.pop()
            except IndexError:
                return Connection(self._directory, as_text=self._as_text)
            if connection.is_own:
                return connection
            connection.close()

    def _fields(
        self, owner: str, key: str | None, timeout_s: float | None, *, idempotent: bool, call: bytes | None = None
    ) -> dict[str, Any]:
        return {
            "call": call or (id_of(owner, self.name, key) if key is not None else None),
            "ms": max(int(min(timeout_s * 1000, calls.MS_MAX)), 1) if timeout_s else 0,
            "flags": (calls.IDEMPOTENT if idempotent else 0) | (calls.LAST if key is not None else 0),
        }

    def call(
        self,
        value: Any,
        *,
        key: str | None = None,
        timeout_s: float | None = None,
        idempotent: bool = False,
        call: bytes | None = None,
    ) -> Any:
        """Its answer: JSON, or bytes; a list, if the handler gives several.

        value: JSON, or bytes.  key: the same key again is the same call; timeout_s: in all; idempotent: it may be done twice if
        its worker is lost; call: its id, 16 bytes, instead of one that is drawn.  Raises CallError, CafsError.
        """
        with self._connection() as (connection, number):
            owner = connection.owners[self.tenant, self.name]
            fields = self._fields(owner, key, timeout_s, idempotent=idempotent, call=call)
            return connection.wait(connection.session.begin(number, value, **fields))

    def stream(
        self, value: Any, *, key: str | None = None, timeout_s: float | None = None, call: bytes | None = None
    ) -> Iterator[Any]:
        """What a handler gives that is a generator, as it comes; one value, if it is none.  Raises CallError, CafsError."""
        with self._connection() as (connection, number):
            session, owner = connection.session, connection.owners[self.tenant, self.name]
            call = session.begin(number, value, **self._fields(owner, key, timeout_s, idempotent=False, call=call))
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
                connection.abandon(call)
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
        coming: Coming | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(number of the input, answer or CallError).  An input that is a CallError is its own answer.

        coming: where inputs come from that may be long in coming; answers are given meanwhile.
        """
        fields = self._fields("", None, timeout_s, idempotent=idempotent)
        with self._connection() as (connection, _):
            session, source = connection.session, enumerate(inputs)
            running: dict[bytes, int] = {}
            waiting: dict[int, Any] = {}
            following = done = 0
            is_over = False
            try:
                while True:
                    came: list[tuple[int, Any]] = []
                    while not is_over and len(running) + len(waiting) + len(came) < max(parallel, 1):
                        if coming and (running or came) and not coming.is_at_hand():
                            break
                        one = next(source, None)
                        is_over = one is None
                        if one and isinstance(one[1], CallError):
                            came.append(one)
                        elif one:
                            number = connection.open(self.tenant, self.name)  # another one after another router
                            running[session.begin(number, one[1], **fields)] = one[0]
                    if running and not came:
                        has_room = not is_over and len(running) + len(waiting) < max(parallel, 1)
                        for call in connection.turn(coming.fd if coming and has_room else -1):
                            at = running.pop(call)
                            try:
                                came.append((at, session.take(call)))
                            except CallError as error:
                                came.append((at, error))
                    elif not came and is_over:
                        break
                    for at, answer in came:
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
                connection.abandon(next(iter(running), calls.NOBODY))
                raise

    def spawn(self, value: Any, *, key: str | None = None, timeout_s: float | None = None, call: bytes | None = None) -> str:
        """Begin a call, and leave it; its id, for `result`.  Raises CafsError."""
        with self._connection() as (connection, number):
            owner = connection.owners[self.tenant, self.name]
            fields = self._fields(owner, key, timeout_s, idempotent=False, call=call)
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
        return result(call, wait=wait, directory=self._directory, tenant=self.tenant, as_text=self._as_text)

    # The same, for asyncio.

    async def _connected(self) -> AsyncConnection:
        """One for each event loop of each process: those of the process that has forked this one are kept, and never used."""
        place = os.getpid(), id(asyncio.get_running_loop())
        found = self._async.get(place)
        if found is None or found.is_closed:
            found = self._async[place] = AsyncConnection(self._directory)
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


def result(call: str, *, wait: bool = True, directory: str | None = None, tenant: str = "", as_text: bool = False) -> Any:
    """Of a call that was spawned.  tenant: whose alone, for the pool's owner.  Raises CallError, StateOfCall, CafsError."""
    try:
        identity = bytes.fromhex(call)
    except ValueError:
        identity = b""
    if len(identity) != 16:
        raise NotFound(f"{call!r} is no id of a call")
    connection = Connection(directory or paths.pool(), as_text=as_text)
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
