"""What a container may do: capabilities, limits of resources, kernel parameters: docker's defaults, and what flags say.

What this host does not grant is refused before the runtime starts.  Sources: capabilities(7), getrlimit(2), proc(5).
"""

from __future__ import annotations

from cafs.errors import CafsError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container

CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
_VALUES = {"no-new-privileges": ("", "true", "false"), "systempaths": ("unconfined",)}
_HINTS = {"no-new-privileges": "true or false", "systempaths": "unconfined"}
_INFINITY = (1 << 64) - 1
_CAPABILITY_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST
NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE
SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM
BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""


def capabilities(options: Container) -> list[str]:
    """Docker's, and what --cap-add, --cap-drop and --privileged make of them.  Raises UsageError."""
    known, granted = set(known_capabilities()), set(granted_capabilities())

    def named(flag: str) -> set[str]:
        found = set()
        for text in options.all(flag):
            name = text.upper()
            name = name if name.startswith("CAP_") or name == "ALL" else f"CAP_{name}"
            if name != "ALL" and name not in known:
                raise UsageError(f"unknown capability {quote(text)}")
            if flag == "cap-add" and name != "ALL" and name not in granted:
                raise CafsError(f"--cap-add {text}: this host does not grant it")
            found |= granted if name == "ALL" else {name}
        return found

    if options.has("privileged"):
        return sorted(granted)
    add, drop = named("cap-add"), named("cap-drop")
    if "ALL" in [text.upper() for text in options.all("cap-drop")]:
        return sorted(add)
    return sorted((set(CAPABILITIES) & granted | add) - drop)


def granted_capabilities() -> list[str]:
    """Those that we may pass on: of our bounding set."""
    mask = _mask("CapBnd")
    return [name for at, name in enumerate(known_capabilities()) if mask >> at & 1]


def known_capabilities() -> list[str]:
    """Those of this kernel (capabilities(7); include/uapi/linux/capability.h)."""
    try:
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            last = int(file.read())
    except (OSError, ValueError):
        last = 40
    return ["CAP_" + name for name in _CAPABILITY_NAMES.split()[: last + 1]]


def ulimits(options: Options | Container) -> list[dict[str, Any]]:
    """--ulimit as rlimits; who may not raise a limit cannot give more than it has.  Raises UsageError, CafsError."""
    import resource

    found = {}
    for text in options.all("ulimit"):
        name, equals, value = text.partition("=")
        soft, _, hard = value.partition(":")
        number = getattr(resource, f"RLIMIT_{name.upper()}", None)
        limits = [_limit(one) for one in (soft, hard or soft)]
        if not equals or number is None or None in limits:
            raise UsageError(f"{quote(text)} is not NAME=SOFT[:HARD]", hint="nofile=1024:2048")
        low, high = (one if one is not None else 0 for one in limits)
        if low > high:
            raise UsageError(f"--ulimit {name}: the soft limit is over the hard one")
        most = resource.getrlimit(number)[1]
        most = _INFINITY if most == resource.RLIM_INFINITY else most
        if high > most and not _may_raise():
            raise CafsError(f"--ulimit {name}={value}: this host grants at most {most}")
        found[name] = {"type": f"RLIMIT_{name.upper()}", "soft": low, "hard": high}
    return list(found.values())


def _limit(text: str) -> int | None:
    if text in ("-1", "unlimited"):
        return _INFINITY
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _may_raise() -> bool:
    return _has_capability(24)  # CAP_SYS_RESOURCE


def _has_capability(number: int) -> bool:
    return bool(_mask("CapEff") >> number & 1)


def _mask(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(name + ":"))


def oom_score(options: Container) -> dict[str, Any]:
    """--oom-score-adj, as a part of the process.  Raises UsageError, CafsError."""
    text = options.value("oom-score-adj")
    if text is None:
        return {}
    try:
        score = int(text)
    except ValueError:
        score = 9999
    if not -1000 <= score <= 1000:
        raise UsageError(f"--oom-score-adj {text}: from -1000 to 1000")
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        mine = int(file.read())
    if score < mine and not _may_raise():
        raise CafsError(f"--oom-score-adj {text}: this host grants no less than {mine}")
    return {"oomScoreAdj": score}


def sysctls(options: Container) -> dict[str, str]:
    """--sysctl; only what belongs to a namespace of its own.  Raises UsageError."""
    found = {}
    for text in options.all("sysctl"):
        name, equals, value = text.partition("=")
        is_ipc = name.startswith(("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.")) and options.value("ipc") != "host"
        is_net = name.startswith("net.") and options.value("network") != "host"
        if not equals or not (is_ipc or is_net):
            raise UsageError(f"--sysctl {quote(text)} is not of a namespace that the container has for itself")
        found[name] = value
    return found


def has_apparmor() -> bool:
    """Whether this host confines by AppArmor."""
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read(1) == "Y"
    except OSError:
        return False


def no_new_privileges(options: Container) -> bool:
    """By --security-opt.  Raises UsageError for an option that nobody knows."""
    found = False
    for text in options.all("security-opt"):
        name, _, value = text.replace(":", "=", 1).partition("=")
        if name not in ("seccomp", "no-new-privileges", "apparmor", "label", "systempaths"):
            raise UsageError(f"unknown security option {quote(text)}")
        if value not in _VALUES.get(name, (value,)) or (not value and name in ("seccomp", "apparmor")):
            raise UsageError(f"security option {quote(name)} cannot be {quote(value)}", hint=_HINTS.get(name))
        if name == "no-new-privileges":
            found = value in ("", "true")
    return found
