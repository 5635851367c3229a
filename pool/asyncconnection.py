"""The same for asyncio: many calls at once over one connection."""

from __future__ import annotations

import asyncio
from collections import Counter

from cafs.errors import NotFound, RemoteError
from pool.connection import BEGIN_S, connect
from pool.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PIECE = 1 << 18


class AsyncConnection:
    """To the router, for one event loop; many calls at once."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._session = Session()
        self._waits: dict[bytes, asyncio.Future[Any]] = {}
        self._takers: Counter[bytes] = Counter()
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
        connection = await asyncio.to_thread(connect, self._directory, BEGIN_S)
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
        call = fields["call"]
        if call not in self._waits:  # the same key is the same call
            call = self._session.begin(number, value, **fields)
            self._waits[call] = asyncio.get_running_loop().create_future()
            self._send()
        self._takers[call] += 1
        try:
            return await asyncio.shield(self._waits[call])
        except asyncio.CancelledError:
            if self._takers[call] > 1 or call not in self._waits:
                raise
            self._session.pending.pop(call, None)
            self._waits.pop(call, None)
            self._session.cancel(call)
            self._send()
            raise
        finally:
            self._takers[call] -= 1
            if not self._takers[call]:
                del self._takers[call]
