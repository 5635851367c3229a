"""Files that are whole or not there: temporary file, fsync, link or rename, fsync of the directory.

Every system call goes through ``os`` by name, so that tests can fail or kill at each one.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager

from cafs import stopping
from cafs.errors import os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from typing_extensions import Buffer


_IOV_MAX = 1024  # UIO_MAXIOV, writev(2)


def write_all(fd: int, data: Buffer) -> None:
    """Write every byte; write(2) may write less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_all_at(fd: int, data: Buffer, offset: int) -> None:
    """`write_all` at a place in the file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def write_all_parts(fd: int, parts: list[bytes]) -> None:
    """`write_all` of several pieces, without joining them."""
    for at in range(0, len(parts), _IOV_MAX):
        some = parts[at : at + _IOV_MAX]
        size = sum(map(len, some))
        written = os.writev(fd, some)
        if written != size:
            write_all(fd, memoryview(b"".join(some))[written:])


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    _with_directory(path, os.fsync)


def sync_file_system(path: str) -> None:
    """Make durable all that was written to the file system of a directory (syncfs(2))."""
    from cafs import linux

    _with_directory(path, linux.syncfs)


def _with_directory(path: str, call: Callable[[int], object]) -> None:
    """Call CALL with a descriptor of the directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        call(fd)
    finally:
        os.close(fd)


def overwrite(path: str, data: bytes) -> None:
    """Write a small text that is there anew in its place, where no other can take it.

    Whoever reads meanwhile finds what it was, or what it is now, perhaps with empty lines behind it.  Raises OSError.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        padded = data.ljust(os.fstat(fd).st_size, b"\n")
        if os.pwrite(fd, padded, 0) != len(padded):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def make_directory(path: str, mode: int = 0o755, *, is_exact: bool = False) -> None:
    """Create a directory and its parents, durably; one that is there already is left as it is.  Raises OSError.

    is_exact: their mode does not depend on the umask.
    """
    try:
        try:
            os.mkdir(path, mode)
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if parent in ("", path):
                raise
            make_directory(parent, mode, is_exact=is_exact)
            os.mkdir(path, mode)  # where nothing can be made, as in /proc, that is all
    except FileExistsError:
        return
    if is_exact:
        os.chmod(path, mode)
    fsync_directory(os.path.dirname(path) or ".")


def temporary_name(directory: str) -> str:
    """A name that nobody else uses: it carries the process id and 64 random bits."""
    return os.path.join(directory, f"tmp.{os.getpid()}.{os.urandom(8).hex()}")


def open_temporary(directory: str, mode: int = 0o644) -> tuple[int, str]:
    """A new file open for writing, and its path.  The caller links or unlinks it, and closes it.  Raises Ended."""
    stopping.check()
    path = temporary_name(directory)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)  # whatever the umask is
    except BaseException:
        os.close(fd)
        unlink_quietly(path)
        raise
    return fd, path


@contextmanager
def locked(directory: str) -> Iterator[int]:
    """Hold a directory's lock (flock(2), exclusive).  Yields a descriptor of it.  Raises OSError."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def unlink_quietly(path: str) -> None:
    """Remove a file if it can be removed; used while another error is on its way."""
    try:
        os.unlink(path)
    except OSError:
        pass


def publish(temporary: str, path: str, *, replace: bool = False) -> bool:
    """Give a finished, fsynced file its name, or, unless REPLACE, leave what has the name; the temporary name goes.

    Returns whether this call made the name.  Over NFS a link whose reply was lost is tried again by the client and then
    says EEXIST; that st_nlink is 2 tells that it was ours (open(2), O_EXCL).
    """
    try:
        os.link(temporary, path)
        made = True
    except FileExistsError:
        made = os.stat(temporary).st_nlink == 2
    if made or not replace:
        os.unlink(temporary)
    else:
        os.rename(temporary, path)
    fsync_directory(os.path.dirname(path))
    return made


def _write_temporary(directory: str, data: Buffer, mode: int) -> str:
    fd, temporary = open_temporary(directory, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        unlink_quietly(temporary)
        raise
    return temporary


def create_file(path: str, data: Buffer, mode: int = 0o444) -> bool:
    """Make PATH with DATA unless it is there; whether it was made.  The content must be implied by the name."""
    temporary = _write_temporary(os.path.dirname(path), data, mode)
    try:
        return publish(temporary, path)
    except BaseException:
        unlink_quietly(temporary)
        raise


def replace_file(path: str, data: Buffer, mode: int = 0o644) -> None:
    """Make PATH hold DATA: a reader sees the old content or the new, never a part."""
    temporary = _write_temporary(os.path.dirname(path), data, mode)
    try:
        os.rename(temporary, path)
    except BaseException:
        unlink_quietly(temporary)
        raise
    fsync_directory(os.path.dirname(path))


def replace_hint(path: str, data: Buffer, mode: int = 0o600) -> None:
    """As `replace_file`, but not durable: for what is checked before it is used, and can be made anew."""
    fd, temporary = open_temporary(os.path.dirname(path), mode)
    try:
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        unlink_quietly(temporary)
        raise


@contextmanager
def replacing(path: str, mode: int = 0o644, *, is_durable: bool = True) -> Iterator[BinaryIO]:
    """A file to be written that takes the place of PATH when the block ends without an error."""
    fd, temporary = open_temporary(os.path.dirname(path), mode)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            if is_durable:
                os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        unlink_quietly(temporary)
        raise
    if is_durable:
        fsync_directory(os.path.dirname(path))


@contextmanager
def output(path: str) -> Iterator[BinaryIO]:
    """What a user named for output: a file that appears whole or not at all, with the umask's mode; '-' is stdout, and what is
    no regular file is written in place.  Raises CafsError."""
    if path == "-":
        yield sys.stdout.buffer
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as out:
                yield out
            return
        umask = os.umask(0)
        os.umask(umask)
        with replacing(os.path.abspath(path), 0o666 & ~umask) as out:
            yield out
    except OSError as error:
        raise os_error(f"cannot write {quote(path)}", error) from error


def read_file(path: str, limit: int) -> bytes:
    """All bytes of a regular file.  Raises OSError; a file over LIMIT bytes, or not regular, is an OSError too."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not status.st_mode & 0o100000 or status.st_mode & 0o60000:
            raise OSError(22, "not a regular file")
        if status.st_size > limit:
            raise OSError(27, f"larger than {limit} bytes")
        return read_exactly(fd, status.st_size, 0)
    finally:
        os.close(fd)


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """SIZE bytes at OFFSET; fewer only where the file ends."""
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
