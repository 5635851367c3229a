"""Links, addresses and routes over rtnetlink(7), in this process: `ip` would be forked five times; and what netfilter has.

Sources: rtnetlink(7), netlink(7), include/uapi/linux/{rtnetlink,if_link,if_addr,veth}.h, netfilter/nf_tables.h.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_NEWLINK, _DELLINK, _SETLINK, _NEWADDR, _NEWROUTE = 16, 17, 19, 20, 24
_PROTINFO, _NESTED, _BRPORT_MODE = 12, 0x8000, 4
_REQUEST, _ACK, _EXCL, _DUMP, _CREATE = 0x1, 0x4, 0x200, 0x300, 0x400
_ERROR, _DONE = 2, 3
NETFILTER = 12
"""Protocol of what netfilter has."""
_GETCHAIN, _CHAIN_TABLE, _CHAIN_NAME = 10 << 8 | 4, 1, 3
IPV4 = struct.pack("!BBH", socket.AF_INET, 0, 0)
"""Head of a message about that (struct nfgenmsg)."""
_AF_BRIDGE = 7
_UP = 1
_SIOCGIFFLAGS = 0x8913
_HEAD = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDR = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_IFNAME, _MASTER, _LINKINFO, _NETNS_FD = 3, 10, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5


def has_link(name: str) -> bool:
    """Whether there is a link of that name; /sys may show those of another network namespace."""
    try:
        socket.if_nametoindex(name)
        return True
    except OSError:
        return False


def is_up(name: str) -> bool:
    """Whether there is a link of that name, up (SIOCGIFFLAGS, netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("=16s24x", name.encode()))
        except OSError:
            return False
    return bool(struct.unpack_from("=H", answer, 16)[0] & _UP)


def has_chain(table: str, chain: str) -> bool:
    """Whether nftables has a chain in a table of IPv4."""
    body = IPV4 + attribute(_CHAIN_TABLE, _name(table)) + attribute(_CHAIN_NAME, _name(chain))
    try:
        with Netlink(NETFILTER) as link:
            link.ask(_GETCHAIN, 0, body)
        return True
    except OSError:
        return False


class Netlink:
    """A connection to the kernel, for the network namespace in which it is made."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.bind((0, 0))
        self._number = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *failure: object) -> None:
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request and wait until it is acknowledged.  Raises OSError with the kernel's number."""
        self._number += 1
        head = _HEAD.pack(_HEAD.size + len(body), kind, _REQUEST | _ACK | flags, self._number, 0)
        self._socket.send(head + body)
        while True:
            answer = self._socket.recv(1 << 16)
            _, kind, _, number, _ = _HEAD.unpack_from(answer)
            if kind == _ERROR and number == self._number:
                (code,) = struct.unpack_from("=i", answer, _HEAD.size)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All that the kernel has of a kind: the bodies of its messages.  Raises OSError."""
        self._number += 1
        self._socket.send(_HEAD.pack(_HEAD.size + len(body), kind, _REQUEST | _DUMP, self._number, 0) + body)
        found: list[bytes] = []
        while True:
            answer = self._socket.recv(1 << 16)
            while answer:
                size, kind, _, _, _ = _HEAD.unpack_from(answer)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", answer, _HEAD.size)
                    raise OSError(-code, os.strerror(-code))
                found.append(answer[_HEAD.size : size])
                answer = answer[-(-size // 4) * 4 :]

    def add_bridge(self, name: str) -> None:
        """Make a bridge."""
        kind = attribute(_LINKINFO, attribute(_INFO_KIND, b"bridge"))
        self.ask(_NEWLINK, _CREATE | _EXCL, _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFNAME, _name(name)) + kind)

    def add_veth(self, name: str, bridge: str, peer: str, namespace: int) -> None:
        """Make a pair: NAME, up, on a bridge here; PEER in the network namespace of a descriptor."""
        inner = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFNAME, _name(peer)) + attribute(_NETNS_FD, struct.pack("=I", namespace))
        info = attribute(_INFO_KIND, b"veth") + attribute(_INFO_DATA, attribute(_VETH_PEER, inner))
        body = _LINK.pack(0, 0, 0, _UP, _UP) + attribute(_IFNAME, _name(name))
        body += attribute(_MASTER, struct.pack("=I", socket.if_nametoindex(bridge))) + attribute(_LINKINFO, info)
        self.ask(_NEWLINK, _CREATE | _EXCL, body)

    def let_return(self, name: str) -> None:
        """Let a port of a bridge send back what came by it: a container that asks for its own published port."""
        hairpin = attribute(_BRPORT_MODE, b"\1")
        body = _LINK.pack(_AF_BRIDGE, 0, socket.if_nametoindex(name), 0, 0)
        self.ask(_SETLINK, 0, body + attribute(_PROTINFO | _NESTED, hairpin))

    def set_up(self, name: str) -> None:
        """Bring a link up."""
        self.ask(_NEWLINK, 0, _LINK.pack(0, 0, socket.if_nametoindex(name), _UP, _UP))

    def remove(self, name: str) -> None:
        """Remove a link."""
        self.ask(_DELLINK, 0, _LINK.pack(0, 0, socket.if_nametoindex(name), 0, 0))

    def add_address(self, name: str, address: str, width: int) -> None:
        """Give a link an IPv4 address."""
        packed = socket.inet_aton(address)
        body = _ADDR.pack(socket.AF_INET, width, 0, 0, socket.if_nametoindex(name))
        self.ask(_NEWADDR, _CREATE | _EXCL, body + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed))

    def add_default_route(self, name: str, gateway: str) -> None:
        """Send what is for elsewhere to a gateway."""
        main, boot, everywhere, unicast = 254, 3, 0, 1
        body = _ROUTE.pack(socket.AF_INET, 0, 0, 0, main, boot, everywhere, unicast, 0)
        body += attribute(_RTA_GATEWAY, socket.inet_aton(gateway))
        body += attribute(_RTA_OIF, struct.pack("=I", socket.if_nametoindex(name)))
        self.ask(_NEWROUTE, _CREATE | _EXCL, body)


def attribute(kind: int, data: bytes) -> bytes:
    """A part of a message."""
    size = 4 + len(data)
    return struct.pack("=HH", size, kind) + data + bytes(-size % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """What a message, or an attribute, is made of: kind to content."""
    found = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        found[kind & ~_NESTED] = data[4:size]
        data = data[max(-(-size // 4) * 4, 4) :]
    return found


def _name(text: str) -> bytes:
    return text.encode() + b"\0"
