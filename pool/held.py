"""Calls of before this router began, which a host that was not heard yet may know.  cpool-function(7), ROUTER."""

from __future__ import annotations

from collections import Counter

from pool.routed import QUEUE_BYTES, QUEUE_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.callers import Caller

    Fields = tuple[int, bytes, int, int, bytes]
    """flags, call, number, ms, body: as of the frame."""


class Held:
    """Of all callers; of each tenant no more than a queue has."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Caller, bytes], tuple[float, Fields]] = {}
        self._many: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, now: float, caller: Caller, fields: Fields) -> bool:
        """Whether there is room."""
        _, call, _, _, body = fields
        if self._many[caller.tenant] >= QUEUE_MAX or self._bytes[caller.tenant] + len(body) > QUEUE_BYTES:
            return False
        self.drop(caller, call)
        self._calls[caller, call] = now, fields
        self._many[caller.tenant] += 1
        self._bytes[caller.tenant] += len(body)
        return True

    def drop(self, caller: Caller, call: bytes) -> None:
        """If it is there."""
        found = self._calls.pop((caller, call), None)
        if found:
            self._many[caller.tenant] -= 1
            self._bytes[caller.tenant] -= len(found[1][-1])

    def all(self) -> list[tuple[float, Caller, Fields]]:
        """When they came, whose they are, and their fields; the oldest first."""
        return [(came, caller, fields) for (caller, _), (came, fields) in self._calls.items()]
