"""The directory of a writable mount: the changes of one image, mounted once at a time.  cafs-mount(1), --rw.

DIR/upper and DIR/work are overlayfs'; DIR/image.json says which image the changes belong to.  Overlayfs checks neither: two
mounts of one upper directory are "undefined behavior", and over another image it completes what it copied up in part (metacopy,
redirect) from files of the wrong tree.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager

from cafs import atomic, mountinfo, paths
from cafs.errors import BusyError, FormatError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.image import Image

_NOTE = "image.json"
_NOTE_MAX = 1 << 20
_OVERLAY = "trusted.overlay."


@contextmanager
def taken(directory: str, image: Image, top: str) -> Iterator[tuple[str, str]]:
    """Yield the upper and the work directory, locked while the block mounts IMAGE over them.

    top: where the topmost layer is mounted; a new upper directory is the root of the tree and takes that one's attributes.
    Raises BusyError if it is mounted already or holds changes of another image; CafsError.
    """
    with ExitStack() as stack:
        try:
            if not os.path.lexists(directory):
                paths.make_private(directory)  # what is copied up may be a program with the set-user-id bit
            stack.enter_context(atomic.locked(directory))  # the lock of live state does not bind another CAFS_RUN
            upper, work = (os.path.join(directory, name) for name in ("upper", "work"))
            if os.path.lexists(upper):
                _check_unused(directory, upper)
            _note(directory, upper, image, top)
            paths.make_private(work)
        except OSError as error:
            raise os_error(f"cannot write to {quote(directory)}", error) from error
        yield upper, work


def _check_unused(directory: str, upper: str) -> None:
    """Raise BusyError if an overlay writes to it."""
    if (user := mountinfo.writer_to(upper)) is not None:
        pid, mount = user
        where = "" if pid == "self" else f" in the mount namespace of process {pid}"
        raise BusyError(f"{quote(directory)} is in use: it is mounted on {quote(mount.point)}{where}", hint="another UPPERDIR")


def _note(directory: str, upper: str, image: Image, top: str) -> None:
    """Record which image the changes belong to.  Raises BusyError if they belong to another; FormatError."""
    note = os.path.join(directory, _NOTE)
    mine = {"image": image.digest.hex(), "layers": [layer.hex() for layer in image.layers]}
    try:
        noted = json.loads(atomic.read_file(note, _NOTE_MAX))
        theirs, layers = str(noted["image"])[:12], noted["layers"]
    except FileNotFoundError:
        theirs, layers = "", None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"malformed record {quote(note)}: {error}", hint="remove it if the image is the right one") from None
    if layers == mine["layers"]:
        return
    if theirs and os.path.lexists(upper) and os.listdir(upper):
        raise BusyError(
            f"{quote(directory)} has changes to image {theirs}, not to {mine['image'][:12]}",
            hint=f"mount {theirs} there and make an image of both with 'cafs-index create', or name another UPPERDIR",
        )
    if theirs or not os.path.lexists(upper):
        os.makedirs(upper, exist_ok=True)
        copy_attributes(top, upper)
    atomic.replace_file(note, json.dumps(mine, sort_keys=True).encode() + b"\n")


def copy_attributes(source: str, target: str) -> None:
    """Give an upper directory, which is the root of the tree, what the root below it has."""
    status = os.stat(source)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source):
        if not name.startswith(_OVERLAY):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
