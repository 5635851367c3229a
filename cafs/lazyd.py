"""The two processes of LAZY, or of a tree: supervisor and worker watch each other; only both dying at once ends the mount.

Each holds the descriptor of /dev/fuse, and a pidfd of the other (pidfd_open(2)).  When the worker dies the supervisor starts
another, which has the requests of the dead one sent again.  When the supervisor dies the worker starts another.  SIGHUP to the
supervisor: start both programs anew, with whatever version is installed now.

usage: python -m cafs.lazyd worker|supervisor STATE FUSE_FD PEER_PIDFD COLUMNS_FD
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import select
import signal
import sys
import threading
import time

from cafs import atomic
from cafs import request as requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

    from cafs.cache import Cache
    from cafs.reader import Reader
    from cafs.record import Recorder
    from cafs.request import Request
    from cafs.store import Store

CONFIG = "config.json"
PID_FILE, WORKER_FILE, ALIVE = "supervisor", "worker", "alive"
LEASES, IMAGES, LOCATORS, PREFETCH, MOUNT_POINT = "leases", "images", "locators", "prefetch", "mnt"
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_SMALL_AFTER_MS = 1000
_SOON_S = 1.0
_SWITCH_S = 0.0002
_WAIT_MAX_S = 2.0
_END_WAIT_S = 2.0


def write_config(state: str, store: Store, cache: str, request: Request, **more: object) -> None:
    """What both need to know, in the directory STATE.  more: of a tree, its layers, mount point, and note for --list."""
    config = {
        "cache": os.path.realpath(cache),
        "chunk_size": store.chunk_size,
        "foreground": request.foreground,
        "hash": store.hash_name,
        "limit_s": request.limit_s,
        "log": request.log,
        "record": request.record,
        "store": store.root,
    }
    with open(os.path.join(state, CONFIG), "x", encoding="utf-8") as file:
        json.dump(config | more, file, sort_keys=True)


def note_prefetch(state: str, **what: object) -> None:
    """Ask for something to be brought into the cache.  what: profile=files, or layers= and rate= for all."""
    data = json.dumps(what, sort_keys=True).encode()
    atomic.replace_hint(os.path.join(state, PREFETCH, hashlib.sha256(data).hexdigest()[:16]), data)


def _read_config(state: str) -> dict[str, Any]:
    with open(os.path.join(state, CONFIG), "rb") as file:
        config: dict[str, Any] = json.load(file)
        return config


def start(role: str, state: str, fd: int, peer: int, columns: int) -> subprocess.Popen[bytes]:
    """Start one of the two.  peer: a pidfd of the other, -1: none yet; columns: of a tree, else -1."""
    import subprocess

    keep = [one for one in (fd, peer, columns) if one >= 0]
    null = subprocess.DEVNULL
    command = _command(role, state, fd, peer, columns)
    return subprocess.Popen(command, pass_fds=keep, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)


def wait(answers: int) -> None:
    """Wait for the worker that `begin` has started.  answers: what it returned.  Raises CafsError if it cannot begin."""
    with open(answers, "rb") as pipe:
        answer = pipe.read(65536)
    if answer != b"ok":
        raise requests.failure(answer)


def begin(state: str, fd: int, columns: int = -1) -> int:
    """Start both for a file system that was just mounted; returns a descriptor for `wait`.

    By fork, for the caller has loaded what the worker needs; the supervisor then runs the program anew, to be small.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(writer)
        os.waitpid(child, 0)
        return reader
    try:
        if os.fork():
            os._exit(0)  # nobody has to wait for the supervisor
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        mine = os.pidfd_open(os.getpid())
        _close_all_but(*(one for one in (fd, mine, writer, columns) if one >= 0))
        _note(state, PID_FILE)
        worker = os.fork()
        if not worker:
            _first_work(state, fd, mine, columns, writer)
        peer = os.pidfd_open(worker)
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is somebody to handle them
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        poll.poll(_SMALL_AFTER_MS)  # what mounts needs the processor now
        if is_unmounted(fd):
            _end(state)
            os._exit(0)
        _supervise_anew(state, fd, peer, columns)
    finally:
        os._exit(1)


def _supervise_anew(state: str, fd: int, peer: int, columns: int) -> None:
    """Run the supervisor's program, as it is installed now, in this process."""
    for one in (fd, peer, columns):
        if one >= 0:
            os.set_inheritable(one, True)
    os.execv(sys.executable, _command("supervisor", state, fd, peer, columns))


def _first_work(state: str, fd: int, mine: int, columns: int, writer: int) -> None:
    def ready() -> None:
        os.write(writer, b"ok")
        os.close(writer)

    try:
        os.setsid()
        work(state, fd, mine, columns, ready)
    except BaseException as error:  # the only way out of this process
        requests.tell(writer, error)
    finally:
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    """Whoever waits for the end of a pipe or a lock of the caller's must not wait for us."""
    first = 3
    for one in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, one)
        first = one + 1


def _command(role: str, state: str, *fds: int) -> list[str]:
    return [sys.executable, "-P", "-m", "cafs.lazyd", role, state, *map(str, fds)]


def is_unmounted(fd: int) -> bool:
    """Whether nothing uses the file system any more: the connection is gone."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def supervise(state: str, fd: int, peer: int, columns: int = -1) -> None:
    """Keep a worker alive until the file system is unmounted, then remove STATE."""
    _note(state, PID_FILE)
    mine = os.pidfd_open(os.getpid())
    signals = _on_signal()
    wait_s = 0.0
    while not is_unmounted(fd):
        started = time.monotonic()
        if peer < 0:
            peer = os.pidfd_open(start("worker", state, fd, mine, columns).pid)
        if _ends(peer, signals, lambda: _unmount(state)):
            _supervise_anew(state, fd, peer, columns)
        os.close(peer)
        peer = -1
        _reap()
        wait_s = min(wait_s * 2 + 0.05, _WAIT_MAX_S) if time.monotonic() - started < _SOON_S else 0.0
        time.sleep(wait_s)  # one that dies at once is not started over and over
    _end(state)


def _end(state: str) -> None:
    """Nothing is mounted any more: remove what told of it."""
    try:
        notes = _read_config(state).get("notes")
        if notes and json.loads(atomic.read_file(notes, 1 << 16)).get("state") == state:
            atomic.unlink_quietly(notes)
    except (OSError, ValueError):
        pass  # they are gone already
    remove_state(state)


def _unmount(state: str) -> None:
    """What `kill` of a tree's server means; LAZY ends when the mounts over it do."""
    point = _read_config(state).get("point")
    if point:
        try:
            requests.unmount_stale(point)
        except OSError:
            pass  # it is unmounted, and still in use


def _note(state: str, name: str) -> None:
    """Write our pid, and hold a lock for as long as we live, also when we run the program anew."""
    atomic.replace_hint(os.path.join(state, name), b"%d\n" % os.getpid(), 0o600)
    os.set_inheritable(hold(state), True)


def hold(state: str) -> int:
    """A descriptor that keeps STATE from being taken for that of a dead server."""
    fd = os.open(os.path.join(state, ALIVE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def pid(state: str) -> int:
    """Of the supervisor, 0 if there is none."""
    try:
        return int(atomic.read_file(os.path.join(state, PID_FILE), 32))
    except (OSError, ValueError):
        return 0


def reload(state: str) -> None:
    """Start both programs anew.  Raises CafsError if the supervisor does not live."""
    from cafs.errors import CafsError, quote

    try:
        os.kill(int(atomic.read_file(os.path.join(state, PID_FILE), 32)), signal.SIGHUP)
    except (OSError, ValueError) as error:
        raise CafsError(f"what serves {quote(state)} cannot be reached: {error}") from error


def is_alive(state: str) -> bool:
    """Whether one of the two lives."""
    try:
        fd = os.open(os.path.join(state, ALIVE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wait_for_end(state: str) -> None:
    """Until the servers of what was just unmounted have gone, if they do soon: others may still use it."""
    deadline = time.monotonic() + _END_WAIT_S
    while is_alive(state) and time.monotonic() < deadline:
        time.sleep(0.005)


def remove_state(state: str) -> None:
    """Remove the directory of a LAZY that has ended; nothing is mounted in it any more.  Others may do the same."""
    for directory in (IMAGES, LOCATORS, PREFETCH, ""):
        top = os.path.join(state, directory)
        try:
            names = sorted(os.listdir(top), key=lambda name: name == ALIVE)
        except OSError:
            continue
        for name in names:
            if not os.path.isdir(os.path.join(top, name)):
                atomic.unlink_quietly(os.path.join(top, name))
    for directory in (IMAGES, LOCATORS, PREFETCH, MOUNT_POINT, ""):
        try:
            os.rmdir(os.path.join(state, directory))
        except OSError:
            pass


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _on_signal() -> int:
    """A descriptor from which the numbers of the signals are read that come: SIGHUP, SIGINT, SIGTERM."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return reader


def _ends(pidfd: int, signals: int, unmount: Callable[[], None]) -> bool:
    """Wait until a process ends (False) or SIGHUP has come and it was told to end (True)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(signals, select.POLLIN)
    while True:
        if pidfd in dict(poll.poll()):
            return False
        for number in os.read(signals, 64):
            if number == signal.SIGHUP:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                return True
            if number in (signal.SIGINT, signal.SIGTERM):
                unmount()


def work(state: str, fd: int, peer: int, columns: int = -1, ready: Callable[[], None] = lambda: None) -> None:
    """Serve; returns once the file system is unmounted, or after SIGTERM.  ready: called when nothing can go wrong any more."""
    config = _read_config(state)
    from cafs import fusedev, linux, quota
    from cafs.cache import Cache
    from cafs.holder import Holder
    from cafs.keeper import Keeper, log_to
    from cafs.record import Recorder
    from cafs.store import Store

    log_to(config["log"], "" if config["foreground"] else os.path.join(state, "log"))
    linux.raise_descriptor_limit()
    sys.setswitchinterval(_SWITCH_S)  # a read that waits goes before what is put into the cache behind it
    store = Store(config["store"], (config["hash"], config["chunk_size"]))
    cache = Cache(config["cache"], store, limit_s=config["limit_s"])
    recorder = Recorder(config["record"], store.hash_name, store.chunk_size) if config["record"] else None
    holder = Holder(store, lambda: {(one, pid) for one in images(state) for pid in _pids(state)}, os.path.join(state, LEASES))
    files = _files(state, config, cache, recorder, columns, holder.poke)
    serving = fusedev.Server(fd, files, config["limit_s"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _unmount(state) if config["foreground"] else serving.stop())
    _note(state, WORKER_FILE)
    files.brought = cache.evicted = lambda: reconfigure(cache.root)
    is_lazy = columns < 0
    keeper = Keeper(cache, quota.quota(cache.root), is_synced=is_lazy, trimmed=cache.evicted)
    if peer >= 0:
        watch(peer, lambda: _revive(state, fd, columns))
    ready()
    serving.take_over()
    threading.Thread(target=holder.start, daemon=True).start()  # the store may take its time, or be away
    serving.serve()
    files.save()
    keeper.end()
    if is_unmounted(fd):
        holder.let_go()  # else the next worker goes on with the leases


def _files(
    state: str, config: dict[str, Any], cache: Cache, recorder: Recorder | None, columns: int, noticed: Callable[[], None]
) -> Reader:
    """What is served: a tree if there are columns, else LAZY."""
    if columns < 0:
        from cafs.lazy import Lazy

        return Lazy(state, cache, recorder, noticed)
    from cafs import kept
    from cafs.columns import load
    from cafs.treefs import TreeFiles

    locators = kept.find_locators(cache.store, [bytes.fromhex(layer) for layer in config["layers"]])
    files = TreeFiles(load(columns), cache, locators, state=state, recorder=recorder)
    files.look_for_requests()
    return files


def images(state: str) -> set[str]:
    """Digests of the images that are mounted."""
    return {name for name in os.listdir(os.path.join(state, IMAGES)) if re.fullmatch("(?:[0-9a-f]{2})+", name)}


def reconfigure(cache: str) -> None:
    """Have the mounts over a cache look anew what it has.

    Overlayfs remembers, for the life of an inode, in which layer it found a file: what LAZY served is not asked of the cache
    that has it now, and what went from the cache takes its space until then.
    """
    from cafs import linux, mountinfo

    for mount in mountinfo.over(cache):
        try:
            linux.reconfigure(os.fsdecode(mount.point), is_read_only=not mount.is_writable)
        except OSError:
            continue  # it went meanwhile; it costs space or speed until its last user has gone


def _pids(state: str) -> set[int]:
    """Of this process and the supervisor, so that the leases live on when one of them is killed."""
    try:
        return {os.getpid(), int(atomic.read_file(os.path.join(state, PID_FILE), 32))}
    except (OSError, ValueError):
        return {os.getpid()}


def _revive(state: str, fd: int, columns: int) -> subprocess.Popen[bytes]:
    mine = os.pidfd_open(os.getpid())
    try:
        return start("supervisor", state, fd, mine, columns)
    finally:
        os.close(mine)


def watch(peer: int, revive: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Start another supervisor whenever one dies, from a thread."""

    def run() -> None:
        pidfd = peer
        while True:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
            os.close(pidfd)
            child = revive()
            pidfd = os.pidfd_open(child.pid)
            time.sleep(0.05)

    threading.Thread(target=run, daemon=True).start()


if __name__ == "__main__":
    {"supervisor": supervise, "worker": work}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:6]))
    os._exit(0)  # not waiting for threads that wait for a store
