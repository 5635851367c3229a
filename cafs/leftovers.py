"""What writers leave in a store that were killed: leases, and temporary files.  cafs-store(5), LEASES."""

from __future__ import annotations

import os
import time

from cafs import lease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.backend import Backend

LEASE, FILE = "dead-lease", "leftover"
OLD_S = 3600


def find(backend: Backend, mine: str = "") -> Iterator[tuple[str, str]]:
    """(LEASE or FILE, name); files in a directory only, old ones only, and only when no writer is alive anywhere.

    A tag and a profile are written without a lease, within the hour.

    mine: the name of a lease that does not count.
    """
    # Files before leases: whoever begins in between has a lease that is seen.
    files = [one.name for one in backend.list("") if time.time() - one.mtime_s > OLD_S] if backend.is_local else []
    alive = False
    for one in backend.list("leases"):
        try:
            data = backend.read(f"leases/{one.name}", 65536)
        except OSError:
            continue
        is_dead = lease.is_dead(data, time.time() - one.mtime_s)
        if is_dead:
            yield LEASE, f"leases/{one.name}"
        alive = alive or not (is_dead or one.name == mine or lease.kind(data) == "mount")
    for name in files if not alive else []:
        if os.path.basename(name).startswith("tmp.") and not name.startswith("scopes/"):
            yield FILE, name
