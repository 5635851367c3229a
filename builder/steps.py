"""RUN: from an instruction to a command, what its key depends on, and what is mounted while it runs."""

from __future__ import annotations

import os
import re
import stat
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from builder import agent, cachemounts, copying, mounts, scratch
from builder import flags as flagging
from builder.adding import Gathered, Source
from builder.config import PROXIES, absolute, command_words
from builder.mounts import Mount
from builder.running import Command
from cafs import paths
from cafs.errors import CafsError, NotFound, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from builder.config import State
    from builder.flags import Flags
    from builder.lexer import Heredoc, Instruction
    from builder.request import Step
    from builder.work import Work

PIPES = "/dev/pipes"
_CHOICES = {"network": ("default", "none", "host"), "security": ("sandbox", "insecure")}


def command_of(
    work: Work, state: State, step: Step
) -> tuple[Command, dict[str, object], Callable[[], AbstractContextManager[Command]]]:
    """(the command, what its key is made of, how to have its mounts while it runs).  Raises CafsError, ValueError."""
    one, flags, request = step.one, step.flags, work.request
    found, words, script = read(state, one, flags)
    env = state.variables()
    network = flagging.one(flags, "network") or "default"
    security = flagging.one(flags, "security") or "sandbox"
    devices = flags.get("device", [])
    for wanted, needs in (
        ("network.host", network == "host"),
        ("security.insecure", security == "insecure"),
        ("device", bool(devices)),
    ):
        if needs and wanted not in request.allowed:
            raise UsageError(f"{wanted} is not allowed here", hint=f"cbuild --allow {wanted}")
    if network == "default":
        network = request.network or "bridge"
    definition: dict[str, object] = {
        "run": [*words, *((script.content,) if script else ())],
        "env": env,
        "cwd": state.workdir,
        "user": state.config.get("User") or "",
        "network": network,
        "security": security,
        "devices": devices,
        "mounts": [_definition(work, step, mount) for mount in found],
    }
    proxies = {name: value for name, value in request.args.items() if name in PROXIES}
    own = {"network": [network], **request.flags}
    if security == "insecure":
        own["privileged"] = ["true"]
    if devices:
        own["device"] = [text.partition(",")[0] for text in devices]
    command = Command(words, proxies | env, state.workdir, str(state.config.get("User") or ""), own)
    return command, definition, lambda: _ready(work, step, command, found, script)


def read(state: State, one: Instruction, flags: Flags) -> tuple[list[Mount], list[str], Heredoc | None]:
    """(mounts, words of the command, a script that the last of them is the path of), as far as the words say.

    Raises ValueError.
    """
    found = [mounts.parse(text, lambda path: absolute(state, path), state.expand) for text in flags.get("mount", [])]
    for name, allowed in _CHOICES.items():
        value = flagging.one(flags, name)
        if value is not None and value not in allowed:
            raise ValueError(f"--{name} is {' or '.join(allowed)}, not '{value}'")
    return found, *_words(state, one)


def _words(state: State, one: Instruction) -> tuple[list[str], Heredoc | None]:
    """The command; the second, if it is a script of its own, to be executed by its #! line."""
    if one.heredocs:
        rest = one.rest.strip()
        only = one.heredocs[0] if len(one.heredocs) == 1 and re.fullmatch(r"<<-?\s*\S+", rest) else None
        if only and only.content.startswith("#!"):
            return [*state.shell(), f"{PIPES}/{only.name}"], only
        if only:
            return [*state.shell(), only.content], None
        parts = [one.rest, *(f"{doc.content}{doc.name}" for doc in one.heredocs)]
        return [*state.shell(), "\n".join(parts) + "\n"], None
    found = command_words(state, one)
    if not found or not found[0]:
        raise ValueError("needs a command")
    return found, None


def _definition(work: Work, step: Step, mount: Mount) -> list[object]:
    """What of a mount the key depends on: of a bind its content, of a cache neither content nor sharing."""
    row: list[object] = [mount.kind, mount.target, mount.is_readonly]
    if mount.kind == "bind":
        top = work.places.find(mount.from_ or None, step.stage.number, (copying.prefix_of(mount.source),))
        if top is None:
            raise NotFound(f"{quote(mount.from_)} has no files")
        matches = copying.find(top, _literal(mount.source))
        trees = ((one.node, *(one.node.below() if one.node.is_directory else ())) for one in matches)
        work.places.note_read(mount.from_ or None, (one.path for tree in trees for one in tree))
        row += Gathered([Source(top, matches)]).fingerprint(copying.How())
    elif mount.kind in ("secret", "ssh"):
        row += [mount.id, mount.mode, mount.uid, mount.gid, mount.env]
    else:
        row += [mount.mode, mount.uid, mount.gid, mount.size]
    return row


def _literal(path: str) -> str:
    return "".join(f"\\{char}" if char in "*?[\\" else char for char in path) or "."


@contextmanager
def _ready(work: Work, step: Step, command: Command, found: list[Mount], script: Heredoc | None) -> Iterator[Command]:
    """The command with its mounts, which are there while it runs."""
    with ExitStack() as stack:
        ready = replace(command, env=dict(command.env), mounts=list(command.mounts), secrets={}, secret_env={})
        held: dict[str, str] = {}
        for number, mount in enumerate(found):
            made = _mount(work, step, mount, number, ready, held, stack)
            if made is not None:
                ready.mounts.append(made)
        if script is not None:
            directory = _private(stack)
            path = os.path.join(directory, script.name)
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755), "w", encoding="utf-8", errors="surrogateescape"
            ) as file:
                file.write(script.content)
            os.chmod(directory, 0o755)
            ready.mounts.append(_bind(directory, PIPES, ro=True))
        yield ready


def _bind(source: str, target: str, *, ro: bool) -> dict[str, Any]:
    return {"type": "bind", "source": source, "target": target, "options": ["ro"] if ro else []}


def _private(stack: ExitStack, *, is_large: bool = False) -> str:
    """A directory of ours alone while the step runs: in memory, unless it is for much."""
    return stack.enter_context(scratch.directory(paths.state() if is_large else paths.run()))


def _mount(
    work: Work, step: Step, mount: Mount, number: int, ready: Command, held: dict[str, str], stack: ExitStack
) -> dict[str, Any] | None:
    """held: caches that the step has, by name."""
    if mount.kind == "tmpfs":
        options = ["exec", *([f"size={mount.size}"] if mount.size else [])]
        return {"type": "tmpfs", "target": mount.target, "options": options}
    if mount.kind == "secret":
        return _secret(work, mount, ready, stack)
    if mount.kind == "ssh":
        return _ssh(work, mount, number, ready, stack)
    if mount.kind == "cache":
        path = cachemounts.directory(work, mount, step.stage.number, held, stack)
        return _bind(path, mount.target, ro=mount.is_readonly)
    source = stack.enter_context(work.places.mounted(mount.from_ or None, step.stage.number, mount.source or "/"))
    if not mount.is_readonly:
        copied = os.path.join(_private(stack, is_large=True), "copy")  # what is written to it is thrown away
        cachemounts.copy_tree(source, copied)
        source = copied
    return _bind(source, mount.target, ro=mount.is_readonly)


def secret_value(work: Work, name: str) -> bytes | None:
    """What --secret gave, None if nothing.  Raises CafsError."""
    given = work.request.secrets.get(name)
    if given is None:
        return None
    kind, where = given
    if kind == "env":
        value = os.environb.get(os.fsencode(where))
        if value is None:
            raise CafsError(f"secret {quote(name)}: the variable {quote(where)} is not set")
        return value
    try:
        with open(where, "rb") as file:
            data = file.read((1 << 20) + 1)
    except OSError as error:
        raise CafsError(f"secret {quote(name)}: cannot read {quote(where)}: {error.strerror}") from error
    if len(data) > 1 << 20:
        raise CafsError(f"secret {quote(name)} is larger than 1 MiB")
    return data


def _secret(work: Work, mount: Mount, ready: Command, stack: ExitStack) -> dict[str, Any] | None:
    value = secret_value(work, mount.id)
    if value is None:
        if mount.required:
            raise CafsError(f"secret {quote(mount.id)} is required", hint=f"cbuild --secret id={mount.id},src=FILE")
        return None
    if mount.id not in work.request.allows_in_layer:
        ready.secrets[mount.id] = value
    if mount.env:
        ready.bundle = ready.bundle or _private(stack)
        ready.secret_env[mount.env] = value.decode("utf-8", "surrogateescape").rstrip("\n")
    if not mount.target:
        return None
    path = os.path.join(_private(stack), "secret")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with open(fd, "wb") as file:
        file.write(value)
    os.chown(path, mount.uid, mount.gid)
    os.chmod(path, mount.mode)
    return _bind(path, mount.target, ro=True)


def _ssh(work: Work, mount: Mount, number: int, ready: Command, stack: ExitStack) -> dict[str, Any] | None:
    socket = work.request.ssh.get(mount.id)
    if not socket:
        if mount.required:
            raise CafsError(f"ssh agent {quote(mount.id)} is required", hint="cbuild --ssh default")
        return None
    try:
        is_socket = stat.S_ISSOCK(os.stat(socket).st_mode)
    except OSError as error:
        raise NotFound(f"no ssh agent at {quote(socket)}: {error.strerror}") from error
    if not is_socket:
        raise UsageError(f"--ssh: {quote(socket)} is not the socket of an agent", hint="ssh-agent, ssh-add, --ssh default")
    target = mount.target or f"/run/buildkit/ssh_agent.{number}"
    ready.env["SSH_AUTH_SOCK"] = target
    path = os.path.join(_private(stack), "agent")
    stack.enter_context(agent.passed_on(os.path.abspath(socket), path, mount))
    return _bind(path, target, ro=False)
