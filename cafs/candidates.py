"""What a collection has found dead and may delete later: the file gc/candidates of a store.  cafs-store(5), COLLECTION.

Writers treat what is listed as absent.  A writer that must make a listed name again, or name a listed image, clears the list
while no collection runs; the names come back with the next one, and then wait for that writer's lease.
"""

from __future__ import annotations

import json
import time

from cafs import lease
from cafs.errors import BusyError, CafsError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.backend import Backend

NAME = "gc/candidates"
_LIMIT = 1 << 28
_WAIT_S = 120.0
_POLL_S = 0.05


class Candidate:
    """A dead file.  time_s: when it was found so; waits_for: names of the writers' leases that were alive just after that."""

    __slots__ = ("name", "time_s", "waits_for")

    def __init__(self, name: str, time_s: float, waits_for: frozenset[str] | None) -> None:
        self.name = name
        self.time_s = time_s
        self.waits_for = waits_for


def read(backend: Backend) -> dict[str, Candidate]:
    """The list by name.  A damaged line does not count: what it named is found dead again."""
    try:
        data = backend.read(NAME, _LIMIT)
    except FileNotFoundError:
        return {}
    found = {}
    for line in data.splitlines():
        try:
            name, time_s, waits_for = json.loads(line)
            found[str(name)] = Candidate(
                str(name), float(time_s), None if waits_for is None else frozenset(map(str, waits_for))
            )
        except (ValueError, TypeError):
            continue
    return found


def write(backend: Backend, found: dict[str, Candidate]) -> None:
    """Replace the list."""
    rows = (
        [one.name, one.time_s, None if one.waits_for is None else sorted(one.waits_for)] for _, one in sorted(found.items())
    )
    backend.replace(NAME, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def live_leases(backend: Backend) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, record) of every lease whose holder may be alive."""
    for one in backend.list("leases"):
        if one.name.startswith("tmp."):
            continue
        try:
            data = backend.read(f"leases/{one.name}", 65536)
        except FileNotFoundError:
            continue
        if not lease.is_dead(data, time.time() - one.mtime_s):
            try:
                record = json.loads(data)
            except (ValueError, RecursionError):
                record = {}
            yield one.name, record if isinstance(record, dict) else {}


def holders(backend: Backend, kind: str) -> set[str]:
    """Names of the leases of a kind whose holders may be alive."""
    return {name for name, record in live_leases(backend) if record.get("kind") == kind}


def clear(backend: Backend) -> None:
    """Forget all candidates; the caller holds a writer's lease.  Raises BusyError if a collection does not end."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        while holders(backend, "gc"):
            if time.monotonic() > deadline:
                raise BusyError(f"store {quote(backend.url)} is being collected all the time")
            time.sleep(_POLL_S)
        write(backend, {})
        if not holders(backend, "gc"):  # one that began meanwhile may have read the list before
            return


def names(backend: Backend) -> set[str]:
    """The listed names; none where there is no list, as in most stores."""
    try:
        return set(read(backend))
    except CafsError:
        return set()
