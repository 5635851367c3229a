"""A container's part of a network: its namespace, its address, its published ports, and names in hosts files.

The namespace is made by a child of ours, which sets up the inner side; it lives by our descriptor until the runtime has joined.
"""

from __future__ import annotations

import os
import socket

from cafs import atomic, linux, paths
from cafs.errors import BusyError, CafsError, NotFound, UnsupportedError, quote
from runner import conntrack, etc, firewall, names, networks, ports
from runner.netlink import Netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container
    from runner.ports import Port

_INNER = "eth0"
_RANDOM_PORTS = range(49153, 65536)


def connect(container: Container, owner: int = -1) -> str:
    """Make its network namespace and set it up; a path by which the runtime finds it, as long as we live.  Raises CafsError.

    owner: descriptor of the user namespace whose it is to be, -1: ours.
    """
    network = networks.find(container.network)
    child, namespace, go = _new_namespace(owner)
    veth = _veth(container)
    published: list[Port] = []
    try:
        with networks.locked():
            networks.ensure(network)
            address = networks.lease(network, container.id)
            try:
                with Netlink() as link:
                    link.add_veth(veth, network.link, _INNER, namespace)
                    link.let_return(veth)
                published = _take_ports(container, address)
                firewall.publish(published, networks.restore_rules)
                conntrack.forget(address, published)
            except BaseException:
                _give_back_ports(container)
                networks.give_back(network, container.id)
                raise
        os.write(go, f"{address} {network.subnet.prefixlen} {network.gateway}".encode())
    except OSError as error:
        why = f"cannot connect to network {quote(network.name)}: {error.strerror or error}"
        raise UnsupportedError(why, hint="--network host or --network none") from error
    finally:
        os.close(go)
        _, status = os.waitpid(child, 0)
    if status:
        raise CafsError("cannot set up the network inside the container")
    container.note(network={"name": network.name, "address": address, "ports": published})
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _veth(container: Container) -> str:
    return f"veth{container.id[:10]}"


def _new_namespace(owner: int) -> tuple[int, int, int]:
    """(child, descriptor of its network namespace, where to write what it is to set up)."""
    reader, go = os.pipe2(os.O_CLOEXEC)
    ready, done = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(go)
            if owner >= 0:
                linux.setns(owner, linux.CLONE_NEWUSER)
            linux.unshare(linux.CLONE_NEWNET)
            os.write(done, b"r")
            _set_up(os.read(reader, 100).decode())
            code = 0
        finally:
            os._exit(code)
    os.close(reader)
    os.close(done)
    is_ready = os.read(ready, 1)
    os.close(ready)
    if not is_ready:
        os.close(go)
        os.waitpid(child, 0)
        raise UnsupportedError("cannot make a network namespace", hint="--network host")
    return child, os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC), go


def _set_up(text: str) -> None:
    """In the child: the inner side.  As in docker, anybody may ping, and use ports below 1024."""
    address, width, gateway = text.split()
    with Netlink() as link:
        link.set_up("lo")
        link.add_address(_INNER, address, int(width))
        link.set_up(_INNER)
        link.add_default_route(_INNER, gateway)
    last = 65535 if linux.in_user_namespace() else 2147483647
    for name, value in (("ping_group_range", f"0 {last}"), ("ip_unprivileged_port_start", "0")):
        try:
            with open(f"/proc/sys/net/ipv4/{name}", "w", encoding="ascii") as file:
                file.write(value)
        except OSError:
            continue


def _take_ports(container: Container, address: str) -> list[Port]:
    """Under the lock.  Raises BusyError."""
    found: list[Port] = []
    paths.make_private(ports.directory())
    for kind, at, outer, inner in container.asked["ports"]:
        first, last = (
            outer if not isinstance(outer, int) else (outer, outer) if outer else (_RANDOM_PORTS[0], _RANDOM_PORTS[-1])
        )
        for number in range(first, last + 1):
            if _take_port(container, (kind, at, number, address, inner)):
                found.append((kind, at, number, address, inner))
                break
        else:
            which = f"port {first}/{kind}" if first == last else f"every port from {first} to {last}"
            raise BusyError(f"{which} of the host is in use")
    return found


def _take_port(container: Container, port: Port) -> bool:
    """Whether nobody of ours, and no process of the host, has it; then it is kept, and noted with all that gives it back."""
    kind, at, number, address, inner = port
    taken = paths.listed(ports.directory())
    mine = f"{kind}-{number}-{at}"
    if any(name.startswith(f"{kind}-{number}-") and (name == mine or not at or name.endswith("-")) for name in taken):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as holder:
        try:
            if kind == "tcp":
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or it would wait for what is in TIME_WAIT
            holder.bind((at, number))
            if kind == "tcp":
                # Else another with that option could bind it too.  No packet gets as far: they are translated before.
                holder.listen(1)
        except OSError:
            return False
        note = f"{container.id} {address} {inner}"
        atomic.replace_hint(os.path.join(ports.directory(), mine), note.encode(), 0o600)
        container.ports.append(holder.detach())
    return True


def _give_back_ports(container: Container) -> None:
    """Those that are its own, and no others, whatever it had once; under the lock."""
    while container.ports:
        os.close(container.ports.pop())
    for holder, port in ports.published():
        if holder == container.id:
            firewall.unpublish([port])
            atomic.unlink_quietly(os.path.join(ports.directory(), f"{port[0]}-{port[2]}-{port[1]}"))


def disconnect(container: Container) -> None:
    """Give back link, address and ports.  May be done twice."""
    if not container.is_on_bridge:
        return
    try:
        network = networks.find(container.network)
    except CafsError:
        return  # it was removed
    with networks.locked():
        addresses = [address for address, holder in networks.leases(network).items() if holder == container.id]
        _give_back_ports(container)
        networks.remove_link(_veth(container))  # the namespace may live on, by others in it
        for address in addresses:
            conntrack.forget(address, [])
        networks.give_back(network, container.id)
    if container.state().get("network"):
        container.note(network=None)
    if addresses:
        tell_neighbours(network.name, but=container.id)


def tell_neighbours(network: str, *, but: str) -> None:
    """Write the hosts files of all who are on a network anew, in place, for they are mounted."""
    try:
        known = names.neighbours(network, but=but)
    except NotFound:
        return  # it was removed meanwhile
    for _, one in known:
        try:
            atomic.overwrite(one.path("hosts"), etc.hosts(one))
        except (CafsError, OSError):
            continue
