"""config.json of a container: image config and flags to the OCI runtime spec (config.md, config-linux.md, v1.0.2).

Defaults are docker's: capabilities, namespaces, masked and read-only paths, devices, mounts.  No rlimits are written, so the
command has its caller's.
"""

from __future__ import annotations

import os

from cafs.errors import CafsError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runner.containers import Container
    from runner.options import Options
    from runner.users import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

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
MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
]
READ_ONLY = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
]
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2))  # null zero full random urandom tty ptmx
_ENV_FILE_MAX = 1 << 20
_INFINITY = (1 << 64) - 1
_CAPABILITY_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST
NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE
SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM
BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""


def command_line(options: Options, config: dict[str, Any]) -> list[str]:
    """Entrypoint and command, as docker combines them.  Raises UsageError if nothing is left to run."""
    given = options.value("entrypoint")
    entrypoint = ([given] if given else []) if given is not None else _words(config, "Entrypoint")
    command = options.words[1:] or ([] if given is not None else _words(config, "Cmd"))
    if not entrypoint + command:
        raise UsageError("no command: the image has none and none was given")
    return entrypoint + command


def _words(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise CafsError(f"the image's {key} is not a list of words")
    return value


def text(config: dict[str, Any], key: str) -> str:
    """A text of the image's config, empty if it is not there."""
    value = config.get(key) or ""
    if not isinstance(value, str):
        raise CafsError(f"the image's {key} is not a text")
    return value


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """An object of the image's config, empty if it is not there."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CafsError(f"the image's {key} is not an object")
    return value


def environment(options: Options, config: dict[str, Any]) -> dict[str, str]:
    """PATH, the image's variables, --env-file, then -e.  HOME, HOSTNAME and TERM are added when it starts."""
    found = {"PATH": DEFAULT_PATH}
    for word in _words(config, "Env"):
        name, _, value = word.partition("=")
        found[name] = value
    return with_given(found, options)


def with_given(found: dict[str, str], options: Options) -> dict[str, str]:
    """Variables, and --env-file's and -e's over them."""
    for path in options.all("env-file"):
        for word in _env_file(path):
            _assign(found, word)
    for word in options.all("env"):
        _assign(found, word)
    return found


def _assign(found: dict[str, str], word: str) -> None:
    name, equals, value = word.partition("=")
    if not name:
        raise UsageError(f"variable without a name: {quote(word)}")
    if equals:
        found[name] = value
    elif name in os.environ:
        found[name] = os.environ[name]
    else:
        found.pop(name, None)  # as the caller has none, the command has none


def _env_file(path: str) -> list[str]:
    """Docker's rules: no quotes are processed, '#' begins a comment line, a name alone takes the caller's value."""
    from cafs import atomic
    from cafs.errors import os_error

    try:
        text = atomic.read_file(path, _ENV_FILE_MAX).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise os_error(f"cannot read env file {quote(path)}", error) from error
    lines = [line.lstrip().removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    """A recursive bind mount, private if nothing else is said."""
    propagation = [] if any(one.endswith(("private", "shared", "slave")) for one in options) else ["rprivate"]
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *propagation, *options]}


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


def ulimits(options: Container) -> list[dict[str, Any]]:
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


def _oom_score(options: Container) -> dict[str, Any]:
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


def namespaces(options: Container, joined: dict[str, str]) -> list[dict[str, str]]:
    """Those of its own, and those of others.  joined: kind -> path of another's namespace."""
    found = [{"type": "mount"}]
    for kind, flag in (("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "network")):
        if kind in joined:
            found.append({"type": kind, "path": joined[kind]})
        elif options.value(flag) != "host":
            found.append({"type": kind})
    return found


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


def no_new_privileges(options: Container) -> bool:
    """By --security-opt.  Raises UsageError for an option that nobody knows."""
    found = False
    for text in options.all("security-opt"):
        name, _, value = text.replace(":", "=", 1).partition("=")
        if name not in ("seccomp", "no-new-privileges", "apparmor", "label", "systempaths"):
            raise UsageError(f"unknown security option {quote(text)}")
        if name == "no-new-privileges":
            found = value in ("", "true")
    return found


def build(
    container: Container,
    *,
    arguments: list[str],
    variables: dict[str, str],
    cwd: str,
    user: User,
    hostname: str,
    mounts: list[dict[str, Any]],
    devices: list[dict[str, Any]],
    joined: dict[str, str],
    is_386: bool = False,
) -> dict[str, Any]:
    """The whole config.json.  Raises CafsError."""
    from runner import cgroups, seccomp

    is_privileged = container.has("privileged")
    held = capabilities(container)
    effective = held if user.uid == 0 else []
    rules = [{"allow": True, "access": "rwm"}] if is_privileged else _device_rules()
    rules += [{"allow": True, "access": one["access"], **{k: one[k] for k in ("type", "major", "minor")}} for one in devices]
    is_open = is_privileged or "systempaths=unconfined" in container.all("security-opt")
    found: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": container.has("read-only")},
        "process": {
            "terminal": container.has("tty"),
            "args": arguments,
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": cwd,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "capabilities": {"bounding": held, "effective": effective, "permitted": effective},
            "noNewPrivileges": no_new_privileges(container),
            **_oom_score(container),
        },
        "mounts": mounts,
        "linux": {
            "cgroupsPath": cgroups.path_for(container, container.id),
            "namespaces": namespaces(container, joined),
            "maskedPaths": [] if is_open else MASKED,
            "readonlyPaths": [] if is_open else READ_ONLY,
            "resources": {"devices": rules, **cgroups.resources(container)},
        },
    }
    if limits := ulimits(container):
        found["process"]["rlimits"] = limits
    if container.value("uts") != "host" and "uts" not in joined:
        found["hostname"] = hostname
    if parameters := sysctls(container):
        found["linux"]["sysctl"] = parameters
    if devices:
        found["linux"]["devices"] = [{k: v for k, v in one.items() if k != "access"} for one in devices]
    if filters := seccomp.chosen(container, held, is_386=is_386):
        found["linux"]["seccomp"] = filters
    if profile := next((text[9:] for text in container.all("security-opt") if text.startswith(("apparmor=", "apparmor:"))), ""):
        found["process"]["apparmorProfile"] = profile
    if notes := _pairs(container, "annotation"):
        found["annotations"] = notes
    return found


def _pairs(options: Container, flag: str) -> dict[str, str]:
    pairs = (text.partition("=") for text in options.all(flag))
    return {name: value for name, _, value in pairs}


def labels(options: Options, config: dict[str, Any]) -> dict[str, str]:
    """The image's, --label-file's and --label's."""
    found = {str(name): str(value) for name, value in section(config, "Labels").items()}
    lines = [line for path in options.all("label-file") for line in _env_file(path)]
    for text in [*lines, *options.all("label")]:
        name, _, value = text.partition("=")
        if not name:
            raise UsageError(f"label without a name: {quote(text)}")
        found[name] = value
    return found


def _device_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": "c", "major": a, "minor": b, "access": "rwm"} for a, b in _DEVICES]
    rules.append({"allow": True, "type": "c", "major": 136, "access": "rwm"})
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in "cb"]
    return rules
