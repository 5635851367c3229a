"""`crun cp`: files into a container and out of it, by descriptors below its root; none of its links is followed out of it.

A container that runs is frozen meanwhile.  One that does not is mounted for the while, in a process of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
from contextlib import contextmanager, nullcontext

from cafs import linux
from cafs.answer import ask_child, failure, tell
from cafs.errors import CafsError, NotFound, UsageError, os_error, quote
from runner import alive, cgroups, containers, control, lower, mounts, starting
from runner.treecopy import Copier
from runner.treetar import add_to_tar, extract_tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from cafs.options import Options
    from runner.containers import Container


_LINKS_MAX = 40
_UNREAD = b"unread"
"""What the child says of an archive that nobody reads to its end."""


def copy(options: Options) -> None:
    """SOURCE to TARGET, of which one is CONTAINER:PATH.  Raises CafsError."""
    source, target = options.words
    one, other = _split(source), _split(target)
    if (one is None) == (other is None):
        raise UsageError("one of the two is CONTAINER:PATH, the other is not")
    keep, follow = options.has("archive"), options.has("follow-link")
    if one is not None:
        container, path = containers.find(one[0]), one[1]
        _with_root(container, lambda root, first: _copy_out(root, path, target, first, keep=keep, follow=follow))
    elif other is not None:
        container, path = containers.find(other[0]), other[1]
        with tempfile.TemporaryFile() as archive:
            if source == "-":  # before it stands still: who sends may be slow
                shutil.copyfileobj(sys.stdin.buffer, archive, 1 << 20)
                archive.seek(0)

            def work(root: int, first: int) -> None:
                with linux.owning_as(first) if first else nullcontext():
                    _copy_in(root, source, path, archive, first, keep=keep, follow=follow)

            _with_root(container, work)


def _split(text: str) -> tuple[str, str] | None:
    """CONTAINER and PATH; None for a path of the host, which has a '/' before any ':'."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name in ("", ".", "..") or text == "-":
        return None
    return name, "/" + path.lstrip("/") if path else "/"


def _with_root(container: Container, work: Callable[[int, int], None]) -> None:
    """work: with a descriptor of the container's root, and what 0 in it is for us."""
    lock = control.hold(container)
    if lock is not None:  # nobody starts it meanwhile: two overlays would have one upper directory
        try:
            _in_child(container, work)
        finally:
            alive.forget(container.id)
            os.close(lock)
        return
    state = container.state()
    with _frozen(container):
        root = os.open(f"/proc/{state['pid']}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            work(root, int(state.get("ids") or 0))
        finally:
            os.close(root)


@contextmanager
def _frozen(container: Container) -> Iterator[None]:
    """It stands still meanwhile.  A child lets it go on when we end, however that is."""
    if cgroups.is_frozen(container):
        yield
        return
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        try:
            os.close(writer)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.read(reader, 1)
            cgroups.freeze(container, is_on=False)
        finally:
            os._exit(0)
    os.close(reader)
    try:
        cgroups.freeze(container, is_on=True)
        yield
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def _in_child(container: Container, work: Callable[[int, int], None]) -> None:
    """Mount the container's root, and on it what is mounted there when it runs, in a namespace that ends with a child."""

    def child(writer: int) -> int:
        try:
            starting.mount_root(container, low)
            root = os.open(container.path("rootfs"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            mounts.attach(container, root)
            if container.has("read-only"):
                linux.make_read_only(root)
            work(root, 0)
            sys.stdout.flush()
            os.write(writer, b"ok")
            return 0
        except BrokenPipeError:
            os.write(writer, _UNREAD)
            return 1
        except BaseException as error:  # the only way out of this process
            tell(writer, error)
            return 1

    low = starting.get_lower(container)
    try:
        answer = ask_child(child)
    finally:
        low.let_go()
        lower.release(starting.lower_key(container))
    if answer == _UNREAD:
        raise BrokenPipeError
    if answer != b"ok":
        raise failure(answer, CafsError("cannot copy: the process that does it was killed"))


def _copy_out(root: int, path: str, target: str, first: int, *, keep: bool, follow: bool) -> None:
    parent, name = _open_parent(root, path, follow=follow)
    try:
        if target == "-":
            with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
                add_to_tar(tar, parent, name, name, first)
            return
        where = _host_target(target, name, path, is_directory=_is_directory(parent, name))
        _copy(parent, name, where, keep=keep, keep_power=keep, shift=-first)  # what has power in it has none over us
    except BrokenPipeError:
        raise  # whoever reads the archive has had enough
    except OSError as error:
        raise os_error(f"cannot copy {quote(path)}", error) from error
    finally:
        os.close(parent)


def _copy_in(root: int, source: str, path: str, archive: IO[bytes], first: int, *, keep: bool, follow: bool) -> None:
    if source == "-":
        try:
            top = linux.open_in_root(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise os_error(f"cannot extract to {quote(path)}", error) from error
        try:
            lost = extract_tar(archive, top, first)
        finally:
            os.close(top)
        return _warn(lost.weakened, lost.left_out)
    wants_content = source.endswith("/.") or source == "."
    real = os.path.realpath(source) if follow or wants_content else os.path.abspath(source)
    try:
        parent = os.open(os.path.dirname(real), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(f"cannot open {quote(source)}", error) from error
    name = os.path.basename(real) or "."
    try:
        if source.endswith("/") and not os.path.isdir(source):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        is_directory, new = _is_directory(parent, name), os.path.basename(os.path.abspath(source)) or "."
        where = _container_target(root, path, "." if wants_content else new, is_directory=is_directory)
        _copy(parent, name, where, keep=keep, keep_power=True, shift=first)
    except OSError as error:
        raise os_error(f"cannot copy {quote(source)} to {quote(path)}", error) from error
    finally:
        os.close(parent)


def _copy(parent: int, name: str, target: tuple[int, str], *, keep: bool, keep_power: bool, shift: int) -> None:
    """target: a directory, which is closed, and the new name in it."""
    copier = Copier(keep_owner=keep, keep_power=keep_power, shift=shift)
    try:
        copier.copy(parent, name, *target)
    finally:
        os.close(target[0])
    _warn(copier.weakened, copier.left_out)


def _warn(weakened: list[str], left_out: list[str]) -> None:
    for names, what in (
        (weakened, "have lost set-user-id bits or capabilities, which -a keeps"),
        (left_out, "were not copied: sockets, or devices, which root copies, out of a container with -a"),
    ):
        if names:
            shown = ", ".join(quote(os.path.normpath(one)) for one in names[:3])
            sys.stderr.write(f"crun: warning: {len(names)} files {what}: {shown}{', ...' * (len(names) > 3)}\n")


def _open_parent(root: int, path: str, *, follow: bool) -> tuple[int, str]:
    """The directory that holds PATH, and its last name; '.' for a directory itself.  Raises NotFound."""
    try:
        clean = (_resolved(root, path) if follow or path.endswith("/") else path).rstrip("/") or "/"
        if clean == "/" or clean.endswith("/."):
            return linux.open_in_root(root, clean, os.O_RDONLY | os.O_DIRECTORY), "."
        parent = linux.open_in_root(root, os.path.dirname(clean), os.O_RDONLY | os.O_DIRECTORY)
        status = os.stat(os.path.basename(clean), dir_fd=parent, follow_symlinks=False)
        if path.endswith("/") and not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return parent, os.path.basename(clean)
    except OSError as error:
        raise NotFound(f"no {quote(path)} in the container: {error.strerror}") from error


def _resolved(root: int, path: str) -> str:
    """Where a path leads to if its last name is a link, whether anything is there or not; as from ROOT.  Raises OSError."""
    for _ in range(_LINKS_MAX):
        above, name = os.path.split(path.rstrip("/") or "/")
        if name in ("", ".", ".."):
            return path
        parent = linux.open_in_root(root, above, os.O_PATH | os.O_DIRECTORY)
        try:
            path = os.path.join(above, os.readlink(name, dir_fd=parent))
        except OSError:
            return path
        finally:
            os.close(parent)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _host_target(target: str, name: str, path: str, *, is_directory: bool) -> tuple[int, str]:
    """As cp does: into a directory that is there, else by the name that is given."""
    if os.path.isdir(target):
        last = os.path.basename(path.rstrip("/")) if not path.endswith("/.") else "."
        last = last if last not in ("", ".") else "."
        return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), last
    if target.endswith("/") and not is_directory:
        raise NotFound(f"no directory {quote(target)}")
    clean = os.path.realpath(target)  # a link stays, and what it names is written
    return os.open(os.path.dirname(clean) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), os.path.basename(clean)


def _container_target(root: int, path: str, name: str, *, is_directory: bool) -> tuple[int, str]:
    """name: in a directory that is there; '.': what is copied is its content."""
    try:
        return linux.open_in_root(root, path, os.O_RDONLY | os.O_DIRECTORY), name
    except FileNotFoundError:
        if path.endswith("/") and not is_directory:
            raise
    except NotADirectoryError:
        if path.endswith("/"):
            raise
    clean = _resolved(root, path.rstrip("/"))
    return linux.open_in_root(root, os.path.dirname(clean), os.O_RDONLY | os.O_DIRECTORY), os.path.basename(clean)
