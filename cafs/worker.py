"""The process that serves a mount, LAZY's or a tree's: the cache, the store, the leases, and the answers to /dev/fuse."""

from __future__ import annotations

import os
import signal
import sys
import threading

from cafs import fusedev, linux, quota, stopping
from cafs.cache import Cache
from cafs.holder import Holder
from cafs.keeper import Keeper, log_to, look_anew
from cafs.record import Recorder
from cafs.serving import LEASES, WORKER_FILE, images, is_over, note_pid, pid, read_config, unmount
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.reader import Reader

_SWITCH_S = 0.00005


def work(state: str, fd: int, columns: int, ready: Callable[[], None]) -> None:
    """Serve; returns once the file system is unmounted, or after SIGTERM.

    fd: of /dev/fuse; columns: of a tree, -1 for LAZY; ready: called when nothing can go wrong any more.
    """
    config = read_config(state)
    log_to(config["log"], "" if config["foreground"] else os.path.join(state, "log"))
    linux.raise_descriptor_limit()
    linux.set_up_heap()
    sys.setswitchinterval(_SWITCH_S)  # a read that waits goes before what is put into the cache behind it
    store = Store(config["store"], (config["hash"], config["chunk_size"]))
    cache = Cache(config["cache"], store, limit_s=config["limit_s"])
    recorder = Recorder(config["record"], store.hash_name, store.chunk_size) if config["record"] else None
    holder = Holder(store, lambda: _held(state), os.path.join(state, LEASES))
    files = _files(state, config, cache, recorder, columns, holder.poke)
    server = fusedev.Server(fd, files, config["limit_s"])
    is_foreground = bool(config["foreground"])
    numbers = stopping.NUMBERS if is_foreground else (signal.SIGINT, signal.SIGTERM)  # a supervisor heeds SIGHUP
    stopping.on_signals(numbers, lambda _: unmount(state) if is_foreground else server.stop())
    note_pid(state, WORKER_FILE)
    files.brought = cache.evicted = lambda: look_anew(cache.root)
    is_lazy = columns < 0
    keeper = Keeper(cache, quota.quota(cache.root), is_synced=is_lazy, trimmed=cache.evicted)
    keeper.also = lambda: _look_after(state, cache.root, is_lazy=is_lazy)
    ready()
    server.take_over()
    if is_over(state, fd):  # said before anybody could hear it
        server.stop()
    threading.Thread(target=holder.start, daemon=True).start()  # the store may take its time, or be away
    server.serve()
    files.save()
    if is_over(state, fd):
        keeper.end()
        holder.let_go()
    else:
        keeper.count()  # the next worker goes on with the leases, and all else


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


def _look_after(state: str, cache_root: str, *, is_lazy: bool) -> None:
    quota.still_used(cache_root, images(state))
    if is_lazy:
        from cafs import overlay

        overlay.end_if_unused(state)


def _held(state: str) -> set[tuple[str, int]]:
    """The images, for this process and for the supervisor: the leases live on when one of them is killed."""
    return {(one, process) for one in images(state) for process in (os.getpid(), pid(state) or os.getpid())}
