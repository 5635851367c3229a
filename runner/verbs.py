"""What each command of crun but `run` does."""

from __future__ import annotations

import os
import sys
import time
from functools import partial

from cafs import linux
from cafs.errors import UnsupportedError, UsageError
from runner import containers, control, ending
from runner.each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.options import Options
    from runner.containers import Container


def call(verb: str, options: Options, more: dict[str, Callable[[Options], int]] | None = None) -> int:
    """Run a command; returns its exit code.  more: commands that need what is not the runner's.  Raises CafsError."""
    linux.close_on_exec()
    ending.tidy()
    return (_VERBS | (more or {}))[verb](options)


def _create(options: Options) -> int:
    from runner import alive, create

    container = create.create(options, is_foreground=False)
    alive.forget(container.id)
    os.close(container.lock)
    sys.stdout.write(container.id + "\n")
    return 0


def _each(options: Options, what: Callable[[Container], object], *, prints: bool = True, at_once: bool = False) -> int:
    return each(options.words, lambda word: what(containers.find(word)), prints=prints, at_once=at_once)


def _start(options: Options) -> int:
    if not options.has("attach") and not options.has("interactive"):
        return _each(options, control.start)
    if len(options.words) != 1:
        raise UsageError("only one container can be attached to")
    from runner import joining

    detach = joining.keys(options.value("detach-keys"))
    container = containers.find(options.words[0])
    before = time.time_ns()
    control.start(container)
    if container.has("tty") or container.asked["log"]["driver"] == "none":
        return _join(container, with_input=options.has("interactive"), detach=detach)
    if options.has("interactive") and container.has("interactive"):
        return joining.feed_and_follow(container, before)
    return joining.follow(container, before)


def _join(container: Container, *, with_input: bool, detach: bytes) -> int:
    from runner import joining

    connection = joining.connect(container)
    code = joining.join(container, connection, with_input=with_input and container.has("interactive"), detach=detach)
    return 0 if code is None else code


def _attach(options: Options) -> int:
    from runner import joining

    detach = joining.keys(options.value("detach-keys"))
    return _join(containers.find(options.words[0]), with_input=not options.has("no-stdin"), detach=detach)


def _time(options: Options) -> int | None:
    text = options.value("time")
    if text is None:
        return None
    if not text.removeprefix("-").isdigit():
        raise UsageError(f"--time is a number of seconds, not '{text}'")
    return int(text)


def _stop(options: Options) -> int:
    return _each(options, lambda one: control.stop(one, _time(options), options.value("signal")), at_once=True)


def _restart(options: Options) -> int:
    def again(container: Container) -> None:
        control.stop(container, _time(options), options.value("signal"))
        control.start(container)

    return _each(options, again)


def _kill(options: Options) -> int:
    return _each(options, lambda one: control.kill(one, options.value("signal") or "KILL"), at_once=True)


def _rm(options: Options) -> int:
    force = options.has("force")

    def remove(container: Container) -> None:
        control.remove(container, force=force, with_volumes=options.has("volumes"))

    return each(options.words, lambda word: remove(containers.find(word)), missing_ok=force, at_once=True)


def _wait(options: Options) -> int:
    def wait(container: Container) -> None:
        sys.stdout.write(control.wait(container) + "\n")
        sys.stdout.flush()

    return _each(options, wait, prints=False)


def _exec(options: Options) -> int:
    from runner.entering import enter

    return enter(containers.find(options.words[0]), options)


def _ps(options: Options) -> int:
    from runner import listing

    listing.ps(options)
    return 0


def _inspect(options: Options) -> int:
    from runner import listing

    listing.inspect(options)
    return 0


def _top(options: Options) -> int:
    from runner import listing

    listing.top(containers.find(options.words[0]), options.words[1:])
    return 0


def _diff(options: Options) -> int:
    from runner import changes

    changes.diff(containers.find(options.words[0]))
    return 0


def _logs(options: Options) -> int:
    from runner import logview

    return logview.show_logs(containers.find(options.words[0]), options)


def _stats(options: Options) -> int:
    from runner import listing

    listing.stats(options.words, options)
    return 0


def _events(options: Options) -> int:
    from runner import logview

    logview.events(options)
    return 0


def _port(options: Options) -> int:
    from runner import listing

    return listing.ports(containers.find(options.words[0]), options.words[1:])


def _network(verb: str, options: Options) -> int:
    if verb != "ls" and linux.in_user_namespace():
        raise UnsupportedError("networks need root", hint="--network none, or host")
    from runner.networkverbs import VERBS

    return VERBS[verb](options)


def _rename(options: Options) -> int:
    control.rename(containers.find(options.words[0]), options.words[1])
    return 0


def _cp(options: Options) -> int:
    from runner.copying import copy

    copy(options)
    return 0


def _gc(_: Options) -> int:
    from runner import holding, idmapping, networks

    holding.free_stale()
    if linux.in_user_namespace():
        from runner import rootless

        rootless.end_if_unused()
        return 0
    networks.free_stale()
    idmapping.free_stale()
    return 0


def _volume(verb: str, options: Options) -> int:
    from runner.volumeverbs import VERBS

    return VERBS[verb](options)


_VERBS: dict[str, Callable[[Options], int]] = {
    "create": _create,
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "kill": _kill,
    "rm": _rm,
    "ps": _ps,
    "logs": _logs,
    "exec": _exec,
    "attach": _attach,
    "wait": _wait,
    "inspect": _inspect,
    "pause": lambda options: _each(options, lambda one: control.pause(one, is_on=True)),
    "unpause": lambda options: _each(options, lambda one: control.pause(one, is_on=False)),
    "rename": _rename,
    "port": _port,
    "top": _top,
    "stats": _stats,
    "diff": _diff,
    "cp": _cp,
    "events": _events,
    **{f"volume {verb}": partial(_volume, verb) for verb in ("ls", "create", "inspect", "rm", "prune")},
    **{f"network {verb}": partial(_network, verb) for verb in ("ls", "create", "inspect", "rm", "prune")},
    "gc": _gc,
}
