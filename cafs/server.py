"""The process behind a mount of the pyfuse3 engine: leaves its parent's session, serves, unmounts when told to end."""

from __future__ import annotations

import os

from cafs import atomic, linux, locator, paths, quota, stopping
from cafs.answer import ask_child, failure, tell
from cafs.cache import Cache
from cafs.holder import Holder
from cafs.keeper import Keeper, log_to
from cafs.request import record_path, unmount_quietly, write_record
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.request import Request
    from cafs.treemount import Source

_CLOSE_UP_TO = 4096


def start(request: Request, source: Source) -> None:
    """Fork a server in its own session; returns when it is mounted.  Its failure is raised here."""
    answer = ask_child(lambda writer: _daemon(request, source, writer))
    if answer != b"ok":
        raise failure(answer)


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
    linux.set_command_line("cafs-mount: serving")  # the address of a store may have a password in it

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


def serve(request: Request, source: Source, ready: Callable[[], None]) -> None:
    """With pyfuse3, in this process, until it is unmounted."""
    from cafs import fusefs, kept
    from cafs.tree import Tree

    record = record_path(request.point)
    log_to(request.log, "" if request.foreground else record.removesuffix(".json") + ".log")
    linux.raise_descriptor_limit()
    store = Store(request.store)
    cache = Cache(paths.cache(), store, limit_s=request.limit_s)
    limit = quota.quota(cache.root)
    digest = source.digest.hex()
    tree = Tree(source.index, cache, kept.find_locators(store, list(source.layers)))

    def mounted() -> None:
        write_record(request, digest, "pyfuse3", os.getpid())
        ready()

    # The server ends when the last user of the mount has.
    stopping.on_signals(stopping.NUMBERS, lambda _: unmount_quietly(request.point))
    quota.note_use(cache.root, source.digest, locator.contents(source.index))
    holder = Holder(store, lambda: {(digest, os.getpid())} if source.image else set())
    holder.start()
    keeper = Keeper(cache, limit)
    try:
        fusefs.serve(tree, request.point, f"cafs:{digest}", extra=request.words(), limit_s=request.limit_s, ready=mounted)
    finally:
        holder.let_go()
        tree.close()
        keeper.end()
        atomic.unlink_quietly(record)
