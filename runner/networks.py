"""Bridge networks: state/networks/NAME.json; leases of their addresses, run/networks/NAME/ADDRESS, each with a container's id.

A lease is taken and given back under one lock.  Those of containers that are not alive any more are found by
`free_stale`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from contextlib import contextmanager

from cafs import atomic, paths
from cafs.errors import BusyError, CafsError, NotFound, UnsupportedError, UsageError, quote
from runner import firewall, ports
from runner.containers import BRIDGE, is_name
from runner.netlink import Netlink, has_link, is_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_DEFAULT_SUBNET, _DEFAULT_LINK = "10.87.0.0/16", "cafs0"
_MORE = "10.88.0.0/16"


class Network:
    """A network.  link: of its bridge."""

    __slots__ = ("about", "name")

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        self.name = name
        self.about = about

    @property
    def link(self) -> str:
        return str(self.about["link"])

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.about["subnet"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.about.get("labels", {}))

    @property
    def gateway(self) -> str:
        """The address of the host in it: the first."""
        return str(self.subnet.network_address + 1)


def find(name: str) -> Network:
    """Raises NotFound."""
    if name in (BRIDGE, "default"):
        return Network(BRIDGE, {"link": _DEFAULT_LINK, "subnet": _DEFAULT_SUBNET})
    try:
        return Network(name, json.loads(atomic.read_file(_path(name), 1 << 16))) if _is_name(name) else _missing(name)
    except (OSError, ValueError):
        return _missing(name)


def _missing(name: str) -> Network:
    raise NotFound(f"no network {quote(name)}", hint="crun network ls; crun network create")


def _is_name(text: str) -> bool:
    return is_name(text, least=1, most=64)


def every() -> list[Network]:
    """All, by name."""
    names = sorted(one.removesuffix(".json") for one in paths.listed(_directory()) if one.endswith(".json"))
    return [find(BRIDGE), *(find(name) for name in names)]


def create(name: str, subnet: str | None, labels: dict[str, str] | None = None) -> Network:
    """Raises UsageError, BusyError."""
    if not _is_name(name) or name in (BRIDGE, "default", "none", "host", "container"):
        raise UsageError(f"{quote(name)} is not a network name")
    paths.make_private(_directory())
    with locked():
        others = every()
        taken = [one.subnet for one in others]
        if any(one.name == name for one in others):
            raise BusyError(f"there is a network {quote(name)}")
        chosen = _given(subnet, taken) if subnet else _first_free(taken)
        about = {"link": f"cafs-{os.urandom(4).hex()}", "subnet": str(chosen), "created_ns": time.time_ns()}
        about["labels"] = labels or {}
        atomic.replace_file(_path(name), json.dumps(about, sort_keys=True).encode(), 0o600)
    return Network(name, about)


def _given(text: str, taken: list[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    try:
        found = ipaddress.IPv4Network(text)
    except ValueError:
        raise UsageError(f"{quote(text)} is not a subnet", hint="10.88.1.0/24") from None
    if found.num_addresses < 8:
        raise UsageError(f"subnet {text} is too small")
    for one in taken:
        if found.overlaps(one):
            raise BusyError(f"subnet {text} overlaps {one}, which is another network's")
    return found


def _first_free(taken: list[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    for one in ipaddress.IPv4Network(_MORE).subnets(new_prefix=24):
        if not any(one.overlaps(other) for other in taken):
            return one
    raise CafsError("no subnet is free", hint="--subnet")


def remove(name: str) -> None:
    """Raises NotFound, BusyError, UsageError."""
    network = find(name)
    if network.name == BRIDGE:
        raise UsageError("the network 'bridge' is always there")
    with locked():
        if users := leases(network):
            raise BusyError(f"network {quote(name)} is in use by container {next(iter(users.values()))[:12]}")
        atomic.unlink_quietly(_path(name))
        remove_link(network.link)
        firewall.forget_bridge(network.link, network.subnet)


def ensure(network: Network) -> None:
    """Make the bridge and what belongs to it, if it is not there; under the lock.  Raises UnsupportedError."""
    hint = "--network host or --network none"
    try:
        if not firewall.is_there():
            restore_rules()  # of all bridges that are up, not of this one alone
        if is_up(network.link):
            return
        with Netlink() as link:
            if not has_link(network.link):
                link.add_bridge(network.link)
            try:
                link.add_address(network.link, network.gateway, network.subnet.prefixlen)
            except FileExistsError:
                pass  # who began was killed
            for name, value in (("ip_forward", "1"), (f"conf/{network.link}/route_localnet", "1")):
                with open(f"/proc/sys/net/ipv4/{name}", "w", encoding="ascii") as file:
                    file.write(value)
            firewall.add_bridge(network.link, network.subnet)
            link.set_up(network.link)  # last: that it is up means that all is done
    except OSError as error:
        raise UnsupportedError(f"cannot make the bridge {network.link}: {error.strerror}", hint=hint) from error
    except UnsupportedError as error:
        remove_link(network.link)
        raise UnsupportedError(str(error), hint=hint) from None


def restore_rules() -> None:
    """Make the rules of all bridges and published ports, where there are none or somebody has flushed them."""
    bridges = [(one.link, one.subnet) for one in every() if has_link(one.link)]
    firewall.restore(bridges, [port for _, port in ports.published()])


def remove_link(name: str) -> None:
    """If it is there."""
    try:
        with Netlink() as link:
            link.remove(name)
    except OSError:
        pass  # it went with a namespace, or nobody has used it since the machine was started


def lease(network: Network, container: str) -> str:
    """An address for a container; under the lock.  Raises CafsError if none is free."""
    directory = _leases(network)
    paths.make_private(directory)
    taken = {network.gateway, *os.listdir(directory)}
    for text in _from_last(network):
        if text in taken:
            continue
        fd = os.open(os.path.join(directory, text), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(fd, container.encode())
        os.close(fd)
        atomic.replace_hint(_last(network), text.encode(), 0o600)
        return text
    raise CafsError(f"network {quote(network.name)} has no free address")


def _from_last(network: Network) -> Iterator[str]:
    """All addresses, from behind the one that was leased last: who still has that of one that is gone finds nobody there."""
    low, count = int(network.subnet.network_address) + 1, network.subnet.num_addresses - 2
    try:
        last = int(ipaddress.IPv4Address(atomic.read_file(_last(network), 64).decode("ascii")))
    except (OSError, ValueError):
        last = low
    for step in range(1, count + 1):
        yield str(ipaddress.IPv4Address(low + (last - low + step) % count))


def _last(network: Network) -> str:
    """Of a network's addresses; no network is called so."""
    return os.path.join(paths.run(), "networks", f".{network.name}")


def leases(network: Network) -> dict[str, str]:
    """Addresses and who has them."""
    found = {}
    for name in paths.listed(_leases(network)):
        try:
            found[name] = atomic.read_file(os.path.join(_leases(network), name), 256).decode()
        except (OSError, UnicodeDecodeError):
            continue
    return found


def give_back(network: Network, container: str) -> None:
    """All addresses of a container; under the lock."""
    for address, holder in leases(network).items():
        if holder == container:
            atomic.unlink_quietly(os.path.join(_leases(network), address))


def free_stale() -> None:
    """Addresses of containers that are not there any more, or do not run."""
    from runner import alive

    with locked():
        for network in every():
            for address, holder in leases(network).items():
                if not alive.is_watched(holder):
                    atomic.unlink_quietly(os.path.join(_leases(network), address))


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time changes networks, leases and ports."""
    directory = os.path.join(paths.run(), "networks")
    paths.make_private(directory)
    with atomic.locked(directory):
        yield


def _directory() -> str:
    return os.path.join(paths.state(), "networks")


def _path(name: str) -> str:
    return os.path.join(_directory(), f"{name}.json")


def _leases(network: Network) -> str:
    return os.path.join(paths.run(), "networks", network.name)
