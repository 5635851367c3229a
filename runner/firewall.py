"""Address translation and published ports: one nftables table of ours, or iptables where there is no nft.

A published port is one element of a map (nft), so adding and removing one takes the same time however many there are.
Source: nft(8); iptables-extensions(8).
"""

from __future__ import annotations

from cafs.errors import CafsError, UnsupportedError
from runner import programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ipaddress

    Port = tuple[str, str, int, str, int]  # tcp or udp, address of the host ('' for all), port, container's address, its port

_TABLE = """
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
  chain guard {
    type filter hook prerouting priority raw;
    iifname @bridges ip daddr 127.0.0.0/8 drop
  }
  chain forward {
    type filter hook forward priority filter;
    ct status dnat accept
    ct state established,related accept
    iifname . oifname @same accept
    iifname @bridges oifname @bridges drop
  }
}
"""
_CHAINS = ("CAFS-PORTS", "CAFS-POST")


def _program(name: str) -> str | None:
    return programs.find(name, "/usr/sbin", "/sbin")  # cron's PATH has neither


def _nft(text: str, *, may_fail: bool = False) -> None:
    code, said = programs.call([str(_program("nft")), "-f", "-"], text)
    if code and not may_fail:
        raise UnsupportedError(f"cannot set up address translation: {said.strip().partition(chr(10))[0]}")


def _has_table() -> bool:
    return not programs.call([str(_program("nft")), "list", "table", "ip", "cafs"])[0]


def add_bridge(link: str, subnet: ipaddress.IPv4Network) -> None:
    """Translate what leaves a bridge.  Raises UnsupportedError if there is neither nft nor iptables."""
    if _program("nft"):
        if not _has_table():
            _nft(_TABLE)
        _nft(_elements("add", link, subnet))
    elif _program("iptables"):
        _make_chains()
        _iptables("-t", "nat", "-A", "CAFS-POST", "-s", str(subnet), "!", "-o", link, "-j", "MASQUERADE")
        _iptables("-t", "raw", "-I", "PREROUTING", "-i", link, "-d", "127.0.0.0/8", "-j", "DROP")
        _iptables("-t", "nat", "-A", "CAFS-POST", "-s", "127.0.0.0/8", "-o", link, "-j", "MASQUERADE")
        _iptables("-t", "nat", "-A", "CAFS-POST", "-s", str(subnet), "-d", str(subnet), "-o", link, "-j", "MASQUERADE")
    else:
        raise UnsupportedError("neither nft nor iptables is here")
    _let_through(link)


def _make_anew() -> None:
    """The table, where somebody has flushed all rules, with the bridges that there are; a port that nobody has goes."""
    from runner import networks
    from runner.netlink import has_link

    if not _has_table():
        _nft(_TABLE)
        for one in networks.every():
            if has_link(one.link):
                _nft(_elements("add", one.link, one.subnet))


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


def _make_chains() -> None:
    for chain in _CHAINS:
        if not _iptables("-t", "nat", "-n", "-L", chain, may_fail=True):
            _iptables("-t", "nat", "-N", chain)
            hooks = ("PREROUTING", "OUTPUT") if chain == "CAFS-PORTS" else ("POSTROUTING",)
            for hook in hooks:
                local = ("-m", "addrtype", "--dst-type", "LOCAL") if chain == "CAFS-PORTS" else ()
                _iptables("-t", "nat", "-A", hook, *local, "-j", chain)


def _iptables(*words: str, may_fail: bool = False) -> bool:
    code, said = programs.call([str(_program("iptables")), "-w", *words])
    if code and not may_fail:
        raise UnsupportedError(f"cannot set up address translation: {said.strip().partition(chr(10))[0]}")
    return not code


def publish(ports: list[Port]) -> None:
    """Raises CafsError."""
    if not ports:
        return
    if _program("nft"):
        text = "".join(f"add element ip cafs {_element(port)}\n" for port in ports)
        try:
            _nft(text)
        except UnsupportedError:
            _make_anew()
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
