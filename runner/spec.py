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


def command_line(options: Options, config: dict[str, Any]) -> list[str]:
    """Entrypoint and command, as docker combines them.  Raises UsageError if nothing is left to run."""
    given = options.value("entrypoint")
    entrypoint = ([given] if given else []) if given is not None else _words(config, "Entrypoint")
    command = options.command or ([] if given is not None else _words(config, "Cmd"))
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
    """PATH, the image's variables, --env-file, then -e.  HOME, HOSTNAME and TERM are added by `build`."""
    found = {"PATH": DEFAULT_PATH}
    for word in _words(config, "Env"):
        name, _, value = word.partition("=")
        found[name] = value
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


def volume(text: str) -> dict[str, Any]:
    """-v SRC:DST[:ro|rw] as an OCI mount.  SRC is made absolute; a SRC that is not there is made, as docker does."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1].startswith("/") or os.path.normpath(parts[1]) == "/":
        raise UsageError(f"volume {quote(text)} is not SRC:DST[:ro]", hint="DST is an absolute path")
    mode = parts[2] if len(parts) == 3 else "rw"
    if mode not in ("ro", "rw"):
        raise UsageError(f"unknown volume option {quote(mode)}")
    if "/" not in parts[0] and parts[0] not in (".", ".."):
        raise UsageError(f"volume {quote(text)}: named volumes are not supported", hint=f"a directory here is ./{parts[0]}")
    source = os.path.realpath(parts[0])
    os.makedirs(source, exist_ok=True) if not os.path.lexists(source) else None
    return bind(source, parts[1], mode)


def bind(source: str, destination: str, mode: str = "rw") -> dict[str, Any]:
    """A private recursive bind mount."""
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", mode]}


def _mounts(files: str, volumes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Docker's mounts, /etc/{hostname,hosts,resolv.conf} from the directory FILES, then the volumes."""

    def entry(destination: str, kind: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": kind, "source": kind, "options": list(options)}

    system = [
        entry("/proc", "proc", "nosuid", "noexec", "nodev"),
        entry("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        entry("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        entry("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        entry("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
        entry("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        entry("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
    ]
    etc = [bind(os.path.join(files, name), f"/etc/{name}") for name in ("hostname", "hosts", "resolv.conf")]
    taken = {os.path.normpath(one["destination"]) for one in volumes}
    return [one for one in system + etc if one["destination"] not in taken] + volumes


def build(
    *,
    container: str,
    arguments: list[str],
    variables: dict[str, str],
    cwd: str,
    user: User,
    hostname: str,
    options: Options,
    files: str,
    volumes: list[dict[str, Any]],
) -> dict[str, Any]:
    """The whole config.json."""
    terminal = options.has("tty")
    defaults = {"HOSTNAME": hostname, "HOME": user.home} | ({"TERM": "xterm"} if terminal else {})
    everything = defaults | variables
    held = CAPABILITIES if user.uid == 0 else []
    namespaces = ["pid", "ipc", "uts", "mount"]
    if options.value("network") != "host":
        namespaces.append("network")
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": "rootfs", "readonly": options.has("read-only")},
        "process": {
            "terminal": terminal,
            "args": arguments,
            "env": [f"{name}={value}" for name, value in everything.items()],
            "cwd": cwd,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "capabilities": {"bounding": CAPABILITIES, "effective": held, "permitted": held},
            "noNewPrivileges": False,
        },
        "mounts": _mounts(files, volumes),
        "linux": {
            "cgroupsPath": f"/cafs/{container}",
            "namespaces": [{"type": name} for name in namespaces],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": {"devices": _device_rules()},
        },
    }


def _device_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": "c", "major": a, "minor": b, "access": "rwm"} for a, b in _DEVICES]
    rules.append({"allow": True, "type": "c", "major": 136, "access": "rwm"})
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in "cb"]
    return rules
