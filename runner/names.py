"""What a container's /etc/hosts and resolv.conf say of its network: its neighbours' names, and the name servers."""

from __future__ import annotations

import re

from cafs import atomic
from runner import containers, networks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container


def neighbours(network: str, *, but: str = "") -> list[tuple[str, Container]]:
    """(address, container) of all who are on a network."""
    found = []
    for address, identity in networks.leases(networks.find(network)).items():
        one = containers.load(identity) if identity != but else None
        if one is not None:
            found.append((address, one))
    return found


def host_lines(container: Container, hostname: str) -> list[str]:
    """For its /etc/hosts: itself and its neighbours."""
    about = container.state().get("network")
    if not about:
        return []
    others = [f"{address}\t{one.name} {one.id[:12]}" for address, one in neighbours(about["name"], but=container.id)]
    return [f"{about['address']}\t{hostname} {container.name}", *others]


def resolvers() -> bytes:
    """The host's resolv.conf; resolvers on its loopback, which the container cannot reach, are replaced by their upstreams."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            lines = atomic.read_file(path, 1 << 16).splitlines()
        except OSError:
            continue
        servers = [line.split()[1] for line in lines if line.startswith(b"nameserver") and len(line.split()) > 1]
        if servers and not all(server.startswith((b"127.", b"::1")) for server in servers):
            kept = [line for line in lines if not re.match(rb"nameserver\s+(127\.|::1)", line)]
            return b"".join(line + b"\n" for line in kept)
    return b""
