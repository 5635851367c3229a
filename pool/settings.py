"""pool.toml: what a pool is to be.  Errors say in which line."""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import dataclass, field

from cafs import atomic
from cafs.errors import FormatError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.scaling import Kind, Policy

_MAX = 1 << 20
COMMENTED = """\
# What this pool is to be; cpool(1).  All of it may be left out.

[pool]
# store = "s3://bucket/store"       # where images are, as the workers see it (default: this machine's)
# overcommit = 1.5                  # processors that jobs get for each that there is (1)
# lost_s = 30                       # calls are given up when their worker was silent for so long
# one_per_boot = true               # workers that were booted as one are one machine, and share what it has
# output_max = 67108864             # bytes of a job's stdout, and of its stderr, that are kept: the first half of them and the
#                                   # last (0: all that it writes)

# [cloud]                             # launch machines when there is work for them; without it, cpool simulate alone
# provider = "ec2"                  # uses this for [[machines]] and [scaling]
# region = "eu-central-1"
# zones = ["eu-central-1a"]         # or subnets, subnet-...
# image = "ami-0123456789abcdef0"   # with SSH, Python 3.9 and cloud-init
# user = "admin"                    # who logs in there
# address = "public"                # or "private"
# security_groups = ["sg-0123456789abcdef0"]
# disk_gb = 20
# boot_s = 300                      # a machine that takes longer to come up is ended
# poll_s = 5                        # how often the cloud is asked what there is

# [[machines]]
# name = "m7i.xlarge"               # and type = "m7i.xlarge", if the name is another
# cpus = 4
# memory = 16000000000
# price = 0.2016                    # an hour
# spot = false
# labels = ["big"]                  # for --constraint

# [scaling]
# launch_s = 40                     # from the call to the first job
# idle_s = 60                       # how long an empty machine stays
# least_cpus = 0                    # spare capacity: at least so much,
# share = 0.0                       # this share of what runs,
# quantile = 0.0                    # and what came within one launch time, on this share of occasions
# machines = 10                     # at most
# price = 5.0                       # an hour, at most
# price_day = 50.0                  # a day (UTC), at most

# [tenants.research]                # other users of this machine who may submit jobs in images
# users = ["alice", "1002"]
# cpus = 16                         # at most at once; also memory, gpus, jobs that have not ended, calls of functions
# share = 2.0                       # of what is there, beside others (1)
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """store: as of --store, '' for this machine's.  overcommit: processors given away for each that there is.

    one_per_boot: workers with one boot id are one machine, and share what it has.  lost_s: until calls are given up.
    output_max: bytes that are kept of each stream of a job, 0 for all.
    """

    store: str = ""
    machines: tuple[dict[str, Any], ...] = ()
    scaling: dict[str, float] = field(default_factory=dict)
    cloud: dict[str, Any] = field(default_factory=dict)
    tenants: dict[str, dict[str, Any]] = field(default_factory=dict)
    overcommit: float = 1.0
    one_per_boot: bool = False
    lost_s: float = 30.0
    output_max: int = 0

    def policy(self) -> Policy:
        """For pool.scaling.  Without kinds of machines: of 16 processors, free of charge."""
        from pool.scaling import Kind, Policy

        kinds = tuple(_kind(one) for one in self.machines) or (Kind("machine", 16.0),)
        found: dict[str, Any] = {"launch_s": 40.0, "machines": 10, **self.scaling}
        found.pop("price_day", None)
        found["machines"] = int(found["machines"])
        found["launch_s"] = max(found["launch_s"], 1.0)  # what was asked for is counted in windows of it
        return Policy(kinds, **found)


def _kind(table: dict[str, Any]) -> Kind:
    from pool.scaling import Kind

    fields = {name: table[name] for name in ("name", "cpus", "memory", "gpus", "price") if name in table}
    return Kind(**fields, labels=frozenset(table.get("labels", ())))


_NUMBERS = ("launch_s", "idle_s", "least_cpus", "share", "quantile", "machines", "price", "price_day")
_TEXTS = ("provider", "region", "image", "user", "address", "project", "network", "endpoint")
_KNOWN: dict[str, dict[str, type]] = {
    "pool": {"store": str, "overcommit": float, "one_per_boot": bool, "lost_s": float, "output_max": int},
    "cloud": dict.fromkeys(_TEXTS, str)
    | {"zones": list, "security_groups": list, "port": int, "disk_gb": int, "boot_s": float, "poll_s": float, "max_run_s": int},
    "machines": {"name": str, "type": str, "cpus": float, "memory": int, "gpus": int, "price": float}
    | {"spot": bool, "labels": list},
    "scaling": dict.fromkeys(_NUMBERS, float),
    "tenants": {"users": list, "cpus": float, "memory": int, "gpus": int, "jobs": int, "calls": int, "share": float},
}
_WORDS = {str: "text", bool: "true or false", list: "list of texts", int: "number", float: "number"}


def read(directory: str) -> Settings:
    """Of a pool.  Raises FormatError, naming the line."""
    path = os.path.join(directory, "pool.toml")
    return read_file(path) if os.path.exists(path) else Settings()


def read_file(path: str) -> Settings:
    """Raises FormatError, naming the line, OSError as CafsError."""
    try:
        text = atomic.read_file(path, _MAX).decode()
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    except UnicodeDecodeError:
        raise FormatError(f"{quote(path)} is not UTF-8") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line ([0-9]+)", str(error))
        raise FormatError(f"{path}:{line[1] if line else '?'}: {str(error).partition(' (')[0]}") from None
    for section, values in found.items():
        tables = values if section == "machines" and isinstance(values, list) else [values]
        if section == "tenants" and isinstance(values, dict):
            tables = list(values.values())
        if section not in _KNOWN or not all(isinstance(one, dict) for one in tables):
            raise FormatError(f"{path}:{_line_of(text, section)}: there is no {quote(section)}")
        for table in tables:
            _check(path, text, section, table)
    cloud, kinds = found.get("cloud", {}), tuple(found.get("machines", []))
    if cloud:
        _check_cloud(f"{path}:{_line_of(text, 'cloud')}", cloud, kinds)
    for name, table in found.get("tenants", {}).items():
        _check_tenant(f"{path}:{_line_of(text, f'tenants.{name}')}", name, table)
    pool = found.get("pool", {})
    more = float(pool.get("overcommit", 1.0)) or 1.0, bool(pool.get("one_per_boot", False)), float(pool.get("lost_s", 30.0))
    output_max = int(pool.get("output_max", 0))
    return Settings(
        pool.get("store", ""), kinds, found.get("scaling", {}), cloud, found.get("tenants", {}), *more, output_max=output_max
    )


def _check_tenant(where: str, name: str, table: dict[str, Any]) -> None:
    from pool.tenants import uid_of

    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name) or not table.get("users"):
        raise FormatError(f"{where}: a tenant has a plain name, and users")
    for user in table["users"]:
        try:
            uid_of(user)
        except KeyError:
            raise FormatError(f"{where}: there is no user {quote(user)}") from None


def _check_cloud(where: str, cloud: dict[str, Any], kinds: tuple[dict[str, Any], ...]) -> None:
    if cloud.get("provider") not in ("ec2", "gce"):
        raise FormatError(f"{where}: provider is ec2 or gce")
    for name in ("zones", "image", "user", *(("region",) if cloud["provider"] == "ec2" else ("project",))):
        if not cloud.get(name):
            raise FormatError(f"{where}: [cloud] needs {name}")
    if cloud.get("address", "public") not in ("public", "private"):
        raise FormatError(f"{where}: address is public or private")
    names = [one["name"] for one in kinds]
    if not names or len(set(names)) != len(names):
        raise FormatError(f"{where}: [cloud] needs [[machines]], with a name each that no other has")


def _check(path: str, text: str, section: str, table: dict[str, Any]) -> None:
    known = _KNOWN[section]
    for name, value in table.items():
        where = f"{path}:{_line_of(text, name)}"
        if name not in known:
            raise FormatError(f"{where}: [{section}] has no {quote(name)}")
        if not _is_of(known[name], value):
            raise FormatError(f"{where}: {name} is not a {_WORDS[known[name]]}")
    if section == "machines" and not (table.get("name") and table.get("cpus")):
        raise FormatError(f"{path}:{_line_of(text, section)}: a kind of machine has a name and cpus")


def _is_of(kind: type, value: object) -> bool:
    if kind in (str, bool):
        return isinstance(value, kind)
    if isinstance(value, list):
        return kind is list and all(isinstance(one, str) for one in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return kind is not list and is_number and (kind is float or value == int(value))  # type: ignore[call-overload]


def _line_of(text: str, word: str) -> int:
    pattern = re.compile(rf"^\s*\[?\s*{re.escape(word)}\b")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)
