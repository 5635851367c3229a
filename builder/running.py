"""RUN: a container of what the stage has come to, whose upper directory becomes the next layer.

The container is made in a child process, for it changes its mount namespace, and is removed when its files are read.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from builder import leaks
from cafs import commit, image, linux, stopping
from cafs.answer import failure, tell
from cafs.errors import CafsError
from cafs.upper import UpperWalk, prefix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.lookup import Node
    from cafs.writer import Writer
    from runner.containers import Container

HOSTNAME = "buildkitsandbox"
_PIECE = 1 << 16


class StepError(CafsError):
    """A command that failed.  code: its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Command:
    """words: what to run.  flags: of crun, beside those set here.  mounts: as of runner.create.

    secrets: by id, those that must not be in what it leaves.  secret_env: variables that are not written down with the others,
    but for a file in bundle, a directory in memory.
    """

    words: list[str]
    env: dict[str, str]
    cwd: str
    user: str
    flags: dict[str, list[str]] = field(default_factory=dict)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    secrets: dict[str, bytes] = field(default_factory=dict)
    secret_env: dict[str, str] = field(default_factory=dict)
    bundle: str = ""
    trusts_cache: bool = False


def run(
    writer: Writer, layers: image.Image, below: Node, command: Command, said: Callable[[bytes], None], latest_ns: int = -1
) -> bytes:
    """Run it over an image's layers; returns the index of what it has changed, whose objects are put.

    below: the root of their tree.  said: gets its output.  latest_ns: as of commit.make_layer.  Raises StepError, CafsError.
    """
    from runner import containers, control

    store = writer.store
    parent = image.put_layers(store, layers.layers, {}, layers.metadata)
    identity, code, problem, stopped = _in_child(store.root, parent.digest.hex(), command, said)
    container = containers.load(identity) if identity else None
    try:
        if stopped:
            raise stopped
        if problem:
            refused = failure(problem)
            refused.exit_code = 1 if refused.exit_code in (125, 126, 127) else refused.exit_code
            raise refused
        if code:
            raise StepError(f"exit code {code}" if code < 128 else f"exit code {code} ({_signal_name(code - 128)})", code)
        if container is None:
            raise CafsError("the container of the step is gone")
        leaks.check(container.path("upper"), command.secrets)
        return _index(writer, below, container, latest_ns)
    finally:
        if container is not None:
            control.remove(container, force=True, with_volumes=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _index(writer: Writer, below: Node, container: Container, latest_ns: int) -> bytes:
    from runner import stubs

    walk = UpperWalk(container.path("upper"), below, prefix(), frozenset(map(os.fsencode, stubs.noted(container))))
    return commit.make_layer(walk, writer, os.cpu_count() or 1, latest_ns=latest_ns)


def _in_child(
    store_root: str, digest: str, command: Command, said: Callable[[bytes], None]
) -> tuple[str, int, bytes, BaseException | None]:
    """(the container's id, exit code of the command, why it could not be started, what has stopped us)."""
    stopped: BaseException | None = None
    output, their_output = os.pipe2(os.O_CLOEXEC)
    answers, their_answers = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        _be_child(store_root, digest, command, their_output, their_answers)
    os.close(their_output)
    os.close(their_answers)
    try:
        while stopping.wait(output) and (data := os.read(output, _PIECE)):
            said(data)
    except BaseException as error:
        stopped = error
        os.kill(child, signal.SIGKILL)
    os.close(output)
    status = os.waitpid(child, 0)[1]
    with open(answers, "rb") as pipe:  # its end comes when those who tidy up after the child have ended too
        identity, _, problem = pipe.read(_PIECE).partition(b"\n")
    return identity.decode(), linux.exit_code(status), problem, stopped


def _be_child(store_root: str, digest: str, command: Command, output: int, answers: int) -> None:
    """Never returns."""
    try:
        from cafs.options import Options
        from runner import foreground

        linux.die_with_parent()
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, to in ((null, 0), (output, 1), (output, 2)):
            os.dup2(fd, to)
        os.close(output)
        flags = {
            "env": [f"{name}={value}" for name, value in command.env.items()],
            "hostname": [HOSTNAME],
            "log-driver": ["none"],
            "store": [store_root],
            "user": [command.user],
            "workdir": [command.cwd],
            **command.flags,
        }
        options = Options(flags, [digest, *command.words])
        one = foreground.make(options, more=command.mounts, trusts_cache=command.trusts_cache, is_volatile=True)
        container = one.container
        container.asked["env"] |= command.secret_env
        container.asked["bundle"] = command.bundle
        os.write(answers, container.id.encode() + b"\n")
        code = one.run()
        os._exit(code)
    except BaseException as error:
        os.write(answers, b"\n") if "container" not in locals() else None
        tell(answers, error)
    finally:
        os._exit(125)
