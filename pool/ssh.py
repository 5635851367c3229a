"""Agents on other machines, over SSH: one connection a worker, whose host key was pinned.  The only module with paramiko.

Nothing is copied by SFTP, no shell is assumed to be quiet: the agent's program goes in by `cat >`.
"""

from __future__ import annotations

import base64
import logging
import os
import shlex
import signal
import socket
import threading
import time
from contextlib import contextmanager

from cafs import atomic, stopping
from cafs.errors import CafsError, NotFound, RemoteError, UsageError, quote
from cafs.extras import extra
from pool import calls, frames, program
from pool.address import skip_greeting

with extra("ssh"):
    import paramiko

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pool.address import Pool

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what goes wrong is raised, and said once
_CONNECT_S = 15.0
_PIECE = 1 << 16
_KEPT = 1 << 20
_STATUS_S = 2.0
_ABSENT = 44
KEYS = "known_hosts"


class Address:
    """[USER@]HOST[:PORT][?IDENTITY] as the pool keeps it; ~/.ssh/config fills in what is not said."""

    def __init__(self, text: str) -> None:
        place, _, self.identity = text.partition("?")
        user, at, host = place.rpartition("@")
        name, colon, port = host.rpartition(":")
        if not colon or not port.isdigit() or name.endswith(":"):
            name, port = host, ""
        if not name or (at and not user):
            raise UsageError(f"{quote(text)} is not [USER@]HOST[:PORT]")
        found = _configured(name)
        self.host = str(found.get("hostname", name)).strip("[]")
        self.port = int(port or found.get("port", 22))
        self.user = user or str(found.get("user", "")) or os.environ.get("USER") or "root"
        self.identities = [self.identity] if self.identity else list(found.get("identityfile", []))
        self.jump = str(found.get("proxyjump", ""))
        self.command = str(found.get("proxycommand", ""))


def _configured(name: str) -> dict[str, Any]:
    config = paramiko.SSHConfig()
    try:
        with open(os.path.expanduser("~/.ssh/config"), encoding="utf-8") as file:
            config.parse(file)
    except OSError:
        return {}
    return dict(config.lookup(name))


def _socket(address: Address) -> Any:
    """To the server: directly, through another, or as a command says.  Raises OSError."""
    if address.command and address.command != "none":
        return paramiko.ProxyCommand(address.command)
    if address.jump and address.jump != "none":
        words = ["ssh", "-W", f"{address.host}:{address.port}", "--", address.jump]
        return paramiko.ProxyCommand(shlex.join(words))
    return socket.create_connection((address.host, address.port), timeout=_CONNECT_S)


def host_key(text: str) -> tuple[str, str]:
    """(the key that a server shows, as of known_hosts; its fingerprint).  Raises RemoteError."""
    address = Address(text)
    try:
        transport = paramiko.Transport(_socket(address))
        try:
            transport.start_client(timeout=_CONNECT_S)
            key = transport.get_remote_server_key()
        finally:
            transport.close()
    except (paramiko.SSHException, OSError) as error:
        raise RemoteError(f"cannot reach {quote(address.host)}: {error}") from error
    import hashlib

    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} {key.get_base64()}", f"SHA256:{digest}"


def pin(directory: str, name: str, key: str) -> None:
    """From now on the worker of this name has this key and no other."""
    rows = {**_pinned(directory), name: key}
    text = "".join(f"{one} {rows[one]}\n" for one in sorted(rows))
    atomic.replace_file(os.path.join(directory, KEYS), text.encode(), 0o600)


def unpin(directory: str, name: str) -> None:
    rows = _pinned(directory)
    if rows.pop(name, None):
        text = "".join(f"{one} {rows[one]}\n" for one in sorted(rows))
        atomic.replace_file(os.path.join(directory, KEYS), text.encode(), 0o600)


def _pinned(directory: str) -> dict[str, str]:
    try:
        lines = atomic.read_file(os.path.join(directory, KEYS), 1 << 24).decode().splitlines()
    except OSError:
        return {}
    return dict(line.partition(" ")[::2] for line in lines)


def _connect(directory: str, name: str, text: str) -> paramiko.Transport:
    """Raises CafsError, OSError."""
    address, wanted = Address(text), _pinned(directory).get(name)
    if wanted is None:
        raise NotFound(f"no host key of {quote(name)} is known", hint=f"cpool host add {name} {text}")
    transport = paramiko.Transport(_socket(address))
    try:
        transport.get_security_options().key_types = _key_types(wanted.partition(" ")[0])
        transport.start_client(timeout=_CONNECT_S)
        shown = transport.get_remote_server_key()
        if f"{shown.get_name()} {shown.get_base64()}" != wanted:
            raise RemoteError(f"the host key of {quote(name)} has changed", hint="somebody else may answer there")
        transport.set_keepalive(10)
        transport._active_check_timeout = 5  # idle connections take a fifteenth of the time so
        _authenticate(transport, address)
        return transport
    except paramiko.SSHException as error:
        transport.close()
        raise RemoteError(f"cannot log in at {quote(address.host)}: {error}") from error
    except BaseException:
        transport.close()
        raise


def _key_types(kind: str) -> tuple[str, ...]:
    return ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)


def _authenticate(transport: paramiko.Transport, address: Address) -> None:
    """By the identities that are named, the agent's, the usual ones.  Raises SSHException."""
    usual = [os.path.expanduser(f"~/.ssh/id_{kind}") for kind in ("ed25519", "ecdsa", "rsa")]
    found: list[Any] = []
    for path in [*address.identities, *([] if address.identity else usual)]:
        try:
            found.append(paramiko.PKey.from_path(os.path.expanduser(path)))
        except Exception:  # absent, encrypted, of an unknown kind: the next may do
            continue
    if not address.identity:
        found += paramiko.Agent().get_keys()
    problem: Exception = paramiko.SSHException("there is no key to log in with")
    for key in found:
        try:
            transport.auth_publickey(address.user, key)
            return
        except paramiko.SSHException as error:
            problem = error
    raise problem


def open_link(pool: Pool, name: str, address: str) -> socket.socket:
    """To the agent of a worker, whose program is brought if it is not there.  Raises CafsError, OSError."""
    build, data = program.make()

    def begin(transport: paramiko.Transport, place: str) -> paramiko.Channel:
        path = f"{place}/agent-{build}.pyz"
        command = f'test -f "$HOME/{path}" || exit {_ABSENT}; exec python3 "$HOME/{path}" attach "$HOME/{place}"'
        channel = _run(transport, command)
        try:
            _skip_greeting(channel)
        except RemoteError:
            if not channel.status_event.wait(_STATUS_S) or channel.recv_exit_status() != _ABSENT:
                raise
            _bring(transport, path, data)
            channel = _run(transport, command)
            _skip_greeting(channel)
        if pool.lend:
            _lend(transport, f'exec python3 "$HOME/{path}" lend "$HOME/{place}"', pool.lend)
        return channel

    return _open(pool, name, address, begin, "run the agent")


def open_calls(pool: Pool, name: str, address: str) -> socket.socket:
    """To the function host of a worker, which an agent has started.  Raises CafsError, OSError."""

    def begin(transport: paramiko.Transport, place: str) -> paramiko.Channel:
        channel = _run(transport, f'exec python3 "$HOME/{place}/agent-{program.make()[0]}.pyz" calls "$HOME/{place}"')
        _skip_greeting(channel, calls.GREETING)
        return channel

    return _open(pool, name, address, begin, "reach the function host")


def _open(
    pool: Pool, name: str, address: str, begin: Callable[[paramiko.Transport, str], paramiko.Channel], what: str
) -> socket.socket:
    """A connection of its own, whose bytes are those of a channel.  what: is to be done.  Raises CafsError, OSError."""
    transport = _connect(pool.directory, name, address)
    try:
        channel = begin(transport, f".cache/cafs-agent/{pool.id}.{name}")
        ours, theirs = socket.socketpair()
        _carry(channel, theirs, transport)
        return ours
    except paramiko.SSHException as error:
        transport.close()
        raise RemoteError(f"cannot {what} at {quote(name)}: {error}") from error
    except BaseException:
        transport.close()
        raise


class There:
    """A host that is logged in to."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def run(self, command: str, data: bytes = b"") -> tuple[int, str, str]:
        """(exit code, output, errors) of a shell command that is given DATA.  Raises OSError, CafsError."""
        try:
            mark, marked = _marked(command)
            channel = _run(self._transport, marked)
            channel.sendall(data)
            channel.shutdown_write()
            errors: list[bytes] = []
            reader = threading.Thread(target=lambda: errors.append(_all(channel.recv_stderr)), daemon=True)
            reader.start()
            out = _all(channel.recv)
            reader.join()
            said, error = (_after(mark, one).decode(errors="replace") for one in (out, errors[0]))
            return channel.recv_exit_status(), said, error
        except paramiko.SSHException as error:
            raise RemoteError(f"cannot run a command there: {error}") from error

    def become(self, command: str, *, has_terminal: bool) -> int:
        """A command with our own standard streams, on a terminal there if we have one; its exit code.  Raises CafsError."""
        try:
            channel = self._transport.open_session(timeout=_CONNECT_S)
            if has_terminal:
                size = os.get_terminal_size(0)
                channel.get_pty(os.environ.get("TERM", "vt100"), size.columns, size.lines)
                stopping.on_signals([signal.SIGWINCH], lambda _: channel.resize_pty(*os.get_terminal_size(0)))
            mark, marked = _marked(command, is_once=has_terminal)
            channel.exec_command(f"/bin/sh -c {shlex.quote(marked)}")
            threading.Thread(target=_pass_input, args=(channel,), daemon=True).start()
            errors = threading.Thread(target=_pass_output, args=(channel.recv_stderr, 2, mark), daemon=True)
            errors.start()
            _pass_output(channel.recv, 1, mark)
            errors.join()
            return int(channel.recv_exit_status())
        except paramiko.SSHException as error:
            raise RemoteError(f"cannot run a command there: {error}") from error


def _pass_input(channel: paramiko.Channel) -> None:
    try:
        while data := os.read(0, _PIECE):
            channel.sendall(data)
        channel.shutdown_write()
    except OSError:
        pass  # it has ended


def _pass_output(receive: Any, fd: int, mark: bytes) -> None:
    """What comes after the mark; if none comes, all."""
    held = b""
    while mark not in held or b"\n" not in held.partition(mark)[2]:
        data = receive(_PIECE)
        held += data
        if not data or len(held) > frames.GREETING_WITHIN:
            break
    atomic.write_all(fd, _after(mark, held))
    while data := receive(_PIECE):
        atomic.write_all(fd, data)


def _marked(command: str, *, is_once: bool = False) -> tuple[bytes, str]:
    """(a mark, a command that prints it first): what a login shell says before that is not the command's."""
    mark = f"cpool-{os.urandom(8).hex()}"
    return mark.encode(), f"echo {mark}; {'' if is_once else f'echo {mark} >&2; '}{command}"


def _after(mark: bytes, data: bytes) -> bytes:
    _, found, rest = data.partition(mark)
    return rest.partition(b"\n")[2] if found else data


def _all(receive: Any) -> bytes:
    """Until its end; the first MiB is kept."""
    found = b""
    while data := receive(_PIECE):
        found = (found + data)[:_KEPT]
    return found


@contextmanager
def connected(directory: str, name: str, address: str) -> Iterator[There]:
    """A connection to a worker.  Raises CafsError, OSError."""
    transport = _connect(directory, name, address)
    try:
        yield There(transport)
    finally:
        transport.close()


def _lend(transport: paramiko.Transport, command: str, store: str) -> None:
    """Have a store read there, by a channel of its own.  Raises CafsError."""
    from pool.lending import Lender

    channel = _run(transport, command)
    _skip_greeting(channel)
    channel.settimeout(None)

    def lend() -> None:
        Lender(store, channel.recv, channel.sendall).run()
        transport.close()  # so that all is begun anew

    threading.Thread(target=lend, daemon=True).start()


def _skip_greeting(channel: paramiko.Channel, greeting: bytes = frames.GREETING) -> None:
    """Raises RemoteError, with what was said on standard error."""

    def errors() -> bytes:
        channel.settimeout(_STATUS_S)
        try:
            return bytes(channel.recv_stderr(_PIECE))
        except OSError:
            return b""

    skip_greeting(channel.recv, lambda left_s: _readable(channel, left_s), greeting, errors)


def _readable(channel: paramiko.Channel, left_s: float) -> bool:
    channel.settimeout(left_s)
    return True


def _run(transport: paramiko.Transport, command: str) -> paramiko.Channel:
    channel = transport.open_session(timeout=_CONNECT_S)
    channel.exec_command(f"/bin/sh -c {shlex.quote(command)}")
    return channel


def _bring(transport: paramiko.Transport, path: str, data: bytes) -> None:
    """Raises CafsError."""
    new = f'"$HOME/{path}".new'
    above = os.path.dirname(path)
    channel = _run(transport, f'umask 077; mkdir -p "$HOME/{above}" && cat > {new} && mv {new} "$HOME/{path}"')
    channel.sendall(data)
    channel.shutdown_write()
    if channel.recv_exit_status():
        raise CafsError(f"cannot write the agent's program: {channel.recv_stderr(4096).decode(errors='replace').strip()}")


def _carry(channel: paramiko.Channel, there: socket.socket, transport: paramiko.Transport) -> None:
    """Both ways, in threads of ours, until either side ends."""
    channel.settimeout(None)

    def carry(here: Any, to: Any) -> None:
        try:
            while data := here.recv(_PIECE):
                to.sendall(data)
        except OSError:
            pass
        finally:
            end()

    def end() -> None:
        transport.close()
        try:
            there.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    threads = [threading.Thread(target=carry, args=ends, daemon=True) for ends in ((channel, there), (there, channel))]
    for thread in threads:
        thread.start()
    _carriers.append(threads[1])


_carriers: list[threading.Thread] = []


def finish() -> None:
    """Before the process ends: what was said last is to arrive."""
    deadline = time.monotonic() + _STATUS_S
    for thread in _carriers:
        thread.join(max(deadline - time.monotonic(), 0))
