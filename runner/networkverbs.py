"""crun network ls|create|inspect|rm|prune."""

from __future__ import annotations

import json
import sys

from runner import containers, filters, listing, networks
from runner.each import each
from runner.volumeverbs import TRUTH, check_driver, labels_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.options import Options
    from runner.networks import Network

_FILTERS: dict[str, tuple[str, ...]] = {
    "name": (), "label": (), "driver": ("bridge", "host", "null"), "type": ("custom", "builtin"), "dangling": TRUTH
}  # fmt: skip
_PRUNE_FILTERS: dict[str, tuple[str, ...]] = {"label": (), "label!": ()}
_OTHERS = (("host", "host"), ("none", "null"))


def _create(options: Options) -> int:
    check_driver(options, "bridge")
    sys.stdout.write(networks.create(options.words[0], options.value("subnet"), labels_of(options)).name + "\n")
    return 0


def _inspect(options: Options) -> int:
    rows = [_document(networks.find(name)) for name in options.words]
    sys.stdout.write(json.dumps(rows, indent=4, sort_keys=True) + "\n")
    return 0


def _remove(options: Options) -> int:
    return each(options.words, networks.remove, missing_ok=options.has("force"))


def _prune(options: Options) -> int:
    wanted = filters.parse(options.all("filter"), _PRUNE_FILTERS)
    fitting = [one for one in networks.every() if filters.fits(wanted, _tests(one.name, "bridge", one.labels, one))]
    unused = [one.name for one in fitting if one.name != containers.BRIDGE and not networks.leases(one)]
    return each(unused, networks.remove, missing_ok=True)


def _list(options: Options) -> int:
    wanted = filters.parse(options.all("filter"), _FILTERS)
    own = [one for one in networks.every() if filters.fits(wanted, _tests(one.name, "bridge", one.labels, one))]
    if options.has("quiet"):
        sys.stdout.write("".join(f"{one.name}\n" for one in own))
        return 0
    rows = [(one.name, "bridge", str(one.subnet), one.link) for one in own]
    others = [(name, driver, "", "") for name, driver in _OTHERS if filters.fits(wanted, _tests(name, driver, {}, None))]
    listing.print_table([("NAME", "DRIVER", "SUBNET", "LINK"), *rows, *others])
    return 0


def _tests(name: str, driver: str, labels: dict[str, str], network: Network | None) -> dict[str, Callable[[str], bool]]:
    is_own = network is not None and name != containers.BRIDGE
    return {
        "name": lambda text: filters.is_like(text, name),
        "driver": lambda text: text == driver,
        "type": lambda text: (text == "custom") == is_own,
        "label": lambda text: filters.has_label(labels, text),
        "label!": lambda text: not filters.has_label(labels, text),
        "dangling": lambda text: (text in ("true", "1")) == (is_own and network is not None and not networks.leases(network)),
    }


def _document(network: Network) -> dict[str, object]:
    users = {}
    for address, identity in networks.leases(network).items():
        one = containers.load(identity)
        users[identity] = {"IPv4Address": f"{address}/{network.subnet.prefixlen}", "Name": one.name if one else ""}
    config = [{"Subnet": str(network.subnet), "Gateway": network.gateway}]
    about: dict[str, object] = {"Name": network.name, "Driver": "bridge", "IPAM": {"Config": config}, "Link": network.link}
    return about | {"Containers": users, "Labels": network.labels}


VERBS = {"ls": _list, "create": _create, "inspect": _inspect, "rm": _remove, "prune": _prune}
"""Each returns the exit code, and raises CafsError."""
