"""Devices of a container: --device, --privileged, and what CDI specifications say, GPUs above all.

Specifications are read from /etc/cdi and /var/run/cdi, of which the later wins; device nodes, mounts, variables and groups
are put into config.json by our own code.  No hook of theirs is run: a hook is the host's root acting on paths of the image.
What the usual hooks do is done by a directory of links: names of shared libraries, and links that are asked for.
Source: CNCF Container Device Interface, SPEC.md 1.0.0.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from itertools import pairwise

from cafs import atomic
from cafs.errors import CafsError, FormatError, NotFound, UnsupportedError, UsageError, quote
from cafs.extras import extra
from runner import gpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runner.containers import Container

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
VARIABLE = "CAFS_CDI"
"""Other directories instead, with ':' between them."""

DEVICES = "CAFS_GPU_DEVICES"
"""Where device nodes of GPUs are that no specification tells of, instead of /dev."""

GPU = gpus.KIND
_LINKS = "/usr/local/lib/cafs-devices"
_VERSIONS = re.compile(r"(0\.[3-9]|1\.[0-9]+)\.[0-9]+")
_NAME = re.compile(r"([a-zA-Z0-9][a-zA-Z0-9._-]*/[a-zA-Z0-9][a-zA-Z0-9._-]*)=([a-zA-Z0-9][a-zA-Z0-9._:-]*)")
_SPEC_MAX = 1 << 22
_MOUNT_OPTIONS = ("ro", "rw", "nosuid", "nodev", "noexec", "bind", "rbind", "private", "rprivate")


class Found:
    """What is to be put into config.json.  nodes: linux.devices, with 'access' beside."""

    __slots__ = ("env", "groups", "mounts", "nodes")

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.mounts: list[dict[str, Any]] = []
        self.env: dict[str, str] = {}
        self.groups: list[int] = []


def find(container: Container) -> Found:
    """All devices that were asked for.  Raises CafsError."""
    found = Found()
    names: list[str] = []
    for text in container.all("device"):
        if _NAME.fullmatch(text):
            names.append(text)
        else:
            found.nodes += _host_device(text)
    specs = _specifications() if names or container.value("gpus") else []
    if container.value("gpus") and not any(spec["kind"] == GPU for spec in specs):
        specs += filter(None, [gpus.specification(os.environ.get(DEVICES, "/dev"))])
    names += _gpus(container.value("gpus") or "", specs)
    if container.has("privileged"):
        known = {node["path"] for node in found.nodes}
        found.nodes += [node for node in _all_devices() if node["path"] not in known]
    edits = _edits(names, specs)
    for one in edits:
        _apply(one, found)
    if edits:
        _add_links(container, edits, found)
    return found


def _host_device(text: str) -> list[dict[str, Any]]:
    """--device PATH[:TARGET[:rwm]]; a directory stands for all devices in it."""
    parts = text.split(":")
    access = parts.pop() if len(parts) > 1 and re.fullmatch("[rwm]{1,3}", parts[-1]) else "rwm"
    source, target = parts[0], parts[1] if len(parts) > 1 else parts[0]
    if len(parts) > 2 or not source.startswith("/") or not target.startswith("/"):
        raise UsageError(f"device {quote(text)} is not PATH[:TARGET[:rwm]]")
    if os.path.isdir(source):
        names = sorted(os.listdir(source))
        pairs = [(os.path.join(source, name), os.path.join(target, name)) for name in names]
        return [_node(one, other, access) for one, other in pairs if _is_device(one)]
    return [_node(source, target, access)]


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _node(source: str, target: str, access: str) -> dict[str, Any]:
    try:
        status = os.stat(source)
    except OSError as error:
        raise NotFound(f"no device {quote(source)}: {error.strerror}") from error
    if not stat.S_ISCHR(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise CafsError(f"{quote(source)} is not a device")
    return {
        "path": os.path.normpath(target),
        "type": "c" if stat.S_ISCHR(status.st_mode) else "b",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "access": access,
    }


def _all_devices() -> list[dict[str, Any]]:
    """--privileged: what is in /dev, but terminals and what is mounted there."""
    found = []
    for top, names, files in os.walk("/dev"):
        names[:] = [name for name in names if name not in ("pts", "shm", "mqueue", "fd")]
        paths = (os.path.join(top, name) for name in files)
        wanted = (path for path in paths if path not in ("/dev/console", "/dev/ptmx") and not os.path.islink(path))
        found += [_node(path, path, "rwm") for path in wanted if _is_device(path)]
    standard = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    return [node for node in found if node["path"] not in standard]


def _specifications() -> list[dict[str, Any]]:
    """All, the ones that win last.  Raises FormatError."""
    found = []
    for directory in os.environ.get(VARIABLE, ":".join(DIRECTORIES)).split(":"):
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        found += [_load(os.path.join(directory, name)) for name in names if name.endswith((".json", ".yaml", ".yml"))]
    return found


def _load(path: str) -> dict[str, Any]:
    try:
        data = atomic.read_file(path, _SPEC_MAX)
        if path.endswith(".json"):
            found = json.loads(data)
        else:
            with extra("cdi"):
                import yaml

            found = yaml.safe_load(data)
        if not _VERSIONS.fullmatch(str(found["cdiVersion"])):
            raise FormatError(f"CDI specification {quote(path)} is of version {found['cdiVersion']}, which is not known")
        kinds = [found["kind"], *(device["name"] for device in found["devices"])]
        if not all(isinstance(one, str) for one in kinds):
            raise ValueError
    except (FormatError, UnsupportedError):
        raise
    except Exception as error:  # of the parser's own kinds
        raise FormatError(f"{quote(path)} is not a CDI specification: {error}") from None
    return dict(found)


def _gpus(wanted: str, specs: list[dict[str, Any]]) -> list[str]:
    """Names of the devices that --gpus means."""
    if not wanted:
        return []
    names = [device["name"] for spec in specs if spec["kind"] == GPU for device in spec["devices"]]
    if not names:
        hint = "load the driver, or: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        raise CafsError("--gpus: this host has no /dev/nvidia0 and no CDI specification of nvidia.com/gpu", hint=hint)
    wanted = wanted.strip('"')
    if wanted == "all":
        return [f"{GPU}=all"] if "all" in names else [f"{GPU}={name}" for name in dict.fromkeys(names)]
    numbers = sorted({int(name) for name in names if name.isdigit()})
    count = wanted.removeprefix("count=")
    if count.isdigit():
        if int(count) > len(numbers):
            raise CafsError(f"--gpus {wanted}: this host has {len(numbers)}")
        return [f"{GPU}={number}" for number in numbers[: int(count)]]
    if wanted.startswith("device="):
        return [f"{GPU}={name}" for name in wanted.removeprefix("device=").split(",")]
    raise UsageError(f"--gpus {quote(wanted)}", hint="all, a number, or device=0,1")


def _edits(names: list[str], specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """containerEdits of the specifications that are used, each once, then of the devices."""
    common, own = [], []
    for name in names:
        kind, _, device_name = name.partition("=")
        for spec in reversed(specs):
            device = next((one for one in spec["devices"] if one["name"] == device_name), None)
            if spec["kind"] == kind and device is not None:
                edits = spec.get("containerEdits") or {}
                if edits not in common:
                    common.append(edits)
                own.append(device.get("containerEdits") or {})
                break
        else:
            raise NotFound(f"no CDI device {quote(name)}", hint="a specification in /etc/cdi says what there is")
    return common + own


def _apply(edits: dict[str, Any], found: Found) -> None:
    try:
        for text in edits.get("env") or []:
            name, _, value = text.partition("=")
            found.env[name] = value
        for node in edits.get("deviceNodes") or []:
            made = _node(node.get("hostPath") or node["path"], node["path"], node.get("permissions") or "rwm")
            made |= {key: int(node[key]) for key in ("uid", "gid", "fileMode") if node.get(key) is not None}
            if made["path"] not in [one["path"] for one in found.nodes]:
                found.nodes.append(made)
        for mount in edits.get("mounts") or []:
            options = list(mount.get("options") or ["ro", "nosuid", "nodev", "rbind", "rprivate"])
            if unknown := [one for one in options if one not in _MOUNT_OPTIONS]:
                raise FormatError(f"a CDI specification has the mount option {quote(str(unknown[0]))}")
            if not os.path.isabs(mount["containerPath"]) or not os.path.exists(mount["hostPath"]):
                raise NotFound(f"a CDI specification mounts {quote(str(mount['hostPath']))}, which is not there")
            one = {"destination": mount["containerPath"], "type": "bind", "source": mount["hostPath"], "options": options}
            if one not in found.mounts:
                found.mounts.append(one)
        found.groups += [int(gid) for gid in edits.get("additionalGids") or [] if int(gid) > 0]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise FormatError("a CDI specification has container edits that are none") from None


def _add_links(container: Container, edits: list[dict[str, Any]], found: Found) -> None:
    """Instead of the hooks create-symlinks and update-ldcache: a read-only directory, and the library path that finds it."""
    links, folders = {}, []
    for mount in found.mounts:
        path = mount["destination"]
        name = _soname(mount["source"]) if ".so" in os.path.basename(path) else ""
        if name and name != os.path.basename(path):
            links[name] = path
        if ".so" in os.path.basename(path) and os.path.dirname(path) not in folders:
            folders.append(os.path.dirname(path))
    for hook in (hook for edit in edits for hook in edit.get("hooks") or []):
        words = [str(word) for word in hook.get("args") or []]
        for flag, value in pairwise(words):
            if flag == "--link" and "::" in value:
                target, _, link = value.partition("::")
                links[os.path.basename(link)] = os.path.join(os.path.dirname(link), target)
    if not links and not folders:
        return
    directory = container.path("devices")
    os.makedirs(directory, mode=0o755, exist_ok=True)
    for name, target in links.items():
        atomic.unlink_quietly(os.path.join(directory, name))
        os.symlink(target, os.path.join(directory, name))
    options = ["rbind", "ro", "nosuid", "nodev", "rprivate"]
    found.mounts.append({"destination": _LINKS, "type": "bind", "source": directory, "options": options})
    before = container.asked["env"].get("LD_LIBRARY_PATH") or found.env.get("LD_LIBRARY_PATH")
    found.env["LD_LIBRARY_PATH"] = ":".join([*([before] if before else []), _LINKS, *folders])


def _soname(path: str) -> str:
    """DT_SONAME of a 64-bit little-endian shared library (elf(5)); '' if there is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:6] != b"\x7fELF\x02\x01":
                return ""
            (offset,), (size, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(min(size * count, 1 << 16))
            rows = [struct.unpack_from("<IIQQQQQQ", table, at) for at in range(0, len(table) - 55, max(size, 56))]
            dynamic = next(row for row in rows if row[0] == 2)
            file.seek(dynamic[2])
            entries = list(struct.iter_unpack("<qQ", file.read(min(dynamic[5], 1 << 16) // 16 * 16)))
            name, strings = next(v for tag, v in entries if tag == 14), next(v for tag, v in entries if tag == 5)
            place = next(row for row in rows if row[0] == 1 and row[3] <= strings < row[3] + row[5])
            file.seek(strings - place[3] + place[2] + name)
            text = file.read(256).partition(b"\0")[0].decode("ascii")
            return text if re.fullmatch(r"[A-Za-z0-9._+-]+", text) else ""
    except (OSError, struct.error, StopIteration, UnicodeDecodeError):
        return ""
