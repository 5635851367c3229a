"""config.json of a container: image config and flags to the OCI runtime spec (config.md, config-linux.md, v1.0.2).

Defaults are docker's: capabilities, namespaces, masked and read-only paths, devices, mounts.  No rlimits are written, so the
command has its caller's.
"""

from __future__ import annotations

import os

from cafs import linux
from cafs.errors import CafsError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container
    from runner.users import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

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


def check_cwd(text: str) -> str:
    """A working directory.  Raises UsageError for what could be a descriptor of ours (CVE-2024-21626)."""
    if not text.startswith("/") or os.path.normpath(text).lstrip("/").split("/")[0] == "proc":
        raise UsageError(f"working directory {quote(text)} is not an absolute path outside /proc")
    return text


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
    """Docker's rules: no quotes are processed, '#' begins a comment line, a name alone takes the caller's value.

    A file with NUL bytes is read as `env -0` writes it, so that a value may have lines.
    """
    from cafs import atomic
    from cafs.errors import os_error

    try:
        text = atomic.read_file(path, _ENV_FILE_MAX).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise os_error(f"cannot read env file {quote(path)}", error) from error
    if "\0" in text:
        return [word for word in text.split("\0") if word]
    lines = [line.lstrip().removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    """A recursive bind mount, private if nothing else is said, and, if it is read-only, so with all that is mounted below.

    Options of ours: bind, without what is mounted below; norro, which leaves that as it is.
    """
    propagation = [] if any(one.endswith(("private", "shared", "slave")) for one in options) else ["rprivate"]
    kind = [] if "bind" in options else ["rbind"]
    deep = ["rro"] if "ro" in options and not {"bind", "norro"} & set(options) else []
    kept = [one for one in options if one != "norro"]
    return {"destination": destination, "type": "bind", "source": source, "options": [*kind, *propagation, *kept, *deep]}


_LOCKED = (
    ("ro", "rw", os.ST_RDONLY),
    ("nosuid", "suid", os.ST_NOSUID),
    ("nodev", "dev", os.ST_NODEV),
    ("noexec", "exec", os.ST_NOEXEC),
)
"""Flags of a mount that cannot be removed in a user namespace below its own: option, opposite, bit of statvfs(3)."""


def keep_locked_flags(mounts: list[dict[str, Any]]) -> None:
    """Add to each bind mount the flags that its source has, as the runtime must keep them in a user namespace.

    To set one flag runc remounts with those that it was given alone; the kernel refuses that with EPERM where it would remove
    another, such as nosuid of a systemd host's /tmp.  Where the opposite was asked for, that error is the answer.
    """
    for one in mounts:
        options = one["options"]
        if one["type"] == "bind" and not {"ro", "nosuid", "nodev", "noexec"}.isdisjoint(options):
            flags = os.statvfs(one["source"]).f_flag
            options += [name for name, opposite, bit in _LOCKED if flags & bit and not {name, opposite} & set(options)]


def namespaces(options: Container, joined: dict[str, str]) -> list[dict[str, str]]:
    """Those of its own, and those of others.  joined: kind -> path of another's namespace."""
    from runner import cgroups

    found = [{"type": "mount"}]
    if cgroups.is_private(options):
        found.append({"type": "cgroup"})
    if "user" in joined:
        found.append({"type": "user", "path": joined["user"]})
    for kind, flag in (("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "network")):
        if kind in joined:
            found.append({"type": kind, "path": joined[kind]})
        elif options.value(flag) != "host":
            found.append({"type": kind})
    return found


def build(
    container: Container,
    *,
    arguments: list[str],
    variables: dict[str, str],
    user: User,
    mounts: list[dict[str, Any]],
    devices: list[dict[str, Any]],
    joined: dict[str, str],
    first_id: int = 0,
) -> dict[str, Any]:
    """The whole config.json.  first_id: what 0 in it is on the host.  Raises CafsError."""
    from runner import cgroups, etc, privileges, seccomp

    is_privileged = container.has("privileged")
    held = privileges.capabilities(container)
    effective = held if user.uid == 0 else []
    rules = [{"allow": True, "access": "rwm"}] if is_privileged else _device_rules()
    rules += [{"allow": True, "access": one["access"], **{k: one[k] for k in ("type", "major", "minor")}} for one in devices]
    is_open = is_privileged or any(text.startswith("systempaths") for text in container.all("security-opt"))
    found: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": container.rootfs, "readonly": container.has("read-only")},
        "process": {
            "terminal": container.has("tty"),
            "args": arguments,
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": container.asked["cwd"],
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "capabilities": {"bounding": held, "effective": effective, "permitted": effective},
            "noNewPrivileges": privileges.no_new_privileges(container),
            **privileges.oom_score(container),
        },
        "mounts": mounts,
        "linux": {
            "namespaces": namespaces(container, joined),
            "maskedPaths": [] if is_open else MASKED,
            "readonlyPaths": [] if is_open else READ_ONLY,
            "resources": {"devices": rules, **cgroups.resources(container)},
        },
    }
    if any({"shared", "rshared"} & set(one["options"]) for one in mounts):  # runc makes all a slave of ours else
        found["linux"]["rootfsPropagation"] = "shared"
    if not linux.in_user_namespace():  # whose root can make none, and runc then does without if no path is given
        found["linux"]["cgroupsPath"] = cgroups.path_for(container, container.id)
    if first_id:
        from runner.idmapping import WIDTH

        for kind in ("uidMappings", "gidMappings"):
            found["linux"][kind] = [{"containerID": 0, "hostID": first_id, "size": WIDTH}]
    if limits := privileges.ulimits(container):
        found["process"]["rlimits"] = limits
    if container.value("uts") != "host" and "uts" not in joined:
        found["hostname"] = etc.hostname_of(container)
    if parameters := privileges.sysctls(container):
        found["linux"]["sysctl"] = parameters
    if devices:
        found["linux"]["devices"] = [{k: v for k, v in one.items() if k != "access"} for one in devices]
    if filters := seccomp.chosen(container, held):
        found["linux"]["seccomp"] = filters
    profile = next((text[9:] for text in container.all("security-opt") if text.startswith(("apparmor=", "apparmor:"))), "")
    if profile and (profile != "unconfined" or privileges.has_apparmor()):
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
