"""A request for a mount, and what every mount leaves for others to find: a record; how its server says what went wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time

from cafs import atomic, linux, paths
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FETCH_LIMIT_S = 60.0


class Request:
    """What to mount and how.  name: IMAGE as given; point: mount point; foreground: serve in this process.

    engine: auto, kernel, fuse or pyfuse3.  upper: a directory for what is written.  why: the engine is another.
    record: a file to record reads to.  prefetch: a profile, '' for the default one if there is one, 'all' for the
    whole image at RATE bytes a second (0: as fast as it comes), or 'none'.
    """

    def __init__(
        self,
        name: str,
        point: str,
        *,
        store: str,
        log: str | None = None,
        extra: set[str] | None = None,
        limit_s: float = FETCH_LIMIT_S,
        foreground: bool = False,
        engine: str = "fuse",
        upper: str | None = None,
        record: str | None = None,
        prefetch: str = "",
        rate: int = 0,
    ) -> None:
        self.name = name
        self.point = os.path.realpath(point)
        self.store = paths.located(store)  # the server works in /
        self.log = log and os.path.abspath(log)
        self.extra = extra or {"nosuid", "nodev"}
        self.limit_s = limit_s
        self.foreground = foreground
        self.engine = engine
        self.upper = upper and os.path.abspath(upper)
        self.record = record and os.path.abspath(record)
        self.prefetch = prefetch
        self.rate = rate
        self.why = ""
        self.warnings: list[str] = []

    def restrictions(self) -> int:
        """MS_NOSUID and MS_NODEV unless they are not wanted; as MOUNT_ATTR_… they are the same bits."""
        return sum(flag for word, flag in (("suid", linux.MS_NOSUID), ("dev", linux.MS_NODEV)) if word not in self.extra)


def ask_child(work: Callable[[int], int]) -> bytes:
    """Fork; what the child has written to the descriptor that WORK is called with, once nobody has that open any more.

    What WORK returns is the exit status of the child.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reader)
        os._exit(work(writer))
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read(65536)
    os.waitpid(child, 0)
    return answer


def failure(answer: bytes) -> CafsError:
    """What the server said instead of 'ok'."""
    try:
        code, message, hint = json.loads(answer)
    except ValueError:
        return CafsError("the server died while it mounted", hint="--foreground shows more")
    error = CafsError(message, hint=hint)
    error.exit_code = code
    return error


def tell(writer: int, error: BaseException) -> None:
    """Send an error to whoever waits for 'ok', or to the log if nobody does any more."""
    known = error if isinstance(error, CafsError) else CafsError(f"{type(error).__name__}: {error}")
    try:
        os.write(writer, json.dumps([known.exit_code, str(known), known.hint]).encode())
    except OSError:
        logging.getLogger(__name__).exception("server failed")


def record_path(point: str) -> str:
    name = hashlib.sha256(os.fsencode(point)).hexdigest()[:32]
    return os.path.join(paths.run(), "mounts", f"{name}.json")


def write_record(request: Request, digest: str, engine: str, pid: int = 0, **more: object) -> None:
    """Note for --list; mountinfo stays the truth about what is mounted."""
    record = {"digest": digest, "engine": engine, "image": request.name, "pid": pid, "start": int(time.time())} | more
    path = record_path(request.point)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        atomic.replace_hint(path, json.dumps(record, sort_keys=True).encode(), 0o600)
    except OSError as error:
        logging.getLogger(__name__).warning("cannot write %s: %s", path, error.strerror)


def read_record(point: str, digest: str) -> dict[str, object]:
    try:
        record = json.loads(atomic.read_file(record_path(point), 65536))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("digest") == digest else {}


def unmount_stale(point: str) -> None:
    if os.geteuid() == 0:
        linux.umount(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    else:
        import subprocess

        subprocess.run(["fusermount3", "-u", "-z", "--", point], capture_output=True, check=False)


def unmount_quietly(point: str) -> None:
    """For a signal handler: a second signal finds nothing mounted any more, while the server still has users."""
    try:
        unmount_stale(point)
    except OSError:
        pass
