"""The kernel engine: overlayfs over one EROFS a layer, the cache, and LAZY.  The kernel answers all but what is not cached.

lowerdir=EROFSn:…:EROFS1::CACHE::LAZY, see cafs-mount(1), ENGINES.  EROFS mounts are shared by all images that have the layer,
LAZY by all of a store and a cache.  Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from contextlib import ExitStack
from functools import partial
from itertools import chain

from cafs import atomic, kept, lazymount, linux, mountinfo, paths, profile, quota, serving, upperdir
from cafs import request as requests
from cafs.cache import Cache
from cafs.errors import CafsError, UnsupportedError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cafs.image import Image
    from cafs.lazymount import LazyMount
    from cafs.locator import Locator
    from cafs.request import Request
    from cafs.store import Store

ENGINE = "kernel"
_AT_ONCE = 8
_log = logging.getLogger(__name__)


def mount(request: Request, found: Image, store: Store) -> str | None:
    """Mount an image; a note if it was mounted there meanwhile.  Raises BusyError, UnsupportedError if this engine cannot."""
    from cafs.mount import check_point

    cache = paths.cache()
    try:
        ledger = Cache(cache, store).ledger
        hot = [] if request.record else profile.chosen(store, found, request.prefetch)
        with _lock():
            lazy = _lazy(request, found, store, hot)  # it begins while we look for the rest
        fetched = kept.on_thread(partial(_fetch, store, found, is_trusted=request.trusts_cache))
        unsure = [] if request.trusts_cache else ledger.unsure()
        layers, locators = fetched()
        for name in ledger.check(unsure, lambda key: any(one.find(*key) is not None for one in locators)):
            request.warnings.append(f"cached object {name} was damaged: set aside")
        with _lock():
            if mountinfo.at(lazy.point) is None:  # nobody used it yet, so another command has tidied it away
                lazy = _lazy(request, found, store, hot)
            if not request.trusts_cache:
                quota.note_use(cache, found.digest, chain.from_iterable(one.objects() for one in locators))
            points = [_mount_erofs(path) for path in layers]
            lazy.wait()
            if note := check_point(request, found.digest.hex()):
                tidy()
                return note
            lazy.add(found.digest, locators, request.rate if request.prefetch == profile.ALL else -1)
            # Without the cache LAZY sees every first read.
            _mount_overlay(request, found, points, [lazy.point] if request.record else [paths.data(cache), lazy.point])
            try:
                names = [os.path.basename(path) for path in layers]
                here = mountinfo.at(request.point)
                device = here.device if here else ""
                serving.note_mounted(lazy.state, device)
                notes: dict[str, object] = {"lazy": lazy.state, "layers": names, "point": request.point, "device": device}
                requests.write_record(request, found.digest.hex(), ENGINE, 0, **notes)
            except BaseException:  # an interrupt, too: nobody would know what it stands on
                linux.umount(request.point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
                raise
    except BaseException as error:
        with _lock():
            tidy()
        if isinstance(error, OSError):
            raise UnsupportedError(f"cannot write to cache {quote(cache)}: {error.strerror}") from error
        raise
    return None


def _lazy(request: Request, found: Image, store: Store, hot: list[str]) -> LazyMount:
    """LAZY, with the profile on its way."""
    return lazymount.ensure(run_directory("lazy"), store, paths.cache(), request, found.digest, hot)


def unmount(point: str) -> None:
    """Unmount, and whatever was mounted for it alone; wait until the servers of that have ended.  Raises OSError."""
    with _lock():
        here = mountinfo.at(point)
        linux.umount(point, linux.UMOUNT_NOFOLLOW)
        before = lazymount.states(run_directory("lazy"))
        try:
            tidy(unmounted=point)
            if here:
                _let_go(here.digest)
        except OSError as error:
            _log.warning("cannot take away what was below %s: %s", quote(point), error)
        ended = set(before) - set(lazymount.states(run_directory("lazy")))
    for state in ended:  # then records are whole, and leases given back
        serving.wait_for_end(state)


def _let_go(digest: str) -> None:
    """Hold an image no more that was unmounted, and so was not in use, unless it is mounted elsewhere too.

    One that went otherwise, as by umount -l, is held until LAZY ends: there may be files of it that are open.
    """
    if any(mount.digest == digest for mount in mountinfo.mounts() if mountinfo.is_kernel(mount)):
        return
    for state in lazymount.states(run_directory("lazy")):
        if not lazymount.is_used_elsewhere(state):  # as by a container that outlives it
            atomic.unlink_quietly(os.path.join(state, serving.IMAGES, digest))


def end_if_unused(state: str) -> None:
    """Unmount a LAZY, and all else that nobody uses, after umount(8) has taken away what was mounted over it."""
    point = os.path.join(state, serving.MOUNT_POINT)
    if not any(mount.has_data(point) for mount in mountinfo.mounts()):
        with _lock():
            tidy()


def tidy(*, unmounted: str = "") -> None:
    """Unmount what no mount uses, as a crash at any step may leave it.

    unmounted: a mount point that was unmounted just now, and not lazily: no file of it is open.
    """
    used = _used(unmounted)
    for mount in mountinfo.mounts():
        point = os.fsdecode(mount.point)
        if os.path.dirname(point) == run_directory("erofs") and point not in used:
            _quietly(point)
    for state in lazymount.states(run_directory("lazy")):
        if state not in used:
            lazymount.end(state, is_forced=bool(unmounted) and not serving.may_be_open(state))
    for name in _listed(run_directory("erofs")):
        if mountinfo.at(os.path.join(run_directory("erofs"), name)) is None:
            _remove_quietly(os.path.join(run_directory("erofs"), name))
    for name in _listed(run_directory("lazy")):
        state = os.path.join(run_directory("lazy"), name)
        if mountinfo.at(os.path.join(state, serving.MOUNT_POINT)) is None and not serving.is_alive(state):
            serving.remove_state(state)


def _used(unmounted: str) -> set[str]:
    """Directories of the EROFS and LAZY mounts that live mounts need; records of mounts that are gone go."""
    found = set()
    live = {(mount.point, mount.digest) for mount in mountinfo.mounts() if mount.fstype == b"overlay"}
    for name in _listed(run_directory("mounts")):
        try:
            record = json.loads(atomic.read_file(os.path.join(run_directory("mounts"), name), 1 << 20))
            if record["engine"] != ENGINE:
                continue
            is_live = (os.fsencode(record["point"]), record["digest"]) in live
            needs = {os.path.join(run_directory("erofs"), layer) for layer in record["layers"]} | {record["lazy"]}
            device = str(record.get("device", ""))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_live:
            found |= needs
        else:
            serving.note_gone(record["lazy"], device, record["point"])
            if record["point"] != unmounted:
                serving.note_detached(record["lazy"])
            atomic.unlink_quietly(os.path.join(run_directory("mounts"), name))
    return found


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _remove_quietly(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        pass


def _quietly(point: str) -> None:
    try:
        linux.umount(point, linux.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


def run_directory(name: str) -> str:
    """Where live state of a kind is."""
    return os.path.join(paths.run(), name)


def _lock() -> AbstractContextManager[None]:
    """One process at a time changes what is mounted here."""
    return serving.locked("kernel", "erofs")


def _fetch(store: Store, found: Image, *, is_trusted: bool) -> tuple[list[str], list[Locator]]:
    """Paths of the layers' metadata images, and their locators."""
    layers, locators = [], []
    for at in range(0, len(found.layers), _AT_ONCE):
        pairs = list(zip(found.layers, found.metadata, strict=True))[at : at + _AT_ONCE]
        get = partial(kept.get_metadata, store, is_trusted=is_trusted)
        metadata = [kept.begin(store, partial(get, *pair)) for pair in pairs]
        where = [kept.begin(store, partial(kept.get_locator, store, layer)) for layer, _ in pairs]
        layers += [result() for result in metadata]
        locators += [result() for result in where]
    return layers, locators


def _mount_erofs(path: str) -> str:
    """Mount a metadata image, or find it mounted: from the file itself (Linux 6.12), else through a loop device."""
    point = os.path.join(run_directory("erofs"), os.path.basename(path))
    if mountinfo.at(point) is not None:
        return point
    os.makedirs(point, mode=0o700, exist_ok=True)
    try:
        linux.mount(path, point, "erofs", linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise UnsupportedError(f"cannot mount a metadata image: {error.strerror}", hint="modprobe erofs") from error
        command = ["mount", "-t", "erofs", "-o", "loop,ro,nosuid,nodev", path, point]
        import subprocess

        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnsupportedError(f"cannot mount a metadata image: {done.stderr.strip()}", hint="modprobe loop") from None
    return point


def _mount_overlay(request: Request, found: Image, layers: list[str], data: list[str]) -> None:
    """layers: base first.  data: where the objects are."""
    settings = [("lowerdir+", layer) for layer in reversed(layers)] + [("datadir+", path) for path in data]
    settings += [("metacopy", "on"), ("xino", "auto")]
    with ExitStack() as stack:
        if request.upper:
            upper, work = stack.enter_context(upperdir.taken(request.upper, found, layers[-1]))
            settings += [("redirect_dir", "on"), ("upperdir", upper), ("workdir", work)]
        try:
            linux.mount_overlay(f"cafs:{found.digest.hex()}", request.point, settings, request.restrictions())
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise CafsError(f"cannot mount on {quote(request.point)}: {error.strerror}") from error
            raise UnsupportedError(f"cannot mount an overlay: {error.strerror}", hint="--engine fuse") from error
    linux.mount("", request.point, "", linux.MS_PRIVATE)
