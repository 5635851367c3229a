"""--userns auto: the ids in a container of root's are ids of the host that nobody else has.

Its image, its writable layer and its volumes are mounted with mapped ids, so on disk they hold the ids of the image, whatever
range the container had; only what is bound from the host keeps its owners.  A range is leased, run/ids/FIRST, from those of
'containers' in /etc/subuid and /etc/subgid, as podman has it, else from those that systemd leaves to containers.
Sources: user_namespaces(7), mount_setattr(2), systemd's UIDS-GIDS.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from cafs import atomic, linux, paths
from cafs.errors import CafsError, UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.options import Options
    from runner.containers import Container
    from runner.lower import Lower

WIDTH = 1 << 16
"""Ids of a container: 0 to 65535."""

_SYSTEMD = (524288, 1878982656)
"""First, count: of those for containers that are made as they are needed."""

ROOT = "/run/cafs-rootfs"
"""Where the root of each such container is mounted, in a mount namespace of its own; on the host it is always empty.

Process 1 mounts it once more, as an id that may pass through none of our directories.
"""

_OWNER = {"containers"}
_LAYERS = "layers"


class Ids:
    """The range of a container that starts.  first: its 0, on the host; namespace: descriptor of a user namespace with it."""

    __slots__ = ("_layers", "_number", "first", "namespace")

    def __init__(self, container: Container, first: int) -> None:
        self.first = first
        self.namespace = _new_namespace(first)
        self._layers = container.path(_LAYERS)
        self._number = 0

    @property
    def path(self) -> str:
        """By which the runtime finds the namespace, in our mount namespace.

        Any path below /proc/PID/ it takes for that of PID's own namespace, whose map it then finds to be another (1.1.12 on).
        """
        return os.path.join(self._layers, "user")

    def mount_layers(self, settings: list[tuple[str, str]], directory: str) -> list[tuple[str, str]]:
        """Of an overlay: the same, with everything idmapped that has owners.  directory: which upperdir and workdir are in."""
        paths.make_private(self._layers)
        linux.mount("cafs-layers", self._layers, "tmpfs", 0, "mode=700,size=1m")
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        linux.mount(f"/proc/self/fd/{self.namespace}", self.path, "none", linux.MS_BIND)
        top = self.mounted(directory)
        found = []
        for key, value in settings:
            if key == "lowerdir+":
                found.append((key, self.mounted(value)))
            else:
                is_here = key in ("upperdir", "workdir")
                found.append((key, os.path.join(top, os.path.basename(value)) if is_here else value))
        return found

    def mounted(self, directory: str) -> str:
        """A place in our mount namespace where a directory is seen with mapped ids.  Raises UnsupportedError."""
        target = os.path.join(self._layers, str(self._number))
        self._number += 1
        os.mkdir(target, 0o700)
        try:
            linux.mount_idmapped(directory, target, self.namespace)
        except OSError as error:
            why = f"--userns auto: cannot map the ids of {quote(directory)}: {error.strerror}"
            raise UnsupportedError(why, hint="Linux 5.19 and ext4, xfs, btrfs or tmpfs; else --userns host") from error
        return target

    @contextmanager
    def owning(self) -> Iterator[None]:
        """What we make meanwhile is of the container's root."""
        with linux.owning_as(self.first):
            yield


def is_asked(options: Options | Container) -> bool:
    """Whether a container is to have ids of its own.  Raises UsageError, UnsupportedError."""
    text = options.value("userns") or "host"
    if text not in ("auto", "host"):
        raise UsageError(f"--userns {quote(text)}", hint="host, or auto")
    return text == "auto"


def check(options: Options) -> None:
    """Raises UsageError, UnsupportedError for what goes not together."""
    if not is_asked(options):
        return
    if linux.in_user_namespace():
        raise UnsupportedError("--userns auto needs root", hint="without it a container is in a user namespace of yours anyway")
    for flag in ("network", "pid", "ipc"):
        kind = (options.value(flag) or "").partition(":")[0]
        if kind in ("host", "container"):
            raise UsageError(f"--userns auto goes not with --{flag} {kind}", hint="that is of other users' namespace")
    if options.has("privileged"):
        raise UsageError("--userns auto goes not with --privileged")


def begin(container: Container, low: Lower) -> Ids | None:
    """Lease a range for a start; None if it has none of its own.  Raises CafsError."""
    if not is_asked(container):
        return None
    if not low.settings():
        raise UnsupportedError("--userns auto needs the kernel engine", hint="cafs-mount(1); else --userns host")
    first = _lease(container)
    container.note(ids=first)
    _make_root()
    return Ids(container, first)


def give_back(container: Container) -> None:
    """Its range, when it has ended.  May be done twice."""
    if container.value("userns") != "auto":
        return
    first = first_of(container)
    if first and _holder(first) == container.id:
        atomic.unlink_quietly(os.path.join(_directory(), str(first)))
    if first:
        container.note(ids=0)


def first_of(container: Container) -> int:
    """What 0 of a running container is on the host; 0 if it is in no user namespace of its own."""
    return int(container.state().get("ids") or 0)


def free_stale() -> None:
    """Ranges of containers that are not there any more, or do not run."""
    from runner import alive

    for name in filter(str.isdigit, paths.listed(_directory())):
        if not alive.is_watched(_holder(int(name))):
            atomic.unlink_quietly(os.path.join(_directory(), name))


def _directory() -> str:
    return os.path.join(paths.run(), "ids")


def _holder(first: int) -> str:
    try:
        return atomic.read_file(os.path.join(_directory(), str(first)), 256).decode("ascii", "replace")
    except OSError:
        return ""


def _lease(container: Container) -> int:
    paths.make_private(_directory())
    for again in (False, True):
        if again:
            free_stale()  # of who was killed before it could say that it has one
        taken = set(paths.listed(_directory()))
        for start, count in _ranges():
            for first in range(start, start + count - WIDTH + 1, WIDTH):
                path = os.path.join(_directory(), str(first))
                if str(first) not in taken and atomic.create_file(path, container.id.encode(), 0o600):
                    return first
    raise CafsError("--userns auto: no range of 65536 ids is free", hint="more for 'containers' in /etc/subuid and /etc/subgid")


def _ranges() -> list[tuple[int, int]]:
    from runner import rootless

    users, groups = (rootless.subordinate(f"/etc/sub{kind}", _OWNER) for kind in ("uid", "gid"))
    if users != groups:
        raise CafsError("--userns auto: 'containers' has other ids in /etc/subuid than in /etc/subgid")
    return users or [_SYSTEMD]


def _make_root() -> None:
    try:
        os.makedirs(ROOT, exist_ok=True)
        os.chmod(ROOT, 0o711)  # whatever the umask is
    except OSError as error:
        raise UnsupportedError(f"--userns auto: cannot make {ROOT}: {error.strerror}", hint="--userns host") from error


def _new_namespace(first: int) -> int:
    """A user namespace in which 0 is FIRST."""
    reader, go = os.pipe2(os.O_CLOEXEC)
    ready, done = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        try:
            os.close(go)
            linux.unshare(linux.CLONE_NEWUSER)
            os.write(done, b"r")
            os.read(reader, 1)
        finally:
            os._exit(0)
    os.close(reader)
    os.close(done)
    try:
        if not os.read(ready, 1):
            raise UnsupportedError("cannot make a user namespace", hint="sysctl user.max_user_namespaces; else --userns host")
        for kind in ("uid", "gid"):
            with open(f"/proc/{child}/{kind}_map", "w", encoding="ascii") as file:
                file.write(f"0 {first} {WIDTH}")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(f"cannot map ids: {error.strerror}", hint="--userns host") from error
    finally:
        os.close(ready)
        os.close(go)
        os.waitpid(child, 0)
