"""System calls that Python's os module lacks, by ctypes.  Numbers are the same on x86-64 and arm64 where one is given."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18, 1 << 19
MOUNT_FLAGS = {
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": 8, "nosymfollow": 1 << 8,
    "noatime": 1 << 10, "nodiratime": 1 << 11, "strictatime": 1 << 24,
}  # fmt: skip
"""Options of mount(8) that any mount can have, and their MS_… of mount(2)."""

_ATTRIBUTES = {1 << 8: 0x200000, 1 << 10: 0x10, 1 << 11: 0x80, 1 << 24: 0x20}
"""MOUNT_ATTR_… of fsmount(2) for those MS_… that differ."""

MNT_FORCE, MNT_DETACH = 1, 2
UMOUNT_NOFOLLOW = 8
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_NAME = 15
_PR_GET_SECUREBITS, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP = 27, 28, 4
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_SYS_OPENAT2 = 437
_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_FSPICK = 429, 430, 431, 432, 433
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
_FSPICK_CLOEXEC, _FSPICK_SYMLINK_NOFOLLOW = 1, 2
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    data = os.fsencode(options) if options else None
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def mount_overlay(source: str, target: str, settings: list[tuple[str, str]], flags: int = 0) -> None:
    """Mount overlayfs.

    settings: (key, value) in order, '' for a key alone; a value is taken as it stands, so no character in it means anything,
    and (Linux 6.8) there is no limit of a page.  flags: MS_….  Raises OSError, with the kernel's own words where
    it has some.
    """
    try:
        attributes = sum(_ATTRIBUTES.get(1 << bit, 1 << bit) for bit in range(32) if flags & 1 << bit)
        _mount_overlay_by_keys(source, target, settings, attributes)
    except OSError as error:
        if (error.errno, error.filename) != (errno.EINVAL, "lowerdir+"):
            raise
        mount(source, target, "overlay", flags, _overlay_options(settings))  # before Linux 6.8


def _mount_overlay_by_keys(source: str, target: str, settings: list[tuple[str, str]], attributes: int) -> None:
    """By fsopen(2), fsconfig(2), fsmount(2) and move_mount(2).  attributes: MOUNT_ATTR_…"""
    fs = _check(_libc.syscall(_SYS_FSOPEN, b"overlay", 1), "fsopen")
    mount_fd = -1
    try:
        for key, value in [("source", source), *settings]:
            _configure(fs, _FSCONFIG_SET_STRING if value else _FSCONFIG_SET_FLAG, key, value or None)
        _configure(fs, _FSCONFIG_CMD_CREATE, None, None)
        mount_fd = _check(_libc.syscall(_SYS_FSMOUNT, fs, 1, attributes), "fsmount")
        _check(_libc.syscall(_SYS_MOVE_MOUNT, mount_fd, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)
    finally:
        os.close(fs)
        if mount_fd >= 0:
            os.close(mount_fd)


def _overlay_options(settings: list[tuple[str, str]]) -> str:
    """The same for mount(2): lowerdir=A:B::DATA1::DATA2, with what means something in it behind a backslash."""
    spelled = [(key, re.sub(r"([\\:,])", r"\\\1", value)) for key, value in settings]
    lowers = ":".join(value for key, value in spelled if key == "lowerdir+")
    lowers += "".join(f"::{value}" for key, value in spelled if key == "datadir+")
    return ",".join([f"lowerdir={lowers}", *(f"{k}={v}" if v else k for k, v in spelled if k not in ("lowerdir+", "datadir+"))])


def mount_idmapped(source: str, target: str, namespace: int) -> None:
    """Bind a directory to another with ids mapped as in a user namespace (mount_setattr(2), MOUNT_ATTR_IDMAP; Linux 5.12).

    An id that is there N is seen as what N of the namespace is outside of it.  Raises OSError, EINVAL of a file system that
    cannot have that.
    """
    clone, idmap = 1, 0x100000
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, -100, os.fsencode(source), clone | os.O_CLOEXEC), source)
    try:
        _set_attributes(tree, idmap, namespace=namespace)
        _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)
    finally:
        os.close(tree)


def bind(source: str, target: int, *, is_read_only: bool, is_deep: bool = True) -> None:
    """Bind a file or directory, with all that is mounted below it (unless not IS_DEEP), over what TARGET is open on.

    Nothing is propagated.

    open_tree(2), mount_setattr(2), move_mount(2); Linux 5.12.  Raises OSError.
    """
    clone, recursive, target_is_fd = 1, 0x8000 * is_deep, 0x40
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, -100, os.fsencode(source), clone | os.O_CLOEXEC | recursive), source)
    try:
        _set_attributes(tree, MS_RDONLY * is_read_only, propagation=MS_PRIVATE, flags=recursive)
        how = _MOVE_MOUNT_F_EMPTY_PATH | target_is_fd
        _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", target, b"", how), source)
    finally:
        os.close(tree)


def clone_tree(source: str) -> int:
    """A descriptor of a copy of a directory's mounts, in no namespace yet (open_tree(2)).  Raises OSError."""
    clone, recursive = 1, 0x8000
    return _check(_libc.syscall(_SYS_OPEN_TREE, -100, os.fsencode(source), clone | os.O_CLOEXEC | recursive), source)


def move_tree(tree: int, target: str) -> None:
    """Mount such a copy (move_mount(2)).  Raises OSError."""
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)


def make_read_only(fd: int) -> None:
    """The mount of a descriptor, and none below it.  Raises OSError."""
    _set_attributes(fd, MS_RDONLY)  # the same bit as MOUNT_ATTR_RDONLY


def _set_attributes(fd: int, attributes: int, *, propagation: int = 0, namespace: int = 0, flags: int = 0) -> None:
    """mount_setattr(2): struct mount_attr is set, clear, propagation, userns_fd."""
    empty_path = 0x1000
    found = (ctypes.c_uint64 * 4)(attributes, 0, propagation, namespace)
    size = ctypes.sizeof(found)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, fd, b"", empty_path | flags, ctypes.byref(found), size), "mount_setattr")


@contextmanager
def owning_as(number: int) -> Iterator[None]:
    """What this thread makes meanwhile is of user and group NUMBER (setfsuid(2)); it may still do what it may."""
    before = _check(_libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0), "prctl")
    # Else capabilities over files would go with the id.  It must not last: what we start would keep its own over setuid(2).
    _check(_libc.prctl(_PR_SET_SECUREBITS, before | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "prctl")
    try:
        _libc.setfsgid(number)
        _libc.setfsuid(number)
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        _check(_libc.prctl(_PR_SET_SECUREBITS, before, 0, 0, 0), "prctl")


def reconfigure(path: str, *, is_read_only: bool) -> None:
    """Remount the file system at PATH with nothing changed, by fspick(2): it lets go of all that nobody uses just now."""
    fs = _check(_libc.syscall(_SYS_FSPICK, -100, os.fsencode(path), _FSPICK_CLOEXEC | _FSPICK_SYMLINK_NOFOLLOW), path)
    try:
        if is_read_only:
            _configure(fs, _FSCONFIG_SET_FLAG, "ro", None)
        _configure(fs, _FSCONFIG_CMD_RECONFIGURE, None, None)
    finally:
        os.close(fs)


def _configure(fs: int, command: int, key: str | None, value: str | None) -> None:
    arguments = (None if one is None else os.fsencode(one) for one in (key, value))
    if _libc.syscall(_SYS_FSCONFIG, fs, command, *arguments, 0) < 0:
        number = ctypes.get_errno()
        said = []
        while True:
            try:
                said.append(os.read(fs, 4096).decode(errors="replace").strip()[2:])
            except OSError:
                break
        raise OSError(number, "; ".join(said) or os.strerror(number), key)


def close_on_exec() -> None:
    """close_range(2): whatever our caller had open is not for the programs that we become or start."""
    close_range_cloexec = 4
    if _libc.syscall(436, 3, ctypes.c_uint(0xFFFF_FFFF), close_range_cloexec) < 0:
        for name in os.listdir("/proc/self/fd"):
            try:
                if int(name) > 2:
                    os.set_inheritable(int(name), False)
            except OSError:
                continue  # the listing's own


def tee(source: int, target: int, size: int) -> int:
    """tee(2), without waiting: copy from one pipe to another what stays in it; how many bytes.  Raises BlockingIOError."""
    non_block = 2
    return _check(_libc.tee(source, target, ctypes.c_size_t(size), non_block), "tee")


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    _check(_libc.syncfs(fd), "syncfs")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, flags), "setns")


def mount_id(fd: int) -> int:
    """The number of the mount in which a file was opened (proc(5), fdinfo)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def in_user_namespace() -> bool:
    """Whether root here is not the host's (user_namespaces(7))."""
    with open("/proc/self/uid_map", "rb") as file:
        return file.read().split() != [b"0", b"0", b"4294967295"]


def mapped_ids(kind: str) -> int:
    """How many ids, from 0 on, are there in our user namespace.  kind: 'user' or 'group'."""
    with open(f"/proc/self/{kind[0]}id_map", "rb") as file:
        rows = sorted(tuple(map(int, line.split())) for line in file)
    end = 0
    for first, _, count in rows:
        if first > end:
            break
        end = max(end, first + count)
    return end


def leave_session() -> None:
    """Nothing of our caller's session is ours any more: setsid(2), no directory of its own, /dev/null as standard streams."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def die_with_parent() -> None:
    """prctl(2), PR_SET_PDEATHSIG: we get SIGKILL when the thread that forked us ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def set_name(name: str) -> None:
    """prctl(2), PR_SET_NAME: how this process is called in /proc/PID/comm; 15 bytes."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0), "prctl")


def set_command_line(text: str) -> None:
    """Replace what ps(1) shows of this process and its future children, as far as it fits (proc_pid_stat(5), arg_start).

    A process that outlives the command that started it must not keep that command's arguments: they may be secret.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if 0 < start < end:
        data = os.fsencode(text)[: end - start - 1].ljust(end - start, b"\0")
        ctypes.memmove(start, data, len(data))


def exit_code(status: int) -> int:
    """Of what waitpid(2) says, as a shell has it: 128 and the number of the signal if one ended it."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def be_seen() -> None:
    """prctl(2), PR_SET_DUMPABLE: what changes credentials is hidden from its own user's other processes, in /proc, else."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")


def become_subreaper() -> None:
    """prctl(2), PR_SET_CHILD_SUBREAPER: orphaned descendants become our children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """openat2(2) with RESOLVE_IN_ROOT: links and '..' in PATH stay below ROOT_FD, as after chroot."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return _check(_libc.syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)), path)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a copy, not inherited, of another process's descriptor."""
    return _check(_libc.syscall(438, pidfd, fd, 0), "pidfd_getfd")


def lock_byte(fd: int, kind: int, at: int, *, wait: bool = False) -> None:
    """Lock one byte of a file for the open file description (F_OFD_SETLK, fcntl(2)): it goes when all copies of FD are closed.

    kind: fcntl.F_RDLCK, F_WRLCK or F_UNLCK.  Raises BlockingIOError if it is taken and not to be waited for.
    """
    import fcntl
    import struct

    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)


def set_up_heap() -> None:
    """mallopt(3): few arenas for many threads, which keep what a chunk of a large file takes: fresh pages for each cost more
    than all else that is done with it."""
    m_arena_max, m_mmap_threshold, m_trim_threshold = -8, -3, -1
    for parameter, value in ((m_arena_max, 2), (m_mmap_threshold, 8 << 20), (m_trim_threshold, 16 << 20)):
        _libc.mallopt(parameter, value)


def trim_heap() -> None:
    """malloc_trim(3): give back what the heap keeps."""
    _libc.malloc_trim(0)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may (RLIMIT_NOFILE, getrlimit(2))."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
