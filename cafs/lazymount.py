"""Starting, finding and ending LAZY: one for each store, scope, cache and user, shared by all kernel mounts of them."""

from __future__ import annotations

import hashlib
import os
import re
import time

from cafs import fusemount, lazyd, linux, locator, mountinfo, paths, serving
from cafs.errors import CafsError
from cafs.holder import held
from cafs.request import FETCH_LIMIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.locator import Locator
    from cafs.request import Request
    from cafs.store import Store

FSTYPE = b"fuse.cafs-lazy"
_HELD_WAIT_S = 1.0


class LazyMount:
    """A LAZY that is mounted.  state: its directory; point: where; answers: of lazyd.begin, -1 if it has begun."""

    __slots__ = ("answers", "point", "state")

    def __init__(self, state: str, answers: int = -1) -> None:
        self.state = state
        self.point = os.path.join(state, serving.MOUNT_POINT)
        self.answers = answers

    def announce(self, image: bytes, profile: list[str]) -> None:
        """Have an image held, and a hot pack brought into the cache.  profile: where it may be in the store, [] for none."""
        serving.announce(self.state, image, profile)
        self._look()

    def _look(self) -> None:
        """Let it notice what is new: an unknown name makes it look."""
        self.wait()
        try:
            os.lstat(os.path.join(self.point, ".cafs-objects", "00", "0" * 62))
        except OSError:
            pass

    def wait(self) -> None:
        """Until it answers.  Raises CafsError if it cannot begin."""
        if self.answers >= 0:
            answers, self.answers = self.answers, -1
            lazyd.wait(answers)

    def add(self, image: bytes, locators: list[Locator], rate: int = -1) -> None:
        """Make the objects of an image known that was announced, and wait until it is held, as far as it can be.

        locators: of its layers.  rate: bytes a second to bring all of it into the cache, 0: no limit, -1: do not.
        """
        directory = os.path.join(self.state, serving.LOCATORS)
        numbers = [int(name) for name in os.listdir(directory) if re.fullmatch("[1-9][0-9]*", name)]
        known = {_index_of(os.path.join(directory, str(number))) for number in numbers}
        for number, one in enumerate([one for one in locators if one.index not in known], max(numbers, default=0) + 1):
            locator.save(os.path.join(directory, str(number)), one.data)
        serving.announce(self.state, image, [])  # another command may have let it go
        if rate >= 0:
            serving.note_prefetch(self.state, layers=[one.index.hex() for one in locators], rate=rate)
        self._look()
        deadline = time.monotonic() + _HELD_WAIT_S
        while image.hex() not in held(os.path.join(self.state, serving.LEASES)) and time.monotonic() < deadline:
            time.sleep(0.002)


def _index_of(path: str) -> bytes:
    try:
        return locator.load(path).index
    except (OSError, CafsError):
        return b""


def ensure(run: str, store: Store, cache: str, request: Request, image: bytes, profile: list[str]) -> LazyMount:
    """The LAZY of a store and a cache, begun if there is none: `wait` for it.  run: directory of them all.  Raises CafsError.

    image, profile: as for `announce`.  One that records reads is for one mount alone.
    """
    record = request.record
    text = "\0".join((store.backend.identity, store.scope_id, os.path.realpath(cache), str(os.geteuid())))
    name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    for mount in mountinfo.mounts() if not record else []:
        state = os.path.dirname(os.fsdecode(mount.point))
        if mount.fstype == FSTYPE and os.path.dirname(state) == run and os.path.basename(state).startswith(name):
            if mountinfo.answers(os.fsdecode(mount.point)):
                found = LazyMount(state)
                config = serving.read_config(state)
                if (request.log, request.limit_s) not in ((None, FETCH_LIMIT_S), (config["log"], config["limit_s"])):
                    request.warnings.append(
                        "a server that is there serves it too: the log and the time limit are those that it has"
                    )
                found.announce(image, profile)
                return found
            linux.umount(os.fsdecode(mount.point), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    state = os.path.join(run, f"{'record' if record else name}.{os.urandom(4).hex()}")
    for directory in ("", serving.MOUNT_POINT, serving.IMAGES, serving.LOCATORS, serving.PREFETCH):
        paths.make_private(os.path.join(state, directory))
    serving.write_config(state, store, cache, request)
    serving.announce(state, image, profile)
    return _start(state)


def _start(state: str) -> LazyMount:
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    fd = fusemount.mount(os.path.join(state, serving.MOUNT_POINT), FSTYPE.decode(), "cafs-lazy", flags)
    try:
        return LazyMount(state, lazyd.begin(state, fd))
    except BaseException:
        end(state)
        raise
    finally:
        os.close(fd)


def end(state: str, *, is_forced: bool = False) -> None:
    """Unmount a LAZY that no mount here needs; it goes on as long as a container in another mount namespace stands on it.

    is_forced: else its connection is aborted (MNT_FORCE), as a namespace that was copied would keep the servers for ever.
    """
    force = linux.MNT_FORCE if is_forced and not is_used_elsewhere(state) else 0
    linux.umount(os.path.join(state, serving.MOUNT_POINT), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW | force)


def is_used_elsewhere(state: str) -> bool:
    """Whether an overlay in another mount namespace, such as a container's, stands on a LAZY.

    A mount that was unmounted here does not count where it was mounted: a copied namespace still has it, for nobody.  Elsewhere
    it is a bind mount, which somebody made and may use.
    """
    point, gone = os.path.join(state, serving.MOUNT_POINT), serving.gone(state)
    return any(
        mount.has_data(point) and not (mountinfo.is_kernel(mount) and gone.get(mount.device) == mount.point)
        for mount in mountinfo.elsewhere()
    )


def states(run: str) -> list[str]:
    """The directories of all LAZYs that are mounted here."""
    found = [os.path.dirname(os.fsdecode(mount.point)) for mount in mountinfo.mounts() if mount.fstype == FSTYPE]
    return [state for state in found if os.path.dirname(state) == run]
