"""A request for a mount, and what every mount leaves for others to find: a record."""

from __future__ import annotations

import hashlib
import json
import os
import time

from cafs import atomic, linux, paths

FETCH_LIMIT_S = 60.0
_LIFTED = ("suid", "dev")


class Request:
    """What to mount and how.  name: IMAGE as given; point: mount point; foreground: serve in this process.

    engine: auto, kernel, fuse or pyfuse3.  upper: a directory for what is written.  why: the engine is another.
    extra: options of mount(8), of linux.MOUNT_FLAGS, and suid and dev.
    record: a file to record reads to.  prefetch: a profile, '' for the default one if there is one, 'all' for the
    whole image at RATE bytes a second (0: as fast as it comes), or 'none'.  trusts_cache: the caller has just had it checked,
    by another mount.
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
        trusts_cache: bool = False,
    ) -> None:
        self.name = name
        self.point = os.path.realpath(point)
        self.store = paths.located(store)  # the server works in /
        self.log = log and os.path.abspath(log)
        self.extra = extra or set()
        self.limit_s = limit_s
        self.foreground = foreground
        self.engine = engine
        self.upper = upper and os.path.realpath(upper)  # as the kernel shows it
        self.record = record and os.path.abspath(record)
        self.prefetch = prefetch
        self.rate = rate
        self.trusts_cache = trusts_cache
        self.why = ""
        self.warnings: list[str] = []

    def words(self) -> set[str]:
        """The options that the mount is to have: those given, ro without an upper, nosuid and nodev unless these are lifted."""
        words = self.extra | {f"no{word}" for word in _LIFTED if word not in self.extra}
        return words if self.upper else words | {"ro"}

    def restrictions(self) -> int:
        """The same as MS_…."""
        return sum(flag for word, flag in linux.MOUNT_FLAGS.items() if word in self.words())


def record_path(point: str) -> str:
    name = hashlib.sha256(os.fsencode(point)).hexdigest()[:32]
    return os.path.join(paths.run(), "mounts", f"{name}.json")


def write_record(request: Request, digest: str, engine: str, pid: int = 0, **more: object) -> None:
    """Note for --list; mountinfo stays the truth about what is mounted."""
    record = {"digest": digest, "engine": engine, "image": request.name, "pid": pid, "start": int(time.time())} | more
    path = record_path(request.point)
    try:
        paths.make_private(os.path.dirname(path))
        atomic.replace_hint(path, json.dumps(record, sort_keys=True).encode(), 0o600)
    except OSError as error:
        import logging  # not of use to crun, which reads records

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
    """A second signal finds nothing mounted any more, while the server still has users."""
    try:
        unmount_stale(point)
    except OSError:
        pass
