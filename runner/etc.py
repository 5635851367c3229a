"""/etc/hostname, /etc/hosts and /etc/resolv.conf of a container: written anew when it starts, mounted from its directory."""

from __future__ import annotations

import os

from cafs import atomic
from cafs.errors import UsageError, quote
from runner import containers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_GATEWAY = "host-gateway"


def hostname_of(container: Container) -> str:
    """As it was asked for, else the beginning of the id; that of the host or the other whose network it shares.

    Raises NotFound.
    """
    kind, _, other = container.network.partition(":")
    if kind == "container":
        return hostname_of(containers.find(other))
    is_hosts = "host" in (container.value("network"), container.value("uts"))
    return container.value("hostname") or (os.uname().nodename if is_hosts else container.id[:12])


def directory(container: Container) -> str:
    """Where the three files are: those of the other, if it shares its network.  Raises NotFound."""
    kind, _, other = container.network.partition(":")
    return containers.find(other).directory if kind == "container" else container.directory


def write(container: Container, owner: int = 0) -> None:
    """All three, for a start.  owner: the host's id of its root.  Raises UsageError, CafsError."""
    for name, data in (
        ("hostname", hostname_of(container).encode() + b"\n"),
        ("hosts", hosts(container)),
        ("resolv.conf", _resolv(container)),
    ):
        path = container.path(name)
        atomic.unlink_quietly(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            atomic.write_all(fd, data)
            if owner:
                os.fchown(fd, owner, owner)
        finally:
            os.close(fd)


def hosts(container: Container) -> bytes:
    """Its /etc/hosts: itself, who is on its network, --add-host."""
    hostname = hostname_of(container)
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    neighbours = []
    if container.is_on_bridge:
        from runner import names

        neighbours = names.host_lines(container, hostname)
    lines += neighbours or [f"127.0.1.1\t{hostname}"]
    for text in container.all("add-host"):
        name, address = host(text)
        if address == _GATEWAY:
            if not container.is_on_bridge:
                raise UsageError(f"--add-host {quote(text)}: without a network of its own there is no gateway")
            from runner import networks

            address = networks.find(container.network).gateway
        lines.append(f"{address.strip('[]')}\t{name}")
    return "".join(line + "\n" for line in lines).encode()


def host(text: str) -> tuple[str, str]:
    """(name, address) of --add-host.  Raises UsageError."""
    name, separator, address = text.partition("=" if "=" in text else ":")
    if not separator or not name or not (address == _GATEWAY or _is_address(address)):
        raise UsageError(f"--add-host {quote(text)} is not NAME:IP")
    return name, address


def _is_address(text: str) -> bool:
    import socket

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text.strip("[]"))
            return True
        except (OSError, ValueError):
            continue
    return False


def _resolv(container: Container) -> bytes:
    """The host's, and of servers, domains and options what was given instead of its own."""
    servers, domains, options = (container.all(name) for name in ("dns", "dns-search", "dns-option"))
    for server in servers:
        if not _is_address(server):
            raise UsageError(f"--dns {quote(server)} is not an address")
    hosts = _hosts_resolv(container)
    if not servers and not domains and not options:
        return hosts
    lines = hosts.decode("utf-8", "surrogateescape").splitlines()
    kept = {word: [line for line in lines if line.split()[:1] == [word]] for word in ("nameserver", "search", "options")}
    if servers:
        kept["nameserver"] = [f"nameserver {server}" for server in servers]
    if domains:
        kept["search"] = [f"search {' '.join(domains)}"] if domains != ["."] else []
    if options:
        kept["options"] = [f"options {' '.join(options)}"]
    return "".join(line + "\n" for some in kept.values() for line in some).encode("utf-8", "surrogateescape")


def _hosts_resolv(container: Container) -> bytes:
    if container.is_on_bridge:
        from runner import names

        return names.resolvers()
    try:
        return atomic.read_file("/etc/resolv.conf", 1 << 16) if container.value("network") == "host" else b""
    except OSError:
        return b""
