"""What is mounted in a container beside its root: -v, --mount, --tmpfs, the image's VOLUMEs, and the system's own.

Parsed when a container is made, so that paths mean what they meant then; turned into OCI mounts whenever it starts.
Mount options are a closed list: nothing of the user's is joined into one.
"""

from __future__ import annotations

import os
import stat

from cafs import linux, mountinfo, paths
from cafs.errors import CafsError, UnsupportedError, UsageError, os_error, quote
from runner import cgroups, containers, etc, stubs, volumes
from runner.filters import nearest
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
_CONSISTENCY = ("consistent", "cached", "delegated", "default")
"""For other systems than Linux; means nothing here, as in docker."""

_KEYS = {
    "bind": ("readonly", "consistency", "bind-propagation", "bind-nonrecursive", "bind-recursive"),
    "volume": ("readonly", "consistency", "volume-nocopy", "volume-label", "volume-driver"),
    "tmpfs": ("readonly", "consistency", "tmpfs-size", "tmpfs-mode"),
}
_TRUTH = {"true": "true", "1": "true", "false": "false", "0": "false"}
_SWITCHES = ("readonly", "bind-nonrecursive", "volume-nocopy")
_VALUES = {"consistency": _CONSISTENCY, "bind-propagation": _PROPAGATION, "volume-driver": ("local",)}
_GROUPS = {
    **dict.fromkeys(("ro", "rw"), "access"),
    **dict.fromkeys(_PROPAGATION, "propagation"),
    **dict.fromkeys(("z", "Z"), "label"),  # of SELinux, which does not run where they are not known
    **dict.fromkeys(_CONSISTENCY, "consistency"),
    "nocopy": "copy",
}
"""Options of -v: one of each kind."""


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
    target, given = _target(parts[1], text), _volume_options(parts[2].split(",") if len(parts) == 3 else [])
    options = [given[group] for group in ("access", "propagation") if group in given]
    if "/" in parts[0] or parts[0] in (".", ".."):
        source = os.path.realpath(parts[0])
        if "copy" in given:
            raise UsageError(f"volume {quote(text)}: nocopy is of named volumes")
        os.makedirs(source, exist_ok=True) if not os.path.lexists(source) else None  # as docker does
        return {"type": "bind", "source": source, "target": target, "options": options}
    volumes.check_name(parts[0])
    if "propagation" in given:
        raise UsageError(f"volume {quote(text)}: {given['propagation']} is of directories of the host")
    return {"type": "volume", "name": parts[0], "target": target, "options": options, "copy": "copy" not in given}


def _volume_options(words: list[str]) -> dict[str, str]:
    """By their kind.  Raises UsageError."""
    found: dict[str, str] = {}
    for word in words:
        if word not in _GROUPS:
            raise UsageError(f"unknown volume option {quote(word)}", hint=nearest(word, _GROUPS))
        if _GROUPS[word] in found:
            raise UsageError(f"volume options {found[_GROUPS[word]]} and {word} go not together")
        found[_GROUPS[word]] = word
    return found


def _mount(text: str) -> dict[str, Any]:
    """--mount type=T,source=S,target=D,...: a line of RFC 4180, so that a field with a comma can be quoted."""
    given, labels = _fields(text)
    kind = given.pop("type", "volume")
    source, target = given.pop("source", ""), _target(given.pop("target", ""), text)
    if kind not in _KEYS:
        raise UsageError(f"unknown mount type {quote(kind)}", hint="bind, volume or tmpfs")
    if unknown := [name for name in (*given, *(["volume-label"] if labels else [])) if name not in _KEYS[kind]]:
        raise UsageError(f"unknown option {quote(unknown[0])} of a {kind} mount", hint=nearest(unknown[0], _KEYS[kind]))
    for name, known in _VALUES.items():
        if given.get(name, known[0]) not in known:
            raise UsageError(f"unknown {name.rpartition('-')[2]} {quote(given[name])}", hint=nearest(given[name], known))
    options = ["ro"] if given.get("readonly") == "true" else []
    if kind == "tmpfs":
        sizes = [f"size={cgroups.size(given['tmpfs-size'])}"] if "tmpfs-size" in given else []
        modes = [f"mode={_octal(given['tmpfs-mode'])}"] if "tmpfs-mode" in given else []
        return {"type": "tmpfs", "target": target, "options": [*options, *sizes, *modes]}
    if kind == "volume":
        volumes.check_name(source) if source else None
        copy = given.get("volume-nocopy") != "true"
        return {"type": "volume", "name": source, "target": target, "options": options, "copy": copy, "labels": labels}
    how = given.get("bind-recursive", "disabled" if given.get("bind-nonrecursive") == "true" else "enabled")
    if how not in _RECURSIVE or (how in ("writable", "readonly") and not options):
        raise UsageError(f"bind-recursive={how}", hint="enabled, disabled; with readonly also writable or readonly")
    options += _RECURSIVE[how]
    options += [given["bind-propagation"]] if "bind-propagation" in given else []
    if not source or not os.path.lexists(source):
        raise CafsError(f"cannot mount {quote(source)}: No such file or directory")
    return {"type": "bind", "source": os.path.realpath(source), "target": target, "options": options}


def _fields(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Of --mount: all by their names, and what the labels say.  Raises UsageError."""
    import csv

    given: dict[str, str] = {}
    labels: dict[str, str] = {}
    names = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
    try:
        words = next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise UsageError(f"--mount {quote(text)}: {error}") from None
    for word in words:
        name, equals, value = word.partition("=")
        name = names.get(name.lower(), name.lower())
        if name in _SWITCHES:
            truth = _TRUTH.get(value.lower()) if equals else "true"
            if truth is None:
                raise UsageError(f"--mount: {name} is true or false, not {quote(value)}")
            value = truth
        elif not equals:
            raise UsageError(f"--mount: {quote(word)} is not K=V")
        if name == "volume-label":
            labels[value.partition("=")[0]] = value.partition("=")[2]
        elif name in given:
            raise UsageError(f"--mount: {name} is given twice")
        else:
            given[name] = value
    return given, labels


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


def shared(container: Container) -> dict[str, int]:
    """Of directories whose mounts the host is to see, and a descriptor of each; before our mount namespace is one of our own,
    in which all is only a slave of the host's.  Raises CafsError.
    """
    found = {}
    for one in container.asked["mounts"]:
        if one["type"] == "bind" and {"shared", "rshared"} & set(one["options"]):
            if linux.in_user_namespace():
                raise UnsupportedError("a shared mount needs root", hint="rslave")
            if not mountinfo.is_shared(one["source"]):
                hint = "mount --bind it to itself, then mount --make-rshared"
                raise CafsError(f"cannot share {quote(one['source'])}: it is not on a shared mount", hint=hint)
            found[one["source"]] = linux.clone_tree(one["source"])
    return found


def build(
    container: Container, rootfs: int, ids: Ids | None = None, trees: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """All OCI mounts; volumes that are new get what the image has there.  Raises CafsError.

    rootfs: O_PATH of a root that has it, with the image's ids.  ids: if it has its own, which a volume is seen with.
    trees: what `shared` returned; closed.
    """
    places = {source: _place(container) for source in trees or {}}
    for source, tree in (trees or {}).items():
        linux.move_tree(tree, places[source])
        os.close(tree)
    found = _given(container, rootfs, ids)
    for one in found:
        one["source"] = places.get(one["source"], one["source"])
    taken = {one["destination"] for one in found}
    found = [one for one in _system(container) if one["destination"] not in taken] + found
    return _by_depth(found)


def attach(container: Container, rootfs: int) -> None:
    """Bind volumes and what is of the host into the root of a container that does not run, in our mount namespace.

    rootfs: as of `build`.  There is no tmpfs: what was in one is gone.  Raises CafsError, OSError.
    """
    check_sources(container)
    found = _given(container, rootfs, with_tmpfs=False)
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


def _given(container: Container, rootfs: int, ids: Ids | None = None, *, with_tmpfs: bool = True) -> list[dict[str, Any]]:
    """What was asked for, as OCI mounts."""
    found = []
    for one in container.asked["mounts"]:
        if one["type"] == "tmpfs":
            found += [_own_tmpfs(container, one, rootfs, ids)] if with_tmpfs else []
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


def _own_tmpfs(container: Container, one: dict[str, Any], rootfs: int, ids: Ids | None) -> dict[str, Any]:
    """A tmpfs that we mount and the runtime binds: some runc give its own the mode of the directory below it, whatever is asked
    for (before 1.1.8), or 755 (1.3.3)."""
    flags, first = [word for word in _tmpfs_options(one["options"]) if "=" not in word], ids.first if ids else 0
    values = {"mode": _mode_below(container, rootfs, one["target"]), "uid": "0", "gid": "0"}
    values |= dict(word.split("=", 1) for word in one["options"] if "=" in word)
    values |= {name: str(int(values[name]) + first) for name in ("uid", "gid")}
    place = _place(container)
    try:
        linux.mount("tmpfs", place, "tmpfs", 0, ",".join(f"{name}={value}" for name, value in values.items()))
    except OSError as error:
        raise os_error(f"cannot mount a tmpfs for {quote(one['target'])}", error) from error
    return bind(place, one["target"], *flags)


def _mode_below(container: Container, rootfs: int, target: str) -> str:
    """That of the image's directory there; 1777 where it has none."""
    try:
        fd = linux.open_in_root(rootfs, target, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return "1777"
    try:
        return "1777" if target in stubs.noted(container) else f"{stat.S_IMODE(os.fstat(fd).st_mode):o}"
    finally:
        os.close(fd)


def _place(container: Container) -> str:
    """A directory of our mount namespace alone, to mount on; what is mounted there goes with `layers`."""
    layers = container.path("layers")
    if not os.path.ismount(layers):
        paths.make_private(layers)
        linux.mount("cafs-layers", layers, "tmpfs", 0, "mode=700,size=1m")
    place = os.path.join(layers, f"own{len(os.listdir(layers))}")
    os.mkdir(place, 0o700)
    return place


def _entry(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _system(container: Container) -> list[dict[str, Any]]:
    """Docker's mounts, and /etc/{hostname,hosts,resolv.conf} from the container's directory."""
    access = "rw" if container.has("privileged") else "ro"
    shm = cgroups.size(container.value("shm-size") or "0") or 64 << 20  # a size of 0 would be no limit at all
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
    kind, _, other = (container.value("ipc") or "private").partition(":")
    if kind == "host":
        found.append(bind("/dev/shm", "/dev/shm"))
    elif kind == "container":
        found.append(bind(_shm_of(container, other), "/dev/shm", "nosuid", "noexec", "nodev"))
    elif kind != "none":
        found.append(_entry("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", f"size={shm}"))
    return found + _etc(etc.directory(container))


def _shm_of(container: Container, other: str) -> str:
    """A place where another container's /dev/shm is mounted.  Raises CafsError."""
    one = containers.find(other)
    os.close(one.process())
    ours = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    theirs = os.open(f"/proc/{one.state()['pid']}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    place = _place(container)
    try:
        linux.setns(theirs, linux.CLONE_NEWNS)
        try:
            tree = linux.clone_tree("/dev/shm")
        finally:
            linux.setns(ours, linux.CLONE_NEWNS)
            os.fchdir(here)
        linux.move_tree(tree, place)
        os.close(tree)
    except OSError as error:
        raise os_error(f"--ipc container:{other}: it has no /dev/shm", error) from error
    finally:
        for fd in (ours, theirs, here):
            os.close(fd)
    return place


def _etc(directory: str) -> list[dict[str, Any]]:
    return [bind(os.path.join(directory, name), f"/etc/{name}") for name in ("hostname", "hosts", "resolv.conf")]


def check_sources(container: Container) -> None:
    """A file that is bound has to be there still.  Raises CafsError."""
    for one in container.asked["mounts"]:
        if one["type"] == "bind" and not os.path.lexists(one["source"]):
            raise CafsError(f"cannot mount {quote(one['source'])}: No such file or directory")
