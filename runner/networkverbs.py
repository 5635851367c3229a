"""crun network ls|create|inspect|rm|prune."""

from __future__ import annotations

import json
import sys

from cafs import linux
from cafs.errors import UnsupportedError, UsageError
from runner import containers, listing, networks
from runner.each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.options import Options
    from runner.networks import Network


def call(options: Options) -> int:
    """Run one of them; returns the exit code.  Raises CafsError."""
    verb, names = (options.words[:1] or [""])[0], options.words[1:]
    if verb != "ls" and linux.in_user_namespace():
        raise UnsupportedError("networks need root", hint="--network none, or host")
    if verb == "ls":
        _list(options)
    elif verb == "create":
        if len(names) != 1:
            raise UsageError("NAME of the network is missing")
        sys.stdout.write(networks.create(names[0], options.value("subnet")).name + "\n")
    elif verb == "inspect":
        sys.stdout.write(json.dumps([_document(networks.find(name)) for name in names], indent=4, sort_keys=True) + "\n")
    elif verb == "rm":
        return _remove(names, force=options.has("force"))
    elif verb == "prune":
        unused = [one.name for one in networks.every() if one.name != containers.BRIDGE and not networks.leases(one)]
        return _remove(unused, force=True) if unused else 0
    else:
        raise UsageError(
            f"unknown command 'network {verb}'" if verb else "COMMAND is missing", hint="ls, create, inspect, rm or prune"
        )
    return 0


def _list(options: Options) -> None:
    found = networks.every()
    if options.has("quiet"):
        sys.stdout.write("".join(f"{one.name}\n" for one in found))
        return
    rows = [(one.name, "bridge", str(one.subnet), one.link) for one in found]
    listing.print_table([("NAME", "DRIVER", "SUBNET", "LINK"), *rows, ("host", "host", "", ""), ("none", "null", "", "")])


def _document(network: Network) -> dict[str, object]:
    users = {}
    for address, identity in networks.leases(network).items():
        one = containers.load(identity)
        users[identity] = {"IPv4Address": f"{address}/{network.subnet.prefixlen}", "Name": one.name if one else ""}
    config = [{"Subnet": str(network.subnet), "Gateway": network.gateway}]
    return {"Name": network.name, "Driver": "bridge", "IPAM": {"Config": config}, "Containers": users, "Link": network.link}


def _remove(names: list[str], *, force: bool) -> int:
    if not names:
        raise UsageError("NAME of the network is missing")
    return each(names, networks.remove, missing_ok=force)
