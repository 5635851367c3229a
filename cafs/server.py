"""What every mount has: the request for it, a record, a log; and the process behind one of the pyfuse3 engine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

from cafs import atomic, ledger, linux, locator, paths, quota
from cafs.cache import FETCH_LIMIT_S, Cache
from cafs.errors import CafsError, os_error, quote
from cafs.holder import Holder
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.treemount import Source

_CLOSE_UP_TO = 4096
_TRIM_AFTER = 256 << 20
_KEEP_EVERY_S = 10
_SYNC_EVERY_S = 30
_EXIT_WAIT_S = 2


class Request:
    """What to mount and how.  name: IMAGE as given; point: mount point; foreground: serve in this process.

    engine: auto, kernel, fuse or pyfuse3.  upper: a directory for what is written.  why: the engine is another.
    record: a file to record reads to.  prefetch: a profile, '' for the default one if there is one, or 'none'.
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
        self.why = ""
        self.warnings: list[str] = []


def start(request: Request, source: Source) -> None:
    """Fork a server in its own session; returns when it is mounted.  Its failure is raised here."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_daemon(request, source, writer))
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read(65536)
    os.waitpid(child, 0)
    if answer != b"ok":
        raise failure(answer)


def failure(answer: bytes) -> CafsError:
    """What the server said instead of 'ok'."""
    try:
        code, message, hint = json.loads(answer)
    except ValueError:
        return CafsError("the server died while it mounted", hint="--foreground shows more")
    error = CafsError(message, hint=hint)
    error.exit_code = code
    return error


def _daemon(request: Request, source: Source, writer: int) -> int:
    """In the child: fork again, so that nobody has to wait for the server; report 'ok' or the error through the pipe."""
    os.setsid()
    if os.fork():
        return 0
    first, last = sorted((writer, source.fd))
    os.closerange(3, first)  # whoever waits for the end of a pipe or a lock of the caller's must not wait for us
    os.closerange(first + 1, last)
    os.closerange(last + 1, _CLOSE_UP_TO)
    os.chdir("/")

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(writer, b"ok")
        os.close(writer)

    try:
        serve(request, source, ready)
    except BaseException as error:  # the only way out of this process
        tell(writer, error)
        return 1
    return 0


def tell(writer: int, error: BaseException) -> None:
    """Send an error to whoever waits for 'ok', or to the log if nobody does any more."""
    known = error if isinstance(error, CafsError) else CafsError(f"{type(error).__name__}: {error}")
    try:
        os.write(writer, json.dumps([known.exit_code, str(known), known.hint]).encode())
    except OSError:
        logging.getLogger(__name__).exception("server failed")


def serve(request: Request, source: Source, ready: Callable[[], None]) -> None:
    """With pyfuse3, in this process, until it is unmounted."""
    from cafs import columns, fusefs, kept
    from cafs.tree import Tree

    record = record_path(request.point)
    log_to(request.log, "" if request.foreground else record.removesuffix(".json") + ".log")
    linux.raise_descriptor_limit()
    store = Store(request.store)
    cache = Cache(paths.cache(), store, limit_s=request.limit_s)
    limit = quota.quota(cache.root)
    index, digest = columns.load(source.fd), source.digest.hex()
    tree = Tree(index, cache, kept.find_locators(store, list(source.layers)))

    def mounted() -> None:
        write_record(request, digest, "pyfuse3", os.getpid())
        ready()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server ends when the last user of the mount has
        signal.signal(number, lambda *_: _unmount_quietly(request.point))
    quota.note_use(cache.root, source.digest, locator.contents(index))
    holder = Holder(store, lambda: {(digest, os.getpid())} if source.is_image else set())
    holder.start()
    keeper = Keeper(cache, limit)
    try:
        fusefs.serve(tree, request.point, f"cafs:{digest}", extra=request.extra, limit_s=request.limit_s, ready=mounted)
    finally:
        holder.let_go()
        tree.close()
        keeper.end()
        atomic.unlink_quietly(record)


class Keeper:
    """Looks after the cache from a thread of its own: counters, and the quota, at first and after so much was fetched.

    trimmed: called when something went from the cache.
    is_synced: also write what was fetched to disk every half a minute, for mounts that read it without verifying it.
    """

    def __init__(
        self, cache: Cache, limit: int, *, is_synced: bool = False, trimmed: Callable[[], None] = lambda: None
    ) -> None:
        self._cache = cache
        self._limit = limit
        self._fetched = _TRIM_AFTER
        self._is_synced = is_synced
        self._trimmed = trimmed
        self._unsynced, self._synced = 1, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The last time."""
        self._ended.set()
        self._thread.join(_EXIT_WAIT_S)
        self._once()

    def _run(self) -> None:
        while True:
            self._once()
            if self._ended.wait(_KEEP_EVERY_S):
                return

    def _once(self) -> None:
        counted = self._cache.take_stats()
        if counted.hits or counted.misses:
            quota.add_stats(self._cache.root, counted)
        self._fetched += counted.bytes_fetched
        self._unsynced += counted.bytes_fetched
        if self._is_synced and self._unsynced and time.monotonic() - self._synced > _SYNC_EVERY_S:
            self._unsynced, self._synced = 0, time.monotonic()
            self._try(lambda: ledger.sync(self._cache.root))
        if self._fetched >= min(_TRIM_AFTER, self._limit // 20):
            self._fetched = 0
            self._try(self._trim)

    def _trim(self) -> None:
        if quota.trim(self._cache.root, self._limit).files:
            self._trimmed()

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            logging.getLogger(__name__).warning("cannot look after cache %s: %s", self._cache.root, error.strerror)


def log_to(path: str | None, otherwise: str) -> None:
    """Log to PATH; without one to syslog, and where there is none to the file OTHERWISE; with neither to standard error."""
    import logging.handlers

    handler: logging.Handler
    try:
        if not path and otherwise and os.path.exists("/dev/log"):
            handler = logging.handlers.SysLogHandler("/dev/log")
            handler.setFormatter(logging.Formatter("cafs-mount[%(process)d]: %(message)s"))
        elif path or otherwise:
            os.makedirs(os.path.dirname(path or otherwise), mode=0o700, exist_ok=True)
            handler = logging.FileHandler(path or otherwise, delay=not path)
            handler.setFormatter(logging.Formatter("%(asctime)s cafs-mount[%(process)d]: %(levelname)s: %(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("cafs-mount: %(message)s"))
    except OSError as error:
        raise os_error(f"cannot log to {quote(path or otherwise)}", error) from error
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def record_path(point: str) -> str:
    name = hashlib.sha256(os.fsencode(point)).hexdigest()[:32]
    return os.path.join(paths.run(), "mounts", f"{name}.json")


def write_record(request: Request, digest: str, engine: str, pid: int = 0, **more: object) -> None:
    """Note for --list; mountinfo stays the truth about what is mounted."""
    record = {"digest": digest, "engine": engine, "image": request.name, "pid": pid, "start": int(time.time())} | more
    path = record_path(request.point)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        atomic.replace_file(path, json.dumps(record, sort_keys=True).encode(), 0o600)
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
        subprocess.run(["fusermount3", "-u", "-z", "--", point], capture_output=True, check=False)


def _unmount_quietly(point: str) -> None:
    """In a signal handler: a second signal finds nothing mounted any more, while the server still has users."""
    try:
        unmount_stale(point)
    except OSError:
        pass
