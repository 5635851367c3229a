"""One foreground container from start to end: lower mount, guard, overlay, runc, exit code, cleanup.

The guard is forked before anything is set up.  It holds the read end of a pipe; when that closes without a word, crun has
died, and the guard kills the container and cleans up in its place.
"""

from __future__ import annotations

import json
import os
import signal

from cafs import atomic, image, linux, mountinfo, paths
from cafs.errors import CafsError, UnsupportedError, UsageError, os_error, quote
from cafs.store import Store
from runner import cleanup, lower, names, spec, stdio, users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from runner.options import Options

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_DELETE_TRIES = 20
_DYING_S = 2


class Refused(CafsError):
    """The command cannot be started: 127 if it is not there, else 126."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def _overlay_on(low: str, up: str, work: str, target: str) -> None:
    """Over one mounted directory, by descriptor: ':', ',' and '\\' in a path would be read as option syntax."""
    fds = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (low, up, work)]
    try:
        names = ("lowerdir", "upperdir", "workdir")
        options = ",".join(f"{name}=/proc/self/fd/{fd}" for name, fd in zip(names, fds, strict=True))
        linux.mount("overlay", target, "overlay", 0, options)
    finally:
        for fd in fds:
            os.close(fd)


def _copy_attributes(source: str, target: str) -> None:
    """The container's root is the upper directory: give it what the image's root has."""
    status = os.stat(source)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source):
        os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def find_runc() -> str:
    """Path of runc.  Never looks for 'crun', which is also our own name.  Raises UnsupportedError."""
    for directory in os.get_exec_path():
        path = os.path.join(directory, "runc")
        if os.access(path, os.X_OK):
            return path
    raise UnsupportedError("no runc", hint="apt install runc")


def run(options: Options) -> int:
    """Run a command in an image; returns its exit code.  Raises CafsError before it started."""
    if os.geteuid():
        raise UnsupportedError("crun needs root in this version", hint="run it with sudo")
    if options.value("network") not in (None, "none", "host"):
        raise UsageError(f"unknown network {quote(options.value('network') or '')}", hint="none or host")
    runc = find_runc()
    root = paths.located(options.value("store") or paths.store(), options.value("scope"))
    store = Store(root)
    found = image.resolve(store, options.image)
    container = Container(runc, options, found.config)
    container.take(found.digest, root)
    try:
        return container.run()
    finally:
        container.clean()


class Container:
    """The state of one run.  id: 64 hex digits, or the given name."""

    def __init__(self, runc: str, options: Options, config: dict[str, Any]) -> None:
        self.runc = runc
        self.options = options
        self.config = spec.section(config, "config") if "config" in config else config
        self.id = os.urandom(32).hex()
        self.name = options.value("name")
        self.directory = os.path.join(paths.state(), "containers", self.id)
        self.runtime_root = os.path.join(paths.run(), "runc")
        self.lower: lower.Lower | None = None
        self._guard = self._guard_pipe = -1
        self._ended = False

    def take(self, digest: bytes, store_root: str) -> None:
        """Get what must be given back: the guard first, who gives it back if we cannot, then directories, name, lower mount."""
        try:
            os.makedirs(self.runtime_root, mode=0o700, exist_ok=True)
            containers = os.path.dirname(self.directory)
            os.makedirs(containers, mode=0o700, exist_ok=True)
            if mountinfo.fstype(containers) == "overlay":
                raise UnsupportedError(
                    f"{quote(paths.state())} is on overlayfs, which cannot hold a writable layer",
                    hint="set CAFS_STATE to a directory on another file system",
                )
            self._start_guard(digest)
        except OSError as error:
            raise os_error(f"cannot make a container in {quote(self.directory)}", error) from error
        try:
            if self.name is not None:
                names.take(self.name, self.id)
            os.makedirs(os.path.join(self.directory, "rootfs"), mode=0o700)
            for name in ("upper", "work"):
                os.mkdir(os.path.join(self.directory, name), 0o755)
            record = self.options.value("record")
            self.lower = lower.find(digest, store_root, self._lower_key(digest), record)
        except BaseException as error:
            self.clean()
            if isinstance(error, OSError):
                raise os_error(f"cannot make a container in {quote(self.directory)}", error) from error
            raise

    def _lower_key(self, digest: bytes) -> str:
        return lower.key_of(digest, self.id, self.options.value("record"))

    def run(self) -> int:
        """Mount, start, wait."""
        linux.become_subreaper()
        self._mount_overlay()
        rootfs = os.open(os.path.join(self.directory, "rootfs"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            uid = self._write_bundle(rootfs)
        finally:
            os.close(rootfs)
        return self._start(uid)

    def clean(self) -> None:
        """Give everything back; safe after any failure.  The shared mount is the guard's: it is in the host's namespace."""
        self._delete()
        self._unmount()
        cleanup.remove_directory(self.directory)
        if self.name is not None:
            names.drop(self.name, self.id)
        if self.lower:
            self.lower.let_go()
        os.write(self._guard_pipe, b"d")
        os.close(self._guard_pipe)
        os.waitpid(self._guard, 0)

    # --- steps ---------------------------------------------------------------------------------------------------

    def _start_guard(self, digest: bytes) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        names.mark_alive(self.id)
        self._guard = os.fork()
        if self._guard:
            os.close(reader)
            self._guard_pipe = writer
            return
        os.close(writer)
        try:
            os.setsid()
            for number in _FORWARDED:
                signal.signal(number, signal.SIG_IGN)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            self._guard_until_end(reader, digest)
        finally:
            os._exit(0)

    def _guard_until_end(self, pipe: int, digest: bytes) -> None:
        """In the guard.  Each step is done whatever becomes of the one before."""
        is_done = bool(os.read(pipe, 1))
        if not is_done:
            _quietly(self._delete)
            _quietly(cleanup.remove_directory, self.directory)
            if self.name is not None:
                _quietly(names.drop, self.name, self.id)
        # A killed crun may not have given up its own hold yet: its pipe is closed before the last of its files is.
        _quietly(lower.release, self._lower_key(digest), 0 if is_done else _DYING_S)
        _quietly(names.forget, self.id)

    def _mount_overlay(self) -> None:
        """In a mount namespace of our own, so that the overlay goes with the last process in it."""
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", "none", linux.MS_REC | linux.MS_SLAVE)
        assert self.lower
        _copy_attributes(self.lower.path, os.path.join(self.directory, "upper"))
        target, up, work = (os.path.join(self.directory, name) for name in ("rootfs", "upper", "work"))
        try:
            if settings := self.lower.settings():
                linux.mount_overlay("overlay", target, [*settings, ("upperdir", up), ("workdir", work)])
            else:
                _overlay_on(self.lower.path, up, work, target)
        except OSError as error:
            raise UnsupportedError(f"cannot mount the writable layer: {error.strerror}", hint="modprobe overlay") from error
        # The overlay has its own hold on the lower mount; our copy of it would keep the server alive until we end.
        linux.umount(self.lower.path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def _write_bundle(self, rootfs: int) -> int:
        """Write config.json and the files of /etc; returns the uid of the command."""
        options, config = self.options, self.config
        users.refuse_links(rootfs)
        wanted = options.value("user")
        user = users.resolve(rootfs, wanted if wanted is not None else spec.text(config, "User"))
        cwd = options.value("workdir") or spec.text(config, "WorkingDir") or "/"
        if not cwd.startswith("/") or os.path.normpath(cwd).lstrip("/").split("/")[0] == "proc":
            raise UsageError(f"working directory {quote(cwd)} is not an absolute path outside /proc")
        variables = spec.environment(options, config)
        arguments = spec.command_line(options, config)
        volumes = [spec.volume(text) for text in options.all("volume")]
        if not volumes:  # a volume may bring the program
            self._check_program(rootfs, arguments[0], variables.get("PATH", ""), cwd)
        hostname = options.value("hostname") or self._default_hostname()
        self._write_etc(hostname)
        document = spec.build(
            container=self.id, arguments=arguments, variables=variables, cwd=cwd, user=user, hostname=hostname,
            options=options, files=self.directory, volumes=volumes,
        )  # fmt: skip
        fd = os.open(os.path.join(self.directory, "config.json"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            atomic.write_all(fd, json.dumps(document).encode("utf-8", "surrogateescape"))
        finally:
            os.close(fd)
        return user.uid

    def _default_hostname(self) -> str:
        return os.uname().nodename if self.options.value("network") == "host" else self.id[:12]

    def _check_program(self, rootfs: int, name: str, path: str, cwd: str) -> None:
        reason = users.find_program(rootfs, name, path, cwd)
        if reason == "ENOENT":
            raise Refused(f"cannot run {quote(name)}: not found in the image", 127)
        if reason:
            raise Refused(f"cannot run {quote(name)}: it is not an executable file", 126)

    def _write_etc(self, hostname: str) -> None:
        resolv = b""
        if self.options.value("network") == "host":
            try:
                resolv = atomic.read_file("/etc/resolv.conf", 1 << 16)
            except OSError:
                pass
        hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n".encode()
        for name, data in (("hostname", hostname.encode() + b"\n"), ("hosts", hosts), ("resolv.conf", resolv)):
            fd = os.open(os.path.join(self.directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                atomic.write_all(fd, data)
            finally:
                os.close(fd)

    def _start(self, uid: int) -> int:
        forward = _Forwarder()
        terminal = self.options.has("tty")
        interactive = self.options.has("interactive")
        console = stdio.Console(self.directory) if terminal else None
        streams = None if terminal else stdio.Streams(interactive, uid)
        arguments = [self.runc, "--root", self.runtime_root, "--log", f"{self.directory}/runc.log", "--log-format", "json"]
        arguments += ["run", "--detach", "--bundle", self.directory, "--pid-file", f"{self.directory}/pid"]
        inherit = []
        if console:
            arguments += ["--console-socket", f"/proc/self/fd/{console.directory}/console"]
            inherit.append(console.directory)
        status = self._spawn([*arguments, self.id], streams.child if streams else [], inherit)
        if streams:
            streams.started()
        if status:
            raise self._start_error()
        with open(os.path.join(self.directory, "pid"), encoding="ascii") as file:
            pid = int(file.read())
        forward.to(pid)
        if console:
            master = console.receive()
            stdio.run_terminal(master, interactive)
            os.close(master)
        _, status = os.waitpid(pid, 0)
        self._ended = True
        forward.stop()
        if streams:
            try:
                streams.drain()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise os_error("cannot write what the command printed", error) from error
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code

    def _spawn(self, arguments: list[str], streams: list[int], inherit: list[int]) -> int:
        """Run runc to its end; returns its exit code.  It dies with us, so that the guard finds a quiet place."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            linux._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            high = [os.dup(fd) for fd in streams]
            for to, fd in enumerate(high):
                os.dup2(fd, to, inheritable=True)
            if not streams:
                null = os.open(os.devnull, os.O_RDWR)
                for to in (0, 1, 2):
                    os.dup2(null, to, inheritable=True)
            for fd in inherit:
                os.set_inheritable(fd, True)
            os.execv(arguments[0], arguments)
        finally:
            os._exit(125)

    def _start_error(self) -> CafsError:
        """What runc logged, as our error: 127 or 126 where it is about the command, else 125."""
        message = "runc failed"
        try:
            for line in atomic.read_file(os.path.join(self.directory, "runc.log"), 1 << 20).splitlines():
                message = str(json.loads(line).get("msg", message))
        except (OSError, ValueError, AttributeError):
            pass
        short = message.rpartition("runc create failed: ")[2]
        if "exec" in short and ("not found" in short or "no such file" in short):
            return Refused(f"cannot run the command: {short}", 127)
        if "exec" in short and ("permission denied" in short or "exec format error" in short):
            return Refused(f"cannot run the command: {short}", 126)
        return CafsError(f"cannot start the container: {short}")

    # --- giving back ---------------------------------------------------------------------------------------------

    def _delete(self) -> None:
        """Kill what is left of the container and remove its cgroups and runtime state."""
        state = os.path.join(self.runtime_root, self.id)
        for _ in range(_DELETE_TRIES):
            if not os.path.exists(state):
                cleanup.kill_cgroup(self.id)  # somebody removed the state of a running container
                return
            if self._ended and cleanup.remove_state(state):
                return
            self._spawn([self.runc, "--root", self.runtime_root, "delete", "--force", self.id], [], [])

    def _unmount(self) -> None:
        try:
            linux.umount(os.path.join(self.directory, "rootfs"), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError:
            pass  # never mounted, or in another namespace that is gone


def _quietly(step: Callable[..., object], *arguments: object) -> None:
    try:
        step(*arguments)
    except Exception:  # nobody is left to tell, and the next step matters as much
        return


class _Forwarder:
    """Passes our signals on to the command; those that come before it runs wait for it."""

    def __init__(self) -> None:
        self._pid = 0
        self._waiting: list[int] = []
        for number in _FORWARDED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._pid:
            self._waiting.append(number)
            return
        try:
            os.kill(self._pid, number)
        except ProcessLookupError:
            pass

    def to(self, pid: int) -> None:
        """From now on to this process."""
        self._pid = pid
        for number in self._waiting:
            self._on_signal(number, None)

    def stop(self) -> None:
        """The command has ended, and its pid may soon be another's."""
        for number in _FORWARDED:
            signal.signal(number, signal.SIG_IGN)
