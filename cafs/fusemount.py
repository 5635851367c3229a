"""Mounting what is served through /dev/fuse: by mount(2) as root, by fusermount3(1) for everybody else."""

from __future__ import annotations

import os

from cafs import linux, mountinfo
from cafs.errors import CafsError, UnsupportedError, os_error, quote

READAHEAD = 1 << 20
"""Bytes that the kernel may ask for at once, ahead of who reads."""

_COMMFD = "_FUSE_COMMFD"
"""fusermount3(1) sends the descriptor through the socket whose number this variable holds."""


def mount(point: str, fstype: str, source: str, flags: int, options: str = "") -> int:
    """Mount on POINT; returns the descriptor of /dev/fuse to serve it by.  Raises CafsError.

    fstype: fuse.NAME.  flags: MS_… of mount(2).  options: more of the file system's own.
    """
    if os.geteuid():
        return _mount_as_user(point, fstype, source, flags)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "modprobe fuse; apt install fuse3"
        raise UnsupportedError(f"cannot open '/dev/fuse': {error.strerror}", hint=hint) from error
    given = f"fd={fd},rootmode=40755,user_id=0,group_id=0,default_permissions{options and ','}{options}"
    try:
        linux.mount(source, point, fstype, flags, given)
        linux.mount("", point, "", linux.MS_PRIVATE)
    except OSError as error:
        os.close(fd)
        raise os_error(f"cannot mount on {quote(point)}", error) from error
    _read_far_ahead(point)
    return fd


def _read_far_ahead(point: str) -> None:
    """Let the kernel ask for as much at once as the server allows, not 128 KiB, where a file is read in order (sysfs, bdi)."""
    here = mountinfo.at(point)
    try:
        with open(f"/sys/class/bdi/{here.device if here else ''}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(READAHEAD >> 10))
    except OSError:
        pass  # it costs speed


def _mount_as_user(point: str, fstype: str, source: str, flags: int) -> int:
    """nosuid and nodev are fusermount3's own."""
    import array
    import socket
    import subprocess

    words = ",".join(word for word, flag in linux.MOUNT_FLAGS.items() if flags & flag)
    options = f"{words},default_permissions,fsname={source},subtype={fstype.removeprefix('fuse.')}"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = ["fusermount3", "-o", options, "--", point]
        environment = os.environ | {_COMMFD: str(theirs.fileno())}
        try:
            done = subprocess.run(
                command, env=environment, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True, check=False
            )
        except OSError as error:
            raise UnsupportedError("cannot mount without root: no fusermount3", hint="apt install fuse3") from error
        if done.returncode:
            raise CafsError(f"cannot mount on {quote(point)}: {done.stderr.strip()}")
        theirs.close()
        fds = array.array("i")
        _, extra, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if len(fds) != 1:
            raise CafsError(f"cannot mount on {quote(point)}: fusermount3 sent no descriptor")
        os.set_inheritable(fds[0], False)
        return fds[0]
