"""The secrets of a job on a worker: files in memory while it runs, and stars where it writes them.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import base64
import os
import stat

from cafs.removing import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MEMORY = "/dev/shm"
_SHORT = 4
"""What is shorter is not hidden: it would be found everywhere."""


def place_of(directory: str) -> str:
    """Of a job's secrets, by its directory, which ends in POOL.WORKER/jobs/ID.ATTEMPT."""
    agent = os.path.basename(os.path.dirname(os.path.dirname(directory)))
    return os.path.join(_MEMORY, f"cafs-agent-{os.geteuid()}", agent, os.path.basename(directory))


def put(place: str, values: Mapping[str, str], *, is_for_all: bool) -> None:
    """values: by name, in base64.  is_for_all: whatever user reads them in a container; on the host nobody else gets there.

    Raises OSError.
    """
    top = os.path.dirname(os.path.dirname(place))
    try:
        os.mkdir(top, 0o700)
    except FileExistsError:
        found = os.lstat(top)
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
            raise PermissionError(1, "somebody else's", top) from None
    os.makedirs(place, mode=0o700)
    for name, value in values.items():
        fd = os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(base64.b64decode(value))
            os.fchmod(fd, 0o444 if is_for_all else 0o400)
    if is_for_all:
        os.chmod(place, 0o755)


def values(place: str) -> list[bytes]:
    """What is to be hidden, the longest first; also of a job that an agent before us started."""
    found = set()
    try:
        for name in os.listdir(place):
            with open(os.path.join(place, name), "rb") as file:
                found.add(file.read().strip())
    except OSError:
        pass
    return sorted((one for one in found if len(one) >= _SHORT), key=lambda one: (-len(one), one))


def remove(place: str) -> None:
    """The job is over, and what it wrote was read."""
    remove_tree(place)


def hidden(data: bytes, secrets: Sequence[bytes]) -> bytes:
    """Each byte of a secret a star, so that all else stays where it was."""
    for one in secrets:
        data = data.replace(one, b"*" * len(one))
    return data


def unsure(data: bytes, secrets: Sequence[bytes]) -> int:
    """How many bytes at the end may be the beginning of a secret of which the rest is still to come."""
    return max((size for one in secrets for size in range(1, len(one)) if data.endswith(one[:size])), default=0)
