"""Mounting an image with whatever engine: checks, the list of mounts, unmounting."""

from __future__ import annotations

import errno
import os
import select
from contextlib import contextmanager

from cafs import atomic, image, linux, mountinfo, serving
from cafs import request as requests
from cafs.errors import BusyError, CafsError, NotFound, UnsupportedError, UsageError, os_error, quote
from cafs.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_EXIT_WAIT_MS = 5000
_RESTRICTIONS = {"ro", "nosuid", "nodev", "noexec", "nosymfollow"}


def mount(request: Request) -> str | None:
    """Mount, and return once the mount answers (foreground: once it is unmounted).

    Returns a note if the same image was mounted there already.  Raises NotFound, BusyError, UnsupportedError, CafsError.
    """
    _check_request(request)
    if request.engine in ("auto", "kernel"):
        done, note = _with_kernel(request)
        if done:
            return note
    if request.upper:
        raise UnsupportedError("only the kernel engine can be written to", hint="--engine kernel shows why not")
    from cafs import treemount

    source = treemount.find(request)
    note = check_point(request, source.digest.hex())
    if note:
        return note
    _check_host()
    if request.engine != "pyfuse3":
        note = treemount.mount(request, source)
    else:
        from cafs import server

        server.serve(request, source, lambda: None) if request.foreground else server.start(request, source)
    if not request.foreground:
        _check_answer(request.point)
    return note


def _check_request(request: Request) -> None:
    """Refuse what would be ignored.  Raises UsageError, UnsupportedError."""
    from cafs import profile

    if os.geteuid() and request.extra & {"suid", "dev"}:
        raise UnsupportedError("only root can have set-user-id bits and devices honoured")
    if request.engine == "pyfuse3" and (request.record or request.prefetch not in ("", profile.NONE)):
        raise UnsupportedError("the pyfuse3 engine can neither record nor prefetch", hint="--engine fuse")
    if request.record and request.prefetch not in ("", profile.NONE):
        raise UsageError("what is recorded is not prefetched: use one of the two")
    if request.rate and request.prefetch != profile.ALL:
        raise UsageError("a limit of bandwidth goes with prefetching all")


def _check_answer(point: str) -> None:
    try:
        os.stat(point)
    except OSError as error:
        raise os_error(f"mounted on {quote(point)}, but it does not answer", error) from error


def _with_kernel(request: Request) -> tuple[bool, str | None]:
    """Try the kernel engine: whether it is mounted now, and a note.  Raises CafsError; if 'auto', not for what is missing."""
    from cafs import kept, overlay

    try:
        if image.is_bare(request.name, request.store):
            raise UnsupportedError("the kernel engine mounts images of a store, not a bare index")
        if request.foreground:
            raise UnsupportedError("the kernel engine has nothing to stay for in the foreground")
        if os.geteuid():
            raise UnsupportedError("the kernel engine needs root")
        found = kept.find(request.store, request.name)
        note = check_point(request, found.image.digest.hex())
        if note is None:
            note = overlay.mount(request, found.image, found.store)
        request.warnings += [found.warning] if found.warning else []
        return True, note
    except UnsupportedError as error:
        if request.engine == "kernel":
            raise
        request.why = f"{error}: using the fuse engine"
        return False, None


def check_point(request: Request, digest: str) -> str | None:
    """A note if the image is mounted there as requested, None if the place is free.  Raises BusyError, CafsError."""
    point = request.point
    here = mountinfo.at(point)
    if here and (here.fstype == mountinfo.FSTYPE or mountinfo.is_kernel(here)):
        if not mountinfo.answers(point):
            requests.unmount_stale(point)
            here = None
        else:
            is_same = here.digest == digest and mountinfo.is_mine(here)
            if is_same and _is_as_requested(here, request):
                return f"already mounted on {point}"
            more = " with other options" if is_same else ""
            raise BusyError(
                f"{quote(point)} is taken: image {here.digest[:12]} is mounted there{more}",
                hint=f"cafs-mount --unmount {point}",
            )
    if here:
        raise BusyError(f"{quote(point)} is taken: a {here.fstype.decode()} file system is mounted there")
    try:
        names = os.listdir(point)
    except OSError as error:
        raise os_error(f"cannot mount on {quote(point)}", error) from error
    if names:
        raise CafsError(
            f"cannot mount on {quote(point)}: Directory not empty", hint="its content would be hidden; use an empty one"
        )
    return None


def _is_as_requested(here: mountinfo.Mount, request: Request) -> bool:
    """Whether a mount of the image writes where, and allows what, the request says; a new one alone can record and prefetch."""
    from cafs import profile

    is_there = here.upper == (os.path.join(request.upper, "upper") if request.upper else "")
    is_there = is_there and here.words & _RESTRICTIONS == request.words() & _RESTRICTIONS
    is_new = request.record or request.prefetch not in ("", profile.NONE)
    return is_there and not is_new and (request.engine == "auto" or mountinfo.is_kernel(here) == (request.engine == "kernel"))


def _check_host() -> None:
    try:
        if os.geteuid() == 0:  # an ordinary user's fusermount3 opens it for them
            os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        else:
            os.stat("/dev/fuse")
    except OSError as error:
        raise UnsupportedError(f"cannot open '/dev/fuse': {error.strerror}", hint="modprobe fuse; apt install fuse3") from error
    import shutil

    if os.geteuid() and not shutil.which("fusermount3"):
        raise UnsupportedError("cannot mount without root: no fusermount3", hint="apt install fuse3")


def listing() -> list[dict[str, object]]:
    """Our mounts: point, digest, engine, and what the record adds: image, pid, start."""
    found = []
    for one in mountinfo.ours():
        point = os.fsdecode(one.point)
        row: dict[str, object] = {
            "mountpoint": point,
            "digest": one.digest,
            "engine": "kernel" if mountinfo.is_kernel(one) else "fuse",
            "image": "",
            "pid": 0,
            "start": 0,
        }
        row.update(requests.read_record(point, one.digest))
        state = row.pop("state", None)
        if isinstance(state, str):
            row["pid"] = serving.pid(state) or row["pid"]
        found.append(row)
    return found


def reload() -> None:
    """Have the servers of all mounts start the program anew that is installed now; no read fails meanwhile."""
    from cafs import lazymount, overlay, treemount

    failed = None
    for state in [*lazymount.states(overlay.run_directory("lazy")), *treemount.states()]:
        try:
            serving.reload(state)
        except CafsError as error:
            failed = error
    if failed:
        raise failed


def unmount(point: str) -> None:
    """Unmount, and wait until the server has ended.  Raises NotFound, BusyError."""
    point = os.path.realpath(point)
    here = mountinfo.at(point)
    if not here or not (here.fstype == mountinfo.FSTYPE or mountinfo.is_kernel(here)):
        raise NotFound(f"nothing of ours is mounted on {quote(point)}", hint="cafs-mount --list")
    if mountinfo.is_kernel(here):
        _unmount_kernel(point)
        return
    record = requests.read_record(point, here.digest)
    if isinstance(record.get("state"), str):
        _unmount(point)
        is_used = any(
            mount.stands_on_tree(point) or (mount.device == here.device and os.fsdecode(mount.point) != point)
            for mount in mountinfo.elsewhere()
        )
        if not is_used:
            serving.end(str(record["state"]))  # a copied mount namespace would keep the servers for ever
        serving.wait_for_end(str(record["state"]))
        if not serving.is_alive(str(record["state"])):
            serving.remove_state(str(record["state"]))  # they were killed
            atomic.unlink_quietly(requests.record_path(point))
        return
    pid = record.get("pid", 0)
    pidfd = -1
    if isinstance(pid, int) and pid > 1:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = -1
    try:
        _unmount(point)
        if pidfd >= 0:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(_EXIT_WAIT_MS)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _unmount_kernel(point: str) -> None:
    from cafs import overlay

    with _unmounting(point):
        overlay.unmount(point)


@contextmanager
def _unmounting(point: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"cannot unmount {quote(point)}: it is in use", hint=f"fuser -vm {point}") from error
        raise os_error(f"cannot unmount {quote(point)}", error) from error


def _unmount(point: str) -> None:
    if os.geteuid() == 0:
        with _unmounting(point):
            linux.umount(point, linux.UMOUNT_NOFOLLOW)
        return
    import subprocess

    done = subprocess.run(["fusermount3", "-u", "--", point], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BusyError(f"cannot unmount {quote(point)}: {done.stderr.strip().rpartition(': ')[2]}")
