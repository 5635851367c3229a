"""Address translation and published ports: one nftables table of ours, or iptables where there is no nft.

A published port is one element of a map (nft), so adding and removing one takes the same time however many there are.
Source: nft(8); iptables-extensions(8).
"""

from __future__ import annotations

from cafs.errors import CafsError, UnsupportedError
from runner import programs
from runner.netlink import has_chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Callable, Iterable

    from runner.ports import Port

_TABLE = """
add table ip cafs
flush table ip cafs
table ip cafs {
  map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
  map ports_at { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
  set bridges { type ifname; }
  set same { type ifname . ifname; }
  set subnets { type ipv4_addr; flags interval; }
  chain publish {
    dnat ip to ip daddr . meta l4proto . th dport map @ports_at
    fib daddr type local dnat ip to meta l4proto . th dport map @ports
  }
  chain prerouting { type nat hook prerouting priority dstnat; jump publish; }
  chain output { type nat hook output priority -100; jump publish; }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr 127.0.0.0/8 oifname @bridges masquerade
    ip saddr @subnets oifname @bridges ct status dnat masquerade
    ip saddr @subnets oifname != @bridges masquerade
  }
  chain closed {
    type filter hook prerouting priority raw;
    iifname != "lo" ip daddr 127.0.0.0/8 drop
    iifname != "lo" ip saddr 127.0.0.0/8 drop
  }
  chain forward {
    type filter hook forward priority filter;
    ct status dnat accept
    ct state established,related accept
    iifname . oifname @same accept
    oifname @bridges drop
  }
}
"""
"""Closed to the neighbours of the host: what is published on its loopback, which translation would lead past the kernel's own
check (docker 28 does so port by port), and, unless published, a container's ports, of which they may know by a route.

It may be said again at any time: rules are written anew, what is in maps and sets stays.
"""
_CHAINS = {"CAFS-PORTS": "nat", "CAFS-POST": "nat", "CAFS-FORWARD": "filter"}
_CLOSED = [("!", "-i", "lo", side, "127.0.0.0/8", "-j", "DROP") for side in ("-d", "-s")]


def _program(name: str) -> str | None:
    return programs.find(name, "/usr/sbin", "/sbin")  # cron's PATH has neither


def _nft(text: str, *, may_fail: bool = False) -> None:
    code, said = programs.call([str(_program("nft")), "-f", "-"], text)
    if code and not may_fail:
        raise UnsupportedError(f"cannot set up address translation: {said.strip().partition(chr(10))[0]}")


def is_there() -> bool:
    """Whether the rules are still there that were made with the bridges: somebody may have flushed all, or they are of an
    older version."""
    return not _program("nft") or has_chain("cafs", "closed")


def add_bridge(link: str, subnet: ipaddress.IPv4Network) -> None:
    """Translate what leaves a bridge; the table is there.  Raises UnsupportedError if there is neither nft nor iptables."""
    if _program("nft"):
        _nft(_elements("add", link, subnet))
    elif _program("iptables"):
        _make_chains()
        for closed in _CLOSED:
            _add_rule("raw", "PREROUTING", *closed)
        for chain, rule in _rules_of(link, str(subnet)):
            _add_rule(_CHAINS[chain], chain, *rule)
    else:
        raise UnsupportedError("neither nft nor iptables is here")
    _let_through(link)
    if not _program("nft"):  # before all that lets through, ours and others'
        _iptables("-D", "FORWARD", "-j", "CAFS-FORWARD", may_fail=True)
        _iptables("-I", "FORWARD", "-j", "CAFS-FORWARD")


def _rules_of(link: str, subnet: str) -> list[tuple[str, tuple[str, ...]]]:
    """Of a bridge, for iptables: chain and rule."""
    return [
        ("CAFS-POST", ("-s", subnet, "!", "-o", link, "-j", "MASQUERADE")),
        ("CAFS-POST", ("-s", "127.0.0.0/8", "-o", link, "-j", "MASQUERADE")),
        ("CAFS-POST", ("-s", subnet, "-d", subnet, "-o", link, "-j", "MASQUERADE")),
        ("CAFS-FORWARD", ("-o", link, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "ACCEPT")),
        ("CAFS-FORWARD", ("-o", link, "!", "-i", link, "-j", "DROP")),
    ]


def _add_rule(table: str, chain: str, *rule: str) -> None:
    if not _iptables("-t", table, "-C", chain, *rule, may_fail=True):
        _iptables("-t", table, "-A", chain, *rule)


def restore(bridges: Iterable[tuple[str, ipaddress.IPv4Network]], ports: Iterable[Port]) -> None:
    """Make the table, with the bridges that are up and the ports that are published."""
    text = "".join(_elements("add", *bridge) for bridge in bridges)
    _nft(_TABLE + text + "".join(f"add element ip cafs {_element(port)}\n" for port in ports))


def _elements(verb: str, link: str, subnet: ipaddress.IPv4Network) -> str:
    """same: with br_netfilter even what stays on a bridge is forwarded."""
    found = {"bridges": f'"{link}"', "same": f'"{link}" . "{link}"', "subnets": str(subnet)}
    return "".join(f"{verb} element ip cafs {name} {{ {value} }}\n" for name, value in found.items())


def _let_through(link: str) -> None:
    """Where others have made FORWARD drop what they do not know, as dockerd does."""
    program = _program("iptables")
    if program is None:
        return
    policy = programs.call([program, "-S", "FORWARD"])[1]
    if policy.startswith("-P FORWARD DROP") and f"-i {link} " not in policy:
        _iptables("-I", "FORWARD", "-i", link, "-j", "ACCEPT")
        _iptables("-I", "FORWARD", "-o", link, "-j", "ACCEPT")


def forget_bridge(link: str, subnet: ipaddress.IPv4Network) -> None:
    """Its part of the rules."""
    if _program("nft"):
        _nft(_elements("delete", link, subnet), may_fail=True)
    elif _program("iptables"):
        for chain, rule in _rules_of(link, str(subnet)):
            _iptables("-t", _CHAINS[chain], "-D", chain, *rule, may_fail=True)


def _make_chains() -> None:
    hooks = {"CAFS-PORTS": ("PREROUTING", "OUTPUT"), "CAFS-POST": ("POSTROUTING",)}
    for chain, table in _CHAINS.items():
        if not _iptables("-t", table, "-n", "-L", chain, may_fail=True):
            _iptables("-t", table, "-N", chain)
            for hook in hooks.get(chain, ()):
                local = ("-m", "addrtype", "--dst-type", "LOCAL") if chain == "CAFS-PORTS" else ()
                _iptables("-t", "nat", "-A", hook, *local, "-j", chain)


def _iptables(*words: str, may_fail: bool = False) -> bool:
    code, said = programs.call([str(_program("iptables")), "-w", *words])
    if code and not may_fail:
        raise UnsupportedError(f"cannot set up address translation: {said.strip().partition(chr(10))[0]}")
    return not code


def publish(ports: list[Port], restore_rules: Callable[[], None]) -> None:
    """Publish ports.  restore_rules: called where the table is gone, as somebody has flushed it.  Raises CafsError."""
    if not ports:
        return
    if _program("nft"):
        text = "".join(f"add element ip cafs {_element(port)}\n" for port in ports)
        try:
            _nft(text)
        except UnsupportedError:
            restore_rules()
            try:
                _nft(text)
            except UnsupportedError as error:
                raise CafsError(str(error)) from None
        return
    for port in ports:
        _iptables("-t", "nat", "-A", "CAFS-PORTS", *_rule(port))


def unpublish(ports: list[Port]) -> None:
    """May be done twice."""
    for port in ports:
        if _program("nft"):
            _nft(f"delete element ip cafs {_element(port, with_target=False)}\n", may_fail=True)
        elif _program("iptables"):
            _iptables("-t", "nat", "-D", "CAFS-PORTS", *_rule(port), may_fail=True)


def _element(port: Port, *, with_target: bool = True) -> str:
    kind, at, number, address, inner = port
    key = f"{at} . {kind} . {number}" if at else f"{kind} . {number}"
    target = f" : {address} . {inner}" if with_target else ""
    return f"{'ports_at' if at else 'ports'} {{ {key}{target} }}"


def _rule(port: Port) -> list[str]:
    kind, at, number, address, inner = port
    where = ["-d", at] if at else []
    return [*where, "-p", kind, "--dport", str(number), "-j", "DNAT", "--to-destination", f"{address}:{inner}"]
