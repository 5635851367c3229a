"""`crun exec`: one more command in a container that runs, with the same streams and exit codes as `crun run`."""

from __future__ import annotations

import json
import os
import signal

from cafs import atomic, linux
from cafs.errors import CafsError, UsageError, quote
from runner import privileges, spec, starting, stdio, users
from runner.foreground import Forwarder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container


def enter(container: Container, options: Options) -> int:
    """Run the command; returns its exit code.  Raises CafsError."""
    os.close(container.process())
    if container.status() == "paused":
        raise CafsError(f"container {quote(container.name)} is paused", hint=f"crun unpause {container.name}")
    name = f"exec-{os.urandom(8).hex()}"
    directory = container.path(name)
    os.mkdir(directory, 0o700)
    try:
        return _run(container, options, directory, int(container.state()["pid"]))
    finally:
        for one in os.listdir(directory):
            atomic.unlink_quietly(os.path.join(directory, one))
        os.rmdir(directory)


def _process(container: Container, options: Options, pid: int) -> dict[str, Any]:
    """process.json; users and programs are looked up in the container as it is now."""
    arguments = options.words[1:]
    if not arguments:
        raise UsageError("COMMAND is missing", hint="crun exec [FLAG]... CONTAINER COMMAND [ARGUMENT]...")
    base = json.loads(atomic.read_file(container.path("config.json"), 1 << 24))["process"]
    cwd = spec.check_cwd(options.value("workdir") or base["cwd"])
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        wanted = options.value("user")
        user = users.resolve(root, container.asked["user"] if wanted is None else wanted, container.all("group-add"))
        variables = spec.with_given(dict(word.split("=", 1) for word in base["env"]), options)
        if wanted is not None and "HOME" not in container.asked["env"]:
            variables["HOME"] = user.home
        starting.check_program(root, arguments[0], variables, cwd, "container")
    finally:
        os.close(root)
    held = privileges.granted_capabilities() if options.has("privileged") else base["capabilities"]["bounding"]
    effective = held if user.uid == 0 else []
    changed: dict[str, Any] = {
        "terminal": options.has("tty"),
        "args": arguments,
        "cwd": cwd,
        "env": [f"{name}={value}" for name, value in variables.items()],
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "capabilities": {"bounding": held, "effective": effective, "permitted": effective},
    }
    return {**base, **changed}


def _run(container: Container, options: Options, directory: str, init: int) -> int:
    process = _process(container, options, init)
    if options.has("tty"):
        process["env"] += [] if any(word.startswith("TERM=") for word in process["env"]) else ["TERM=xterm"]
    path = os.path.join(directory, "process.json")
    atomic.replace_hint(path, json.dumps(process).encode("utf-8", "surrogateescape"), 0o600)
    linux.become_subreaper()
    forward = Forwarder()
    is_detached = options.has("detach")
    console = stdio.Console(directory) if options.has("tty") else None
    first = int(container.state().get("ids") or 0)
    owner = first + process["user"]["uid"] if first else -1
    streams = None if console or is_detached else stdio.Streams(options.has("interactive"), owner=owner)
    log = os.path.join(directory, "runc.log")
    arguments = starting.runc("exec", "--detach", "--process", path, "--pid-file", os.path.join(directory, "pid"), log=log)
    if console:
        arguments += ["--console-socket", f"/proc/self/fd/{console.directory}/console"]
    null = users.open_null(init)  # for the host's would be theirs to change
    child, inherit = streams.child if streams else [null] * 3, [console.directory] if console else []
    status = starting.spawn([*arguments, container.id], child, inherit)
    os.close(null)
    if streams:
        streams.started()
    if status:
        raise starting.explain(log, "exec failed: ", "cannot run the command")
    if is_detached:
        if console:
            _drain(console.receive())
        return 0
    with open(os.path.join(directory, "pid"), encoding="ascii") as file:
        pid = int(file.read())
    forward.to(pid)
    if console:
        from runner.joining import Detacher, keys

        master = console.receive()
        detacher = Detacher(keys(options.value("detach-keys")) if os.isatty(0) else b"")
        if not stdio.run_terminal(master, options.has("interactive"), detacher=detacher):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            return 0
        os.close(master)
    _, status = os.waitpid(pid, 0)
    forward.stop()
    if streams:
        streams.drain()
    return linux.exit_code(status)


def _drain(master: int) -> None:
    """The terminal of a command that nobody waits for: what it prints there goes nowhere, as in docker, until it ends."""
    if not os.fork():
        try:
            linux.leave_session()
            while os.read(master, 1 << 16):
                pass
        finally:  # EIO says that it has ended
            os._exit(0)
    os.close(master)
