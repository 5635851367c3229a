"""RUN --mount=type=cache: directories that are kept from build to build, and made images of when that is asked for.

state/caches/NAME, NAME being the hash of the mount's id, which so leads nowhere; .lock is held while a step has it.  Mounts of
one id with another owner, mode or content to begin with do not share a directory (so BuildKit): a hash of those follows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import ExitStack

from cafs import paths
from cafs.errors import NotFound, quote
from cafs.removing import remove_tree
from runner.treecopy import Copier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.mounts import Mount
    from builder.request import Request
    from builder.work import Work

_MORE = re.compile(r"\.(?:lock|making|new)$")
_HOW = {"shared": fcntl.LOCK_SH, "locked": fcntl.LOCK_EX, "private": fcntl.LOCK_EX | fcntl.LOCK_NB}


def _path(request: Request, identity: str) -> str:
    space = request.args.get("BUILDKIT_CACHE_MOUNT_NS", "")
    name = hashlib.sha256(f"{space}\0{identity}".encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(paths.state(), "caches", name)


def directory(work: Work, mount: Mount, number_of_stage: int, held: dict[str, str], stack: ExitStack) -> str:
    """That of a cache mount, made if it is new, and locked as the mount says until STACK ends.

    held: those that the step has already.
    """
    first = _path(work.request, mount.id) + _variant(work, mount, number_of_stage)
    paths.make_private(os.path.dirname(first))
    if first in held:
        return held[first]  # two descriptors of one lock would wait for each other
    for number in range(1 << 16):
        path = first if not number else f"{first}.{number}"
        try:
            _lock(path + ".lock", _HOW[mount.sharing], stack)
            os.utime(path + ".lock")
            break
        except BlockingIOError:
            continue
    with ExitStack() as making:
        _lock(path + ".making", fcntl.LOCK_EX, making)
        if not os.path.isdir(path):
            _make(work, mount, number_of_stage, path)
    held[first] = path
    return path


def _variant(work: Work, mount: Mount, number_of_stage: int) -> str:
    """What tells mounts of one id apart; '' for one of root's, 0755, that begins empty."""
    seed = work.places.identity(mount.from_ or None, number_of_stage, mount.source) if mount.from_ or mount.source else ""
    how = (mount.uid, mount.gid, mount.mode, seed)
    return "" if how == (0, 0, 0o755, "") else f"-{hashlib.sha256(repr(how).encode()).hexdigest()[:16]}"


def export(request: Request, store_root: str, identity: str, ref: str) -> None:
    """Make an image of what a cache mount holds, when no step has it.  Raises NotFound, CafsError."""
    from cafs.indexing import Options, create_image

    first = _path(request, identity)
    above, name = os.path.split(first)
    there = [os.path.join(above, one) for one in paths.listed(above) if one.startswith(name) and not _MORE.search(one)]
    if not there:
        raise NotFound(f"no cache mount {quote(identity)} on this machine", hint="without id= its target is its id")
    path = max(there, key=lambda one: os.stat(one + ".lock").st_mtime_ns)  # the one that was used last
    with ExitStack() as stack:
        _lock(path + ".lock", fcntl.LOCK_EX, stack)
        create_image(Options(path, jobs=os.cpu_count() or 1), store_root, ref)


def _lock(path: str, how: int, stack: ExitStack) -> None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, lock)
    fcntl.flock(lock, how)


def _make(work: Work, mount: Mount, number_of_stage: int, path: str) -> None:
    """A new one, empty or with what from= and source= say."""
    new = path + ".new"
    remove_tree(new)
    if mount.from_ or mount.source:
        with work.places.mounted(mount.from_ or None, number_of_stage, mount.source or "/") as seed:
            copy_tree(seed, new)
    else:
        os.mkdir(new, 0o755)
    os.chmod(new, mount.mode)
    os.chown(new, mount.uid, mount.gid)
    os.rename(new, path)


def copy_tree(source: str, target: str) -> None:
    """A tree with its owners, modes and attributes; devices and sockets are left out."""
    above, name = os.path.split(source.rstrip("/"))
    fds = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (above or "/", os.path.dirname(target))]
    try:
        Copier(keep_owner=True, keep_attributes=True).copy(fds[0], name or ".", fds[1], os.path.basename(target))
    finally:
        for fd in fds:
            os.close(fd)
