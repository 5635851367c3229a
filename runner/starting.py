"""Starting a container: lower mount, overlay in a mount namespace of its own, config.json, runc.

Whoever calls `start` is the child subreaper: process 1 of the container is our child once runc has gone.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

from cafs import atomic, linux, mountinfo, paths, upperdir
from cafs.errors import CafsError, UnsupportedError, quote
from runner import containers, etc, lower, mounts, programs, spec, stubs, users
from runner.containers import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.idmapping import Ids
    from runner.stdio import Given

_KNOWN = ("PATH", "HOME", "XDG_RUNTIME_DIR")
"""What runc may know of our caller.  With NOTIFY_SOCKET it would wait for a command that never says that it is ready."""

_INIT = "/dev/.init"
_INITS = ("tini-static", "catatonit", "docker-init", "tini")  # the last may need a C library that the image lacks


class Refused(CafsError):
    """The command cannot be started: 127 if it is not there, else 126."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def code_of(error: BaseException) -> int:
    """The exit code of a container that could not be started."""
    return error.exit_code if isinstance(error, Refused) else 125


def find_runc() -> str:
    """Path of runc.  Never looks for 'crun', which is also our own name.  Raises UnsupportedError."""
    found = programs.find("runc")
    if found is None:
        raise UnsupportedError("no runc", hint="apt install runc")
    return found


def runc(*words: str, log: str = "") -> list[str]:
    """The command line for it.  log: a file for what `explain` reads."""
    return [find_runc(), "--root", runtime_root(), *(["--log", log, "--log-format", "json"] if log else []), *words]


def runtime_root() -> str:
    """runc's --root: ours alone."""
    return os.path.join(paths.run(), "runc")


def lower_key(container: Container) -> str:
    """What names the mount of its image."""
    asked = container.asked
    return lower.key_of(bytes.fromhex(asked["digest"]), asked["store"], container.id, container.value("record"))


def get_lower(container: Container) -> lower.Lower:
    """Mount its image, or find it mounted.  Raises CafsError."""
    asked, record = container.asked, container.value("record")
    trusts, by_kernel = bool(asked.get("trusts_cache")), container.value("userns") == "auto"
    digest = bytes.fromhex(asked["digest"])
    return lower.find(digest, asked["store"], lower_key(container), record, trusts_cache=trusts, by_kernel=by_kernel)


def prepare(container: Container, low: lower.Lower) -> int:
    """Mount its root, and write its bundle, in another mount namespace from now on; returns the host's uid of its command."""
    linux.become_subreaper()
    paths.make_private(runtime_root())
    ids = None
    if container.value("userns") == "auto":
        from runner import idmapping

        ids = idmapping.begin(container, low)
    image = os.open(low.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    trees = mounts.shared(container)
    mount_root(container, low, ids)
    rootfs = os.open(container.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _write_bundle(container, rootfs, image, ids, trees)
    finally:
        os.close(rootfs)
        os.close(image)


def mount_root(container: Container, low: lower.Lower, ids: Ids | None = None) -> None:
    """In a mount namespace of our own, so that the overlay goes with the last process in it.  ids: if it has its own."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "none", linux.MS_REC | linux.MS_SLAVE)
    up, work = container.path("upper"), container.path("work")
    target = container.rootfs if ids else container.path("rootfs")
    if not container.state().get("started_ns"):
        upperdir.copy_attributes(low.path, up)
    try:
        if settings := low.settings():
            settings += [("upperdir", up), ("workdir", work)]
            if container.asked.get("is_volatile"):
                settings.append(("volatile", ""))
            settings = ids.mount_layers(settings, container.directory) if ids else settings
            with ids.owning() if ids else nullcontext():
                linux.mount_overlay("overlay", target, settings)
        else:
            _overlay_on(low.path, up, work, target)
    except OSError as error:
        raise UnsupportedError(f"cannot mount the writable layer: {error.strerror}", hint="modprobe overlay") from error
    # The overlay has its own hold on what is below it; our copies of those mounts would keep their servers alive until we end.
    wanted = tuple(one["source"] + "/" for one in container.asked["mounts"] if one["type"] == "bind")
    points = {low.path, *(os.fsdecode(one.point) for one in mountinfo.mounts() if one.point.startswith(_live_mounts()))}
    for point in points:
        if any(source.startswith(point + "/") for source in wanted):
            continue
        linux.umount(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def _live_mounts() -> bytes:
    return os.fsencode(paths.run()) + b"/"


def _overlay_on(low: str, up: str, work: str, target: str) -> None:
    """Over one mounted directory, by descriptor: ':', ',' and '\\' in a path would be read as option syntax."""
    fds = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (low, up, work)]
    try:
        names = ("lowerdir", "upperdir", "workdir")
        options = ",".join(f"{name}=/proc/self/fd/{fd}" for name, fd in zip(names, fds, strict=True))
        options += ",userxattr" * linux.in_user_namespace()
        linux.mount("overlay", target, "overlay", 0, options)
    finally:
        for fd in fds:
            os.close(fd)


def _write_bundle(container: Container, rootfs: int, image: int, ids: Ids | None, trees: dict[str, int]) -> int:
    """Write config.json and the files of /etc; returns the host's uid of the command."""
    asked = container.asked
    users.refuse_links(rootfs)
    user = users.resolve(rootfs, asked["user"], container.all("group-add"))
    defaults = {"HOSTNAME": etc.hostname_of(container), "HOME": user.home} | ({"TERM": "xterm"} if container.has("tty") else {})
    variables, arguments = defaults | asked["env"], list(asked["arguments"])
    mounts.check_sources(container)
    everything = mounts.build(container, image if ids else rootfs, ids, trees)
    if not asked["mounts"]:  # a volume may bring the program
        check_program(rootfs, arguments[0], variables, asked["cwd"], "image")
    if container.has("init"):
        everything.append(spec.bind(_find_init(), _INIT, "ro"))
        arguments = [_INIT, "--", *arguments]
    joined, devices = _joined(container), []
    if ids:
        joined["user"] = ids.path
    if container.is_on_bridge:
        from runner import connecting

        joined["network"] = connecting.connect(container, ids.namespace if ids else -1)
    if container.all("device") or container.value("gpus") or container.has("privileged"):
        from runner import devices as finding

        found = finding.find(container)
        devices, everything = found.nodes, everything + found.mounts
        variables |= found.env
        user.groups += [gid for gid in found.groups if gid not in user.groups]
    etc.write(container, ids.first if ids else 0)
    with ids.owning() if ids else nullcontext():
        stubs.make(container, rootfs, everything)
    if container.is_on_bridge:
        from runner import connecting

        connecting.tell_neighbours(container.network, but=container.id)
    if ids or linux.in_user_namespace():
        spec.keep_locked_flags(everything)
    document = spec.build(
        container,
        arguments=arguments,
        variables=variables,
        user=user,
        mounts=everything,
        devices=devices,
        joined=joined,
        first_id=ids.first if ids else 0,
    )
    config = os.path.join(_bundle(container), "config.json")
    atomic.replace_hint(config, json.dumps(document).encode("utf-8", "surrogateescape"), 0o600)
    return user.uid + (ids.first if ids else 0)


def _bundle(container: Container) -> str:
    """Where the runtime finds config.json: in memory, if something in it is not to be on a disk."""
    return str(container.asked.get("bundle") or container.directory)


def check_program(root: int, name: str, variables: dict[str, str], cwd: str, where: str) -> None:
    """Raises Refused if it cannot be started.  root: O_PATH of a root directory; where: what that is of, for the message."""
    reason = users.find_program(root, name, variables.get("PATH", ""), cwd)
    if reason == "ENOENT":
        raise Refused(f"cannot run {quote(name)}: not found in the {where}", 127)
    if reason:
        raise Refused(f"cannot run {quote(name)}: it is not an executable file", 126)


def _find_init() -> str:
    for name in _INITS:
        if found := programs.find(name):
            return os.path.realpath(found)
    raise UnsupportedError("--init: no tini or catatonit on this host", hint="apt install tini")


def _joined(container: Container) -> dict[str, str]:
    """Paths of the namespaces of other containers.  Raises CafsError."""
    found = {}
    for flag, name in (("network", "net"), ("pid", "pid"), ("ipc", "ipc"), ("uts", "uts")):
        kind, _, other = (container.value(flag) or "").partition(":")
        if kind == "container":
            state = containers.find(other).state()
            fd = containers.open_process(state)
            if fd is None:
                raise CafsError(f"--{flag} container:{other}: it does not run")
            os.close(fd)
            found["network" if name == "net" else name] = f"/proc/{state['pid']}/ns/{name}"
    return found


def start(container: Container, streams: Given | None, console: int = -1) -> int:
    """Run runc until process 1 runs; returns its pid.  console: directory with its socket, -1: none.  Raises CafsError."""
    directory = container.directory
    arguments = runc(
        "run", "--detach", "--bundle", _bundle(container), "--pid-file", f"{directory}/pid", log=f"{directory}/runc.log"
    )
    atomic.unlink_quietly(f"{directory}/runc.log")
    if console >= 0:
        arguments += ["--console-socket", f"/proc/self/fd/{console}/console"]
    child = streams.child if streams else []
    status = spawn([*arguments, container.id], child, [console] if console >= 0 else [])
    if streams:
        streams.started()
    if status:
        raise _start_error(container)
    with open(f"{directory}/pid", encoding="ascii") as file:
        return int(file.read())


def spawn(arguments: list[str], streams: list[int], inherit: list[int]) -> int:
    """Run runc to its end; returns its exit code.  It dies with us, so that who tidies up finds a quiet place."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        linux.die_with_parent()
        high = [os.dup(fd) for fd in streams]
        for to, fd in enumerate(high):
            os.dup2(fd, to, inheritable=True)
        if not streams:
            null = os.open(os.devnull, os.O_RDWR)
            for to in (0, 1, 2):
                os.dup2(null, to, inheritable=True)
        for fd in inherit:
            os.set_inheritable(fd, True)
        os.execve(arguments[0], arguments, {name: os.environ[name] for name in _KNOWN if name in os.environ})
    finally:
        os._exit(125)


def _start_error(container: Container) -> CafsError:
    return explain(container.path("runc.log"), "unable to start container process: ", "cannot start the container")


def explain(log: str, prefix: str, what: str) -> CafsError:
    """What runc logged, as our error: 127 or 126 where it is about the command, else 125."""
    message = "runc failed"
    try:
        for line in atomic.read_file(log, 1 << 20).splitlines():
            message = str(json.loads(line).get("msg", message))
    except (OSError, ValueError, AttributeError):
        pass
    short = message.rpartition(prefix)[2]
    if "exec" in short and ("not found" in short or "no such file" in short):
        return Refused(f"cannot run the command: {short}", 127)
    if "exec" in short and ("permission denied" in short or "exec format error" in short):
        return Refused(f"cannot run the command: {short}", 126)
    return CafsError(f"{what}: {short}")
