"""Published ports: how -p is written, and which ports of the host are given away, a file each in CAFS_RUN/ports."""

from __future__ import annotations

import os
import re
import socket

from cafs import atomic, paths
from cafs.errors import UsageError, quote

Port = tuple[str, str, int, str, int]
"""tcp or udp, address of the host ('' for all), port, container's address, its port."""

Asked = tuple[str, str, "int | tuple[int, int]", int]
"""tcp or udp, address of the host, its port (first and last of some, or 0 for any), container's port."""

_RANGE = re.compile("[0-9]{1,5}(-[0-9]{1,5})?")


def parse_ports(texts: list[str]) -> list[Asked]:
    """-p [IP:][HOST:]PORT[/tcp|udp], also ranges: (kind, address, port of the host, first and last of some, or 0, port).

    Raises UsageError.
    """
    found: list[Asked] = []
    for text in texts:
        places, slash, kind = text.partition("/")
        words = places.split(":")
        at, outer, inner = ["", "", *words][-3:]
        is_random = not outer and len(words) != 2
        is_sound = len(words) < 3 or (len(words) == 3 and at != "")
        if not is_sound or not _RANGE.fullmatch(inner) or not (is_random or _RANGE.fullmatch(outer)):
            raise UsageError(f"port {quote(text)} is not [IP:][HOSTPORT:]PORT[/tcp|udp]")
        if slash and kind not in ("tcp", "udp"):
            raise UsageError(f"port {quote(text)} is not [IP:][HOSTPORT:]PORT[/tcp|udp]")
        if at and not _is_ipv4(at):
            raise UsageError(f"port {quote(text)}: {quote(at)} is not an address")
        inner_ports, outer_ports = _range(inner), _range(outer) if outer else []
        if len(outer_ports) > 1 and len(inner_ports) == 1:  # the first that is free
            found.append((kind or "tcp", "" if at == "0.0.0.0" else at, (outer_ports[0], outer_ports[-1]), inner_ports[0]))
            continue
        if outer_ports and len(outer_ports) != len(inner_ports):
            raise UsageError(f"port {quote(text)}: the ranges differ in length")
        pairs = zip(outer_ports or [0] * len(inner_ports), inner_ports, strict=True)
        found += [(kind or "tcp", "" if at == "0.0.0.0" else at, one, other) for one, other in pairs]
    return found


def _is_ipv4(text: str) -> bool:
    try:
        socket.inet_aton(text)
    except OSError:
        return False
    return all(c.isdigit() or c == "." for c in text)


def _range(text: str) -> list[int]:
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 0 < low <= high < 65536:
        raise UsageError(f"{quote(text)} is not a port")
    return list(range(low, high + 1))


def published() -> list[tuple[str, Port]]:
    """All ports of the host that are given away, and to which container."""
    found = []
    for name in paths.listed(directory()):
        try:
            holder, address, inner = atomic.read_file(os.path.join(directory(), name), 256).decode().split()
            kind, number, at = name.split("-", 2)
            found.append((holder, (kind, at, int(number), address, int(inner))))
        except (OSError, ValueError):
            continue
    return found


def directory() -> str:
    """Where it is kept which ports are given away."""
    return os.path.join(paths.run(), "ports")
