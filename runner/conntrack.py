"""What netfilter remembers of connections: to whom it leads a flow goes by that, not by the rules, for as long as it lasts.

So who gets an address or a port must not find what was another's.  `conntrack -D` is on few hosts, and is not asked.
Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import socket
import struct

from runner.netlink import IPV4, NETFILTER, Netlink, attribute, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.ports import Port

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_NESTED = 0x8000
_ORIGINAL, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SOURCE, _TARGET = 1, 2
_NUMBER, _TARGET_PORT = 1, 3
_BY_SOURCE, _BY_TARGET, _BY_PROTO, _BY_PORT = 1, 2, 1 << 3, 1 << 5


def forget(address: str, ports: list[Port]) -> None:
    """All flows from and to an address, and those of UDP to ports of the host: of TCP both sides see that they are cut off.

    Raises nothing: where the kernel has no such table it follows no flows.
    """
    packed = socket.inet_aton(address)
    wanted = [
        (_ORIGINAL, attribute(_TUPLE_IP | _NESTED, attribute(_SOURCE, packed)), _BY_SOURCE),
        (_REPLY, attribute(_TUPLE_IP | _NESTED, attribute(_SOURCE, packed)), _BY_SOURCE),  # to it, also translated
    ]
    for kind, at, number, _, _ in ports:
        if kind == "udp":
            udp = attribute(_NUMBER, bytes([socket.IPPROTO_UDP])) + attribute(_TARGET_PORT, struct.pack("!H", number))
            parts, flags = attribute(_TUPLE_PROTO | _NESTED, udp), _BY_PROTO | _BY_PORT
            if at:
                parts += attribute(_TUPLE_IP | _NESTED, attribute(_TARGET, socket.inet_aton(at)))
                flags |= _BY_TARGET
            wanted.append((_ORIGINAL, parts, flags))
    try:
        with Netlink(NETFILTER) as link:
            for side, parts, flags in wanted:
                _forget(link, side, parts, flags)
    except OSError:
        return


def _forget(link: Netlink, side: int, parts: bytes, flags: int) -> None:
    """Those with a tuple in which PARTS, of which FLAGS says which they are, are the same (Linux 5.8)."""
    which = attribute(side, struct.pack("=I", flags)) + attribute(3 - side, struct.pack("=I", 0))
    body = IPV4 + attribute(side | _NESTED, parts) + attribute(_FILTER | _NESTED, which)
    for one in link.dump(_GET, body):
        found = attributes(one[len(IPV4) :])
        if not _has(found[side], parts):
            continue  # a kernel that knows no filter says all
        kept = b"".join(attribute(kind, found[kind]) for kind in (_ID, _ZONE) if kind in found)
        try:
            link.ask(_DELETE, 0, IPV4 + attribute(_ORIGINAL | _NESTED, found[_ORIGINAL]) + kept)
        except OSError:
            continue  # it has ended by itself


def _has(tuple_: bytes, parts: bytes) -> bool:
    """Whether PARTS is in a tuple."""
    whole = {kind: attributes(data) for kind, data in attributes(tuple_).items()}
    asked = {kind: attributes(data) for kind, data in attributes(parts).items()}
    return all(data.items() <= whole.get(kind, {}).items() for kind, data in asked.items())
