"""What the pool needs of a cloud that lends machines, whichever it is.

A machine has a name of ours, which the cloud keeps with it: to launch one of a name that there is already is to find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cafs.errors import CafsError, RemoteError

PENDING, RUNNING, STOPPED, ENDING, ENDED = "pending", "running", "stopped", "ending", "ended"


class NoCapacityError(CafsError):
    """It has none of this type there now, or gives us no more: another type or zone may do."""


class RefusedError(CafsError):
    """It will not do that, however often it is asked."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A machine as the cloud shows it.  id: the cloud's; name: ours; address: '' while it has none.  launched_s: since 1970."""

    id: str
    name: str
    state: str
    address: str
    zone: str
    launched_s: float


@dataclass(frozen=True, slots=True)
class Order:
    """What to launch.  type: the cloud's word for its size.  user_data: what it does when it boots.  client_key: a line of
    authorized_keys, where the cloud puts it there itself."""

    name: str
    type: str
    zone: str
    is_spot: bool
    user_data: str
    client_key: str


class Cloud(Protocol):
    """Every method raises RemoteError if nobody knows what has happened; the same again does no harm then."""

    def launch(self, order: Order) -> Instance:
        """Begin one, or find the one of this name.  Raises NoCapacityError, RefusedError."""

    def instances(self) -> list[Instance]:
        """All of this pool.  What has ended may be among them for a while; what was just begun may be missing."""

    def look(self, instance: Instance) -> Instance | None:
        """One, None if the cloud says that there is none such."""

    def end(self, instances: list[Instance]) -> None:
        """Have them end."""


__all__ = ["Cloud", "Instance", "NoCapacityError", "Order", "RefusedError", "RemoteError"]
