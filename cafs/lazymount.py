"""Starting, finding and ending LAZY: one for each store, scope, cache and user, shared by all kernel mounts of them."""

from __future__ import annotations

import hashlib
import os
import re
import time

from cafs import atomic, fusemount, lazyd, linux, locator, mountinfo
from cafs.errors import CafsError, quote
from cafs.holder import held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.locator import Locator
    from cafs.server import Request
    from cafs.store import Store

FSTYPE = b"fuse.cafs-lazy"
_HELD_WAIT_S = 1.0


class LazyMount:
    """A LAZY that is mounted.  state: its directory; point: where it is mounted."""

    __slots__ = ("point", "state")

    def __init__(self, state: str) -> None:
        self.state = state
        self.point = os.path.join(state, lazyd.MOUNT_POINT)

    def add(self, image: bytes, locators: list[Locator], profile: str = "") -> None:
        """Make the objects of an image known, and wait until the image is held, as far as the store can be written to.

        locators: of its layers.  profile: the name in the store of a hot pack to bring into the cache.
        """
        if profile:
            name = hashlib.sha256(profile.encode()).hexdigest()[:16]
            atomic.replace_file(os.path.join(self.state, lazyd.PREFETCH, name), profile.encode(), 0o600)
        directory = os.path.join(self.state, lazyd.LOCATORS)
        numbers = [int(name) for name in os.listdir(directory) if re.fullmatch("[1-9][0-9]*", name)]
        known = {_index_of(os.path.join(directory, str(number))) for number in numbers}
        for number, one in enumerate([one for one in locators if one.index not in known], max(numbers, default=0) + 1):
            locator.save(os.path.join(directory, str(number)), one.data)
        atomic.replace_file(os.path.join(self.state, lazyd.IMAGES, image.hex()), b"", 0o600)
        try:
            os.lstat(os.path.join(self.point, ".cafs-objects", "00", image.hex()[2:]))  # an unknown name makes it look
        except FileNotFoundError:
            pass
        deadline = time.monotonic() + _HELD_WAIT_S
        while image.hex() not in held(os.path.join(self.state, lazyd.LEASES)) and time.monotonic() < deadline:
            time.sleep(0.005)


def _index_of(path: str) -> bytes:
    try:
        return locator.load(path).index
    except (OSError, CafsError):
        return b""


def ensure(run: str, store: Store, cache: str, request: Request) -> LazyMount:
    """The LAZY of a store and a cache, started if there is none.  run: directory of them all.  Raises CafsError.

    One that records reads is for one mount alone.
    """
    record = request.record
    text = "\0".join((store.backend.identity, store.scope_id, os.path.realpath(cache), str(os.geteuid())))
    name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    for mount in mountinfo.mounts() if not record else []:
        state = os.path.dirname(os.fsdecode(mount.point))
        if mount.fstype == FSTYPE and os.path.dirname(state) == run and os.path.basename(state).startswith(name):
            if mountinfo.answers(os.fsdecode(mount.point)):
                return LazyMount(state)
            linux.umount(os.fsdecode(mount.point), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    state = os.path.join(run, f"{'record' if record else name}.{os.urandom(4).hex()}")
    for directory in (lazyd.MOUNT_POINT, lazyd.IMAGES, lazyd.LOCATORS, lazyd.PREFETCH):
        os.makedirs(os.path.join(state, directory), mode=0o700)
    lazyd.write_config(state, store, cache, request)
    return _start(state)


def _start(state: str) -> LazyMount:
    made = LazyMount(state)
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    fd = fusemount.mount(made.point, FSTYPE.decode(), "cafs-lazy", flags)
    try:
        lazyd.begin(state, fd)
    except BaseException:
        end(state)
        raise
    finally:
        os.close(fd)
    if not mountinfo.answers(made.point):
        raise CafsError(f"what serves {quote(made.point)} does not answer", hint=f"see {state}/log")
    return made


def end(state: str) -> None:
    """Unmount a LAZY that no mount here needs; it goes on as long as one in another mount namespace does."""
    linux.umount(os.path.join(state, lazyd.MOUNT_POINT), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def states(run: str) -> list[str]:
    """The directories of all LAZYs that are mounted here."""
    found = [os.path.dirname(os.fsdecode(mount.point)) for mount in mountinfo.mounts() if mount.fstype == FSTYPE]
    return [state for state in found if os.path.dirname(state) == run]
