"""What machines may be launched: kinds, zones that have some, and the money that is left."""

from __future__ import annotations

import math
import time
from dataclasses import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from pool.scaling import Kind, Policy
    from pool.settings import Settings
    from pool.state import State

DAY_S = 86400
_CLOSED_S = 600.0
"""How long a kind is left alone in a zone that has none."""


class Market:
    """policy: of pool.toml.  tables: [[machines]], by name.  kinds: the same as they have turned out to be."""

    def __init__(self, settings: Settings, state: State) -> None:
        self._state = state
        self._all_zones: list[str] = settings.cloud["zones"]
        self._price_day = float(settings.scaling.get("price_day", math.inf))
        self.policy = settings.policy()
        self.tables = {table["name"]: table for table in settings.machines}
        self._closed: dict[tuple[str, str], float] = {}
        self.kinds: dict[str, Kind] = {}
        self.reset()

    def reset(self) -> None:
        """Somebody has looked: all may be tried again."""
        self._closed.clear()
        self.kinds = {kind.name: kind for kind in self.policy.kinds}

    def close(self, kind: str, zone: str) -> None:
        """There is none there, or it is refused."""
        self._closed[kind, zone] = time.monotonic() + _CLOSED_S

    def zones(self, kind: str) -> list[str]:
        """That may have some."""
        now = time.monotonic()
        return [zone for zone in self._all_zones if self._closed.get((kind, zone), 0.0) <= now]

    def open_policy(self) -> Policy:
        """With the kinds that may be launched now: in some zone, and with a price if there is a cap."""
        left = self._price_left()
        kinds = (kind for kind in self.kinds.values() if (kind.price or not math.isfinite(left)) and self.zones(kind.name))
        return replace(self.policy, kinds=tuple(kinds), price=left)

    def _price_left(self) -> float:
        """What all machines may cost an hour, so that one more hour of them is within the day's cap too."""
        if not math.isfinite(self._price_day):
            return self.policy.price
        now = time.time()
        return min(self.policy.price, self._price_day - self._state.spent(now - now % DAY_S, now))

    def learn(self, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """A kind may have less than pool.toml says: what does not fit on the best of those that are there fits on no other."""
        for kind in self.policy.kinds:
            found = reports.get(kind.name)
            if found:
                cpus, memory, gpus = (max(int(one[name]) for one in found) for name in ("cpus", "memory", "gpus"))
                self.kinds[kind.name] = replace(
                    kind,
                    cpus=max(min(kind.cpus, cpus), min(kind.cpus, 1.0)),
                    memory=min(kind.memory or memory, memory),
                    gpus=min(kind.gpus, gpus),
                    images=any(one["images"] for one in found),
                )
