"""crun of an ordinary user: as root of a user namespace, in which mounts and containers of that user are.

A process that only waits, the keeper, holds the user and the mount namespace; every command joins them first, so that what
one has mounted the next one finds.  Ids are mapped by newuidmap(1) and newgidmap(1): 0 is the user, 1 and up are what
/etc/subuid and /etc/subgid give.  Sources: user_namespaces(7), subuid(5).
"""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import contextmanager

from cafs import atomic, linux, paths
from cafs.errors import UnsupportedError, os_error, quote
from runner import containers, programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DIRECTORY, _KEEPER, _LOCK = "rootless", "keeper", "lock"
_PLACES = (("CAFS_RUN", paths.run), ("CAFS_STATE", paths.state), ("CAFS_CACHE", paths.cache), ("CAFS_STORE", paths.store))
_HINT = "sysctl user.max_user_namespaces; or run it with sudo"


def enter() -> None:
    """Become root of the user's namespace; paths mean what they did.  Raises CafsError, UnsupportedError."""
    for variable, place in _PLACES:
        os.environ[variable] = place()
    paths.make_private(paths.run(), _DIRECTORY)
    where, note = os.getcwd(), os.path.join(paths.run(), _DIRECTORY, _KEEPER)
    with _locked():
        pid = _living(note)
        survivor = _survivor() if pid is None else None
        if pid is None and survivor is None:
            pid = _start()
            _write_note(note, pid)
        try:
            _join(pid or survivor or 0)
            os.chdir(where)
        except OSError as error:
            raise os_error("cannot join this user's namespaces", error) from error
        if survivor is not None:
            _write_note(note, _again())


def _join(pid: int) -> None:
    for kind, flag in (("user", linux.CLONE_NEWUSER), ("mnt", linux.CLONE_NEWNS)):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        linux.setns(fd, flag)
        os.close(fd)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    linux.be_seen()


@contextmanager
def _locked() -> Iterator[None]:
    lock = os.open(os.path.join(paths.run(), _DIRECTORY, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write_note(note: str, pid: int) -> None:
    atomic.replace_hint(note, f"{pid} {containers.start_time(pid)}\n".encode(), 0o600)


def _living(note: str) -> int | None:
    try:
        pid, _, started = atomic.read_file(note, 64).decode().partition(" ")
        return int(pid) if containers.start_time(int(pid)) == int(started) else None
    except (OSError, ValueError):
        return None


def _survivor() -> int | None:
    """A server of a mount: if the keeper was killed, the namespaces live on with it."""
    from cafs import serving

    top = os.path.join(paths.run(), "fuse")
    for name in paths.listed(top):
        pid = serving.pid(os.path.join(top, name))
        try:
            if pid and os.stat(f"/proc/{pid}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
                return pid
        except OSError:
            continue
    return None


def _again() -> int:
    """Another keeper, of the namespaces that we have joined."""
    pid = os.fork()
    if not pid:
        try:
            linux.leave_session()
            _wait_for_ever()
        finally:
            os._exit(1)
    return pid


def end_if_unused() -> None:
    """Let the namespaces go, if there is no container for which they are needed again."""
    with _locked():
        pid = _living(os.path.join(paths.run(), _DIRECTORY, _KEEPER))
        if pid is not None and not containers.every():
            os.kill(pid, signal.SIGKILL)


def _start() -> int:
    """Fork the keeper, map its ids, and let it go on."""
    uids, gids = _map("uid", os.getuid()), _map("gid", os.getgid())
    wait_for_maps, maps_done = os.pipe2(os.O_CLOEXEC)
    wait_for_ready, ready = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        _keep(wait_for_maps, maps_done, ready)
    os.close(wait_for_maps)
    os.close(ready)
    try:
        if os.read(wait_for_ready, 1) != b"u":
            raise UnsupportedError("cannot make a user namespace", hint=_HINT)
        _write_map("newuidmap", pid, uids)
        _write_map("newgidmap", pid, gids)
        os.write(maps_done, b"m")
        if os.read(wait_for_ready, 1) != b"m":
            raise UnsupportedError("cannot make a mount namespace in a user namespace", hint=_HINT)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(maps_done)
        os.close(wait_for_ready)
    return pid


def _keep(wait_for_maps: int, maps_done: int, ready: int) -> None:
    """The keeper: never returns."""
    try:
        os.close(maps_done)
        linux.unshare(linux.CLONE_NEWUSER)
        os.write(ready, b"u")
        if os.read(wait_for_maps, 1) == b"m":
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount("none", "/", "none", linux.MS_REC | linux.MS_SLAVE)
            linux.leave_session()
            os.write(ready, b"m")
            _wait_for_ever()
    finally:
        os._exit(1)


def _wait_for_ever() -> None:
    program = programs.find("sleep", "/bin", "/usr/bin")
    if program:
        os.execve(program, ["cafs-keeper", "infinity"], {})
    while True:
        signal.pause()


def _write_map(program: str, pid: int, rows: Sequence[tuple[int, int, int]]) -> None:
    path = programs.find(program)
    if path is None:
        raise UnsupportedError(f"crun without root needs {program}", hint="apt install uidmap")
    words = [str(number) for row in rows for number in row]
    code, said = programs.call([path, str(pid), *words])
    if code:
        raise UnsupportedError(f"{program} failed: {said.strip()}", hint="apt install uidmap; it has to be set-user-id root")


def _map(kind: str, own: int) -> list[tuple[int, int, int]]:
    """(in the namespace, outside, how many): the user itself as 0, then all its subordinate ids, as /etc/sub{u,g}id says."""
    rows, first = [(0, own, 1)], 1
    for start, count in subordinate(f"/etc/sub{kind}", {_user_name(), str(os.getuid())}):
        rows.append((first, start, count))
        first += count
    if len(rows) == 1:
        name = _user_name()
        raise UnsupportedError(
            f"user {quote(name)} has no subordinate ids in /etc/sub{kind}",
            hint=f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
        )
    return rows


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def subordinate(path: str, names: set[str]) -> list[tuple[int, int]]:
    """(first, count) of each line of /etc/subuid or /etc/subgid for one of these names (subuid(5))."""
    found = []
    try:
        lines = atomic.read_file(path, 1 << 20).decode(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, numbers = line.partition(":")
        start, _, count = numbers.partition(":")
        if name in names and start.isdigit() and count.isdigit() and int(count):
            found.append((int(start), int(count)))
    return found
