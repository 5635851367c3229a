"""What a function host knows of calls: those that are under way, and the answers of others for a while.

Part of the agent's program: standard library only, Python 3.9.  cpool-function(7), FUNCTION HOST.
"""

from __future__ import annotations

from collections import OrderedDict

from pool import calls
from pool.hosted import DONE, RUNNING, Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_KEPT_BYTES, _KEPT_MANY = 64 << 20, 100_000
_GONE_MANY = 200_000
_FILES_SHARE = 128
"""So many bytes of an answer in a file count as one in memory."""


class Known:
    """By the id of a call."""

    def __init__(self) -> None:
        self._calls: dict[bytes, Call] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        """What each answer weighs, the oldest first."""

        self._kept_bytes = 0
        self._gone: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        """When calls were answered, and of what, whose answers are not kept any more."""

    def get(self, call: bytes) -> Call | None:
        return self._calls.get(call)

    def was_done(self, call: bytes) -> bool:
        """Whether it has had its answer, which is not kept any more."""
        return call in self._gone

    def all(self) -> Iterable[Call]:
        return self._calls.values()

    def listed(self) -> list[list[Any]]:
        """[id as hex, its state, number and identity of its instance] of each, also of those whose answer has gone."""
        known = [
            [call.id.hex(), DONE if call.done else RUNNING, call.instance.number, call.instance.identity]
            for call in self._calls.values()
        ]
        return known + [[call.hex(), DONE, 0, identity] for call, (_, identity) in self._gone.items()]

    def add(self, call: Call) -> None:
        self._calls[call.id] = call

    def keep(self, call: Call) -> None:
        """It has its answer; older ones go for it."""
        weight = len(call.answer) + (call.result.size // _FILES_SHARE if call.result else 0)
        self._kept[call.id] = weight
        self._kept_bytes += weight
        while self._kept_bytes > _KEPT_BYTES or len(self._kept) > _KEPT_MANY:
            oldest = self._oldest()
            self._gone[oldest.id] = oldest.done, oldest.instance.identity
            self.forget(oldest)
        while len(self._gone) > _GONE_MANY:
            self._gone.popitem(last=False)

    def forget(self, call: Call) -> None:
        """As if it had never been."""
        self._kept_bytes -= self._kept.pop(call.id, 0)
        self._calls.pop(call.id, None)
        if call.pull:
            call.pull.remove()
        if call.result:
            call.result.remove()

    def expire(self, now: float) -> None:
        """now: by time.monotonic()."""
        while self._kept and self._oldest().done < now - calls.KEPT_S:
            self.forget(self._oldest())
        while self._gone and next(iter(self._gone.values()))[0] < now - calls.KEPT_S:
            self._gone.popitem(last=False)

    def _oldest(self) -> Call:
        return self._calls[next(iter(self._kept))]
