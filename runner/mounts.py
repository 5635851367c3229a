"""What is mounted in a container beside its root: -v, --mount, --tmpfs, the image's VOLUMEs, and the system's own.

Parsed when a container is made, so that paths mean what they meant then; turned into OCI mounts whenever it starts.
Mount options are a closed list: nothing of the user's is joined into one.
"""

from __future__ import annotations

import os

from cafs import linux
from cafs.errors import CafsError, UsageError, os_error, quote
from runner import cgroups, etc, stubs, volumes
from runner.spec import bind, section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container
    from runner.idmapping import Ids

_PROPAGATION = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_TMPFS = ("ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "noatime", "relatime")
_RECURSIVE: dict[str, list[str]] = {"enabled": [], "readonly": [], "disabled": ["bind"], "writable": ["norro"]}
_KEYS = {
    "bind": ("readonly", "bind-propagation", "bind-nonrecursive", "bind-recursive"),
    "volume": ("readonly", "volume-nocopy", "volume-label", "volume-driver"),
    "tmpfs": ("readonly", "tmpfs-size", "tmpfs-mode"),
}


def asked(options: Options, config: dict[str, Any]) -> list[dict[str, Any]]:
    """All mounts, by target, one each; the image's VOLUMEs where nothing else is.  Raises UsageError, CafsError."""
    found: dict[str, dict[str, Any]] = {}
    given = [_volume(text) for text in options.all("volume")] + [_mount(text) for text in options.all("mount")]
    for one in [*given, *(_tmpfs(text) for text in options.all("tmpfs"))]:
        if one["target"] in found:
            raise UsageError(f"two mounts on {quote(one['target'])}")
        found[one["target"]] = one
    for target in section(config, "Volumes"):
        path = "/" + os.path.normpath("/" + target).lstrip("/")
        if path != "/" and path not in found:
            found[path] = {"type": "volume", "name": "", "target": path, "options": [], "copy": True}
    return [found[path] for path in sorted(found)]


def _target(text: str, whole: str) -> str:
    path = os.path.normpath(text)
    if not text.startswith("/") or path.strip("/") == "" or "\0" in text:
        raise UsageError(f"volume {quote(whole)} is not SRC:DST[:ro]", hint="DST is an absolute path, not /")
    return "/" + path.lstrip("/")


def _volume(text: str) -> dict[str, Any]:
    """-v SRC:DST[:OPTIONS], NAME:DST or DST alone."""
    parts = text.split(":")
    if len(parts) == 1 and text.startswith("/"):
        return {"type": "volume", "name": "", "target": _target(text, text), "options": [], "copy": True}
    if len(parts) not in (2, 3) or not parts[0]:
        raise UsageError(f"volume {quote(text)} is not SRC:DST[:ro]", hint="DST is an absolute path")
    target, options, copy = _target(parts[1], text), [], True
    for word in parts[2].split(",") if len(parts) == 3 else []:
        if word in ("ro", "rw", *_PROPAGATION):
            options.append(word)
        elif word == "nocopy":
            copy = False
        elif word not in ("z", "Z", ""):  # labels of SELinux, which does not run where they are not known
            raise UsageError(f"unknown volume option {quote(word)}")
    if "/" in parts[0] or parts[0] in (".", ".."):
        source = os.path.realpath(parts[0])
        os.makedirs(source, exist_ok=True) if not os.path.lexists(source) else None  # as docker does
        return {"type": "bind", "source": source, "target": target, "options": options}
    volumes.check_name(parts[0])
    return {"type": "volume", "name": parts[0], "target": target, "options": options, "copy": copy}


def _mount(text: str) -> dict[str, Any]:
    """--mount type=T,source=S,target=D,...; commas only separate, as there is no quoting here."""
    given: dict[str, str] = {}
    names = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        given[names.get(name, name)] = value if equals else "true"
    kind = given.pop("type", "volume")
    source, target = given.pop("source", ""), _target(given.pop("target", ""), text)
    if kind not in _KEYS:
        raise UsageError(f"unknown mount type {quote(kind)}", hint="bind, volume or tmpfs")
    if unknown := [name for name in given if name not in _KEYS[kind]]:
        raise UsageError(f"unknown option {quote(unknown[0])} of a {kind} mount")
    options = ["ro"] if given.get("readonly") in ("true", "1") else []
    if kind == "tmpfs":
        sizes = [f"size={cgroups.size(given['tmpfs-size'])}"] if "tmpfs-size" in given else []
        modes = [f"mode={_octal(given['tmpfs-mode'])}"] if "tmpfs-mode" in given else []
        return {"type": "tmpfs", "target": target, "options": [*options, *sizes, *modes]}
    if kind == "volume":
        volumes.check_name(source) if source else None
        copy = given.get("volume-nocopy") not in ("true", "1")
        return {"type": "volume", "name": source, "target": target, "options": options, "copy": copy}
    how = given.get("bind-recursive", "disabled" if given.get("bind-nonrecursive") in ("true", "1") else "enabled")
    if how not in _RECURSIVE or (how in ("writable", "readonly") and not options):
        raise UsageError(f"bind-recursive={how}", hint="enabled, disabled; with readonly also writable or readonly")
    options += _RECURSIVE[how]
    if "bind-propagation" in given:
        if given["bind-propagation"] not in _PROPAGATION:
            raise UsageError(f"unknown propagation {quote(given['bind-propagation'])}")
        options.append(given["bind-propagation"])
    if not source or not os.path.lexists(source):
        raise CafsError(f"cannot mount {quote(source)}: No such file or directory")
    return {"type": "bind", "source": os.path.realpath(source), "target": target, "options": options}


def _octal(text: str) -> str:
    if not text or len(text) > 5 or any(c not in "01234567" for c in text):
        raise UsageError(f"{quote(text)} is not a mode", hint="1777")
    return text


def _tmpfs(text: str) -> dict[str, Any]:
    """--tmpfs DST[:OPTIONS]."""
    target, _, words = text.partition(":")
    options = []
    for word in words.split(",") if words else []:
        name, _, value = word.partition("=")
        if word in _TMPFS:
            options.append(word)
        elif name == "size":
            options.append(f"size={value}" if value.endswith("%") and value[:-1].isdigit() else f"size={cgroups.size(value)}")
        elif name == "mode":
            options.append(f"mode={_octal(value)}")
        elif name in ("uid", "gid", "nr_inodes") and value.isdigit():
            options.append(word)
        else:
            raise UsageError(f"unknown tmpfs option {quote(word)}")
    return {"type": "tmpfs", "target": _target(target, text), "options": options}


def build(container: Container, rootfs: int, ids: Ids | None = None) -> list[dict[str, Any]]:
    """All OCI mounts; volumes that are new get what the image has there.  Raises CafsError.

    rootfs: O_PATH of a root that has it, with the image's ids.  ids: if it has its own, which a volume is seen with.
    """
    found = _given(container, rootfs, ids)
    taken = {one["destination"] for one in found}
    found = [one for one in _system(container) if one["destination"] not in taken] + found
    return _by_depth(found)


def attach(container: Container, rootfs: int) -> None:
    """Bind volumes and what is of the host into the root of a container that does not run, in our mount namespace.

    rootfs: as of `build`.  There is no tmpfs: what was in one is gone.  Raises CafsError, OSError.
    """
    check_sources(container)
    found = _given(container, rootfs)
    taken = {one["destination"] for one in found}
    found += [one for one in _etc(container.directory) if one["destination"] not in taken and os.path.exists(one["source"])]
    for one in _by_depth([one for one in found if one["type"] == "bind"]):
        stubs.make(container, rootfs, [one])
        target = linux.open_in_root(rootfs, one["destination"], os.O_PATH)
        try:
            linux.bind(one["source"], target, is_read_only="ro" in one["options"], is_deep="bind" not in one["options"])
        finally:
            os.close(target)


def _by_depth(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is mounted on comes before what is in it."""
    return sorted(found, key=lambda one: str(one["destination"]).count("/"))


def _given(container: Container, rootfs: int, ids: Ids | None = None) -> list[dict[str, Any]]:
    """What was asked for, as OCI mounts."""
    found = []
    for one in container.asked["mounts"]:
        if one["type"] == "tmpfs":
            found.append(_entry(one["target"], "tmpfs", *_tmpfs_options(one["options"])))
        elif one["type"] == "bind":
            found.append(bind(one["source"], one["target"], *one["options"]))
        else:
            try:
                source = volumes.ready(one["name"], rootfs, one["target"] if one["copy"] else "")
            except OSError as error:
                raise os_error(f"cannot use volume {quote(one['name'])}", error) from error
            found.append(bind(ids.mounted(source) if ids else source, one["target"], *one["options"]))
    return found


def _tmpfs_options(given: list[str]) -> list[str]:
    """Docker's defaults, where nothing else is said."""
    undo = {"noexec": "exec", "nosuid": "suid", "nodev": "dev"}
    return [word for word, other in undo.items() if other not in given and word not in given] + given


def _entry(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _system(container: Container) -> list[dict[str, Any]]:
    """Docker's mounts, and /etc/{hostname,hosts,resolv.conf} from the container's directory."""
    access = "rw" if container.has("privileged") else "ro"
    shm = cgroups.size(container.value("shm-size") or "64m")
    found = [
        _entry("/proc", "proc", "nosuid", "noexec", "nodev"),
        _entry("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _entry("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _entry("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]
    if container.value("network") == "host" and linux.in_user_namespace():  # sysfs is of who owns the network
        found.append(bind("/sys", "/sys", "nosuid", "noexec", "nodev", "ro"))
    else:
        found.append(_entry("/sys", "sysfs", "nosuid", "noexec", "nodev", access))
    if not linux.in_user_namespace() or cgroups.is_private(container):
        found.append(_entry("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", access))
    ipc = container.value("ipc") or "private"
    if ipc == "host":
        found.append(bind("/dev/shm", "/dev/shm"))
    elif not ipc.startswith("container:"):
        found.append(_entry("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", f"size={shm}"))
    return found + _etc(etc.directory(container))


def _etc(directory: str) -> list[dict[str, Any]]:
    return [bind(os.path.join(directory, name), f"/etc/{name}") for name in ("hostname", "hosts", "resolv.conf")]


def check_sources(container: Container) -> None:
    """A file that is bound has to be there still.  Raises CafsError."""
    for one in container.asked["mounts"]:
        if one["type"] == "bind" and not os.path.lexists(one["source"]):
            raise CafsError(f"cannot mount {quote(one['source'])}: No such file or directory")
