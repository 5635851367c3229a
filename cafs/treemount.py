"""The fuse engine: a whole tree served through /dev/fuse by two processes of ours that watch each other, as LAZY is.

Also for users without privileges.  cafs-mount(1), ENGINES.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from cafs import atomic, columns, fusemount, image, kept, lazyd, linux, locator, mountinfo, paths, profile, quota, serving
from cafs import request as requests
from cafs.answer import ask_child, failure, tell
from cafs.errors import CafsError, FormatError, UsageError, quote
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from cafs.index import Index
    from cafs.request import Request

ENGINE = "fuse"


class Source:
    """What is mounted: an image, or an index by itself.  fd: of the columns of the tree; index: they, mapped."""

    __slots__ = ("digest", "fd", "image", "index", "layers", "store")

    def __init__(self, store: Store, opened: tuple[int, Index], image: image.Image | None) -> None:
        self.store = store
        self.fd, self.index = opened
        self.image = image
        self.digest = image.digest if image else self.index.identity
        self.layers = image.layers if image else (self.index.identity,)


def find(request: Request) -> Source:
    """What IMAGE is, with its columns.  Raises CafsError."""
    if image.is_bare(request.name, request.store):
        store = Store(request.store)
        return Source(store, _make(lambda: _load_bare(request.name, request.store, store)), None)
    found = kept.find(request.store, request.name)
    request.warnings += [found.warning] if found.warning else []
    return Source(found.store, _columns(found.store, found.image, request.store), found.image)


def _load_bare(name: str, store_root: str, store: Store) -> Index:
    index, _, _ = image.load_index(name, store_root)
    image.check_hash(index, name, store)
    return index


def keep(store: Store, found: image.Image, address: str) -> None:
    """Have the cache keep what a mount needs beside objects.  Raises CafsError."""
    os.close(_columns(store, found, address)[0])


def _columns(store: Store, found: image.Image, address: str) -> tuple[int, Index]:
    """The columns of an image, and a descriptor of them; made if the cache does not have them."""
    path = columns.path_of(found.layers)
    try:
        fd, index = columns.open_checked(path)
        os.utime(fd)
        return fd, index
    except (OSError, FormatError):
        pass

    def make() -> Index:
        fresh = Store(address, (store.hash_name, store.chunk_size))  # connections are not for two processes
        index = image.load_tree(fresh, found)
        image.check_hash(index, found.digest.hex(), fresh)
        return index

    return _make(make, path)


def _make(make: Callable[[], Index], path: str = "") -> tuple[int, Index]:
    """Make columns in a child, for loading an index takes memory that a server would never give back.

    Kept at PATH (of the index by itself if none is given); in memory where that cannot be.
    """
    fd = os.memfd_create("cafs-columns", os.MFD_CLOEXEC)
    answer = ask_child(lambda writer: _make_in_child(make, path, fd, writer))
    if not answer.startswith(b"ok"):
        os.close(fd)
        raise failure(answer)
    try:
        if answer[2:]:
            os.close(fd)
            return columns.open_checked(os.fsdecode(answer[2:]))
        return fd, columns.load(fd)
    except (OSError, FormatError) as error:
        raise CafsError(f"cannot keep columns: {error}") from error


def _make_in_child(make: Callable[[], Index], path: str, fd: int, writer: int) -> int:
    try:
        index = make()
        data = columns.encode(index)
        path = path or columns.path_of((index.identity,))
        try:
            paths.make_private(paths.cache(), os.path.dirname(path))
            atomic.replace_hint(path, data, 0o400)
        except OSError:
            atomic.write_all(fd, data)
            path = ""
        os.write(writer, b"ok" + os.fsencode(path))
    except BaseException as error:  # the only way out of this process
        tell(writer, error)
    return 0


def mount(request: Request, source: Source) -> str | None:
    """Mount, and serve; returns when it is mounted, in the foreground when it is not any more.  Raises CafsError.

    A note if it was mounted there meanwhile.
    """
    from cafs.mount import check_point

    _check_ids(source.index)
    if not source.image and request.prefetch not in ("", profile.ALL, profile.NONE):
        raise UsageError("an index by itself has no profiles")
    quota.note_use(paths.cache(), source.digest, locator.contents(source.index))
    hot = profile.chosen(source.store, source.image, request.prefetch) if source.image and not request.record else []
    with _state(request, source, hot) as state:
        with _lock():
            if note := check_point(request, source.digest.hex()):
                serving.remove_state(state)
                return note
            fd = _mount(request, source)
        try:
            here = mountinfo.at(request.point)
            serving.note_device(state, here.device if here else "")
            linux.raise_descriptor_limit()
            requests.write_record(request, source.digest.hex(), ENGINE, os.getpid(), state=state)
            if request.foreground:
                from cafs.worker import work

                work(state, fd, source.fd, lambda: None)
                serving.remove_state(state)
                atomic.unlink_quietly(requests.record_path(request.point))
            else:
                lazyd.wait(lazyd.begin(state, fd, source.fd))
        except BaseException:
            requests.unmount_stale(request.point)
            atomic.unlink_quietly(requests.record_path(request.point))
            raise
        finally:
            os.close(fd)
            os.close(source.fd)
    return None


def _check_ids(index: Index) -> None:
    """In a user namespace every owner has to be one of its users.  Raises CafsError naming a file of another."""
    if os.geteuid() or not linux.in_user_namespace():
        return
    for kind, owners in (("user", index.uid), ("group", index.gid)):
        limit = linux.mapped_ids(kind)
        if len(owners) and max(owners) >= limit:
            number = next(number for number, owner in enumerate(owners) if owner >= limit)
            raise CafsError(
                f"{quote(index.path(number))} belongs to {kind} {owners[number]}, and there are only 0 to {limit - 1}",
                hint=f"more subordinate ids in /etc/sub{kind[0]}id",
            )


def _mount(request: Request, source: Source) -> int:
    name = f"cafs:{source.digest.hex()}"
    return fusemount.mount(request.point, mountinfo.FSTYPE.decode(), name, request.restrictions(), "allow_other")


@contextmanager
def _state(request: Request, source: Source, hot: list[str]) -> Iterator[str]:
    """The directory of a mount; it goes if the mount cannot be made."""
    state = os.path.join(_run(), os.urandom(8).hex())
    with _lock():
        _tidy()
        for directory in ("", serving.IMAGES, serving.PREFETCH):
            paths.make_private(os.path.join(state, directory))
        alive = serving.hold(state)
    layers = [layer.hex() for layer in source.layers]
    try:
        if source.image:
            serving.announce(state, source.digest, hot)
        if request.prefetch == profile.ALL:
            serving.note_prefetch(state, layers=layers, rate=request.rate)
        notes = requests.record_path(request.point)
        serving.write_config(state, source.store, paths.cache(), request, layers=layers, point=request.point, notes=notes)
        yield state
    except BaseException:
        serving.remove_state(state)
        raise
    finally:
        os.close(alive)


def _run() -> str:
    return os.path.join(paths.run(), "fuse")


def _lock() -> AbstractContextManager[None]:
    """While directories of mounts come and go."""
    return serving.locked("fuse", "fuse")


def states() -> list[str]:
    """The directories of the mounts whose servers live, but for those that serve in the foreground, one process each."""
    try:
        found = [os.path.join(_run(), name) for name in sorted(os.listdir(_run()))]
    except FileNotFoundError:
        return []
    return [state for state in found if serving.is_alive(state) and serving.pid(state)]


def _tidy() -> None:
    """Remove what mounts left whose servers were all killed."""
    for name in os.listdir(_run()):
        if not serving.is_alive(os.path.join(_run(), name)):
            serving.remove_state(os.path.join(_run(), name))
