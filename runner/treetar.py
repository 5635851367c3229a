"""Trees as tar archives, by descriptors: neither links nor names lead out of the directory that is given."""

from __future__ import annotations

import os
import stat
import tarfile

from cafs import acl, atomic, linux
from cafs.errors import CafsError, FormatError, quote
from runner.treecopy import CAPABILITY, FLAGS, PIECE, clear, set_attribute, shifted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO


_TYPES = {stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}
_PAX_CAPABILITY = "SCHILY.xattr.security.capability"


def add_to_tar(
    tar: tarfile.TarFile,
    directory: int,
    name: str,
    arcname: str,
    first: int = 0,
    names: dict[tuple[int, int], str] | None = None,
) -> None:
    """NAME and all below it but sockets, by descriptors.  first: the id that is 0 in the archive.  names: of what is in it."""
    names = {} if names is None else names
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    member = tarfile.TarInfo(arcname)
    member.mode, member.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
    if not stat.S_ISLNK(status.st_mode):
        member.mode = acl.mode_without(member.mode, _access_list(f"/proc/self/fd/{directory}/{name}"))
    member.uid, member.gid = shifted(status.st_uid, -first), shifted(status.st_gid, -first)
    if stat.S_ISDIR(status.st_mode):
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=directory)
        try:
            for child in sorted(os.listdir(fd)):
                add_to_tar(tar, fd, child, f"{arcname}/{child}", first, names)
        finally:
            os.close(fd)
    elif status.st_nlink > 1 and names.setdefault((status.st_dev, status.st_ino), arcname) != arcname:
        member.type, member.linkname = tarfile.LNKTYPE, names[status.st_dev, status.st_ino]
        tar.addfile(member)
    elif stat.S_ISREG(status.st_mode):
        with open(os.open(name, os.O_RDONLY | FLAGS, dir_fd=directory), "rb") as file:
            member.size = os.fstat(file.fileno()).st_size
            if CAPABILITY in os.listxattr(file.fileno()):
                value = os.getxattr(file.fileno(), CAPABILITY)
                member.pax_headers = {_PAX_CAPABILITY: value.decode("utf-8", "surrogateescape")}
            tar.addfile(member, file)
    elif stat.S_ISLNK(status.st_mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=directory)
        tar.addfile(member)
    elif kind := _TYPES.get(stat.S_IFMT(status.st_mode)):
        member.type, member.devmajor, member.devminor = kind, os.major(status.st_rdev), os.minor(status.st_rdev)
        tar.addfile(member)


def _access_list(path: str) -> list[tuple[bytes, bytes]]:
    """The access control list of a file, which the archive does not keep."""
    try:
        return [(acl.ACCESS, os.getxattr(path, acl.ACCESS, follow_symlinks=False))]
    except OSError:
        return []


class Lost:
    """What an ordinary user cannot extract: names of files without their capabilities, and of devices."""

    def __init__(self) -> None:
        self.weakened: list[str] = []
        self.left_out: list[str] = []


def extract_tar(stream: IO[bytes], top: int, first: int = 0) -> Lost:
    """Below the directory TOP; '..' and links never lead out of it.  first: the id that is 0 there.

    Raises CafsError, FormatError.
    """
    lost = Lost()
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                _extract(tar, member, top, first, lost)
    except tarfile.TarError as error:
        raise FormatError(f"the archive is not a tar: {error}") from None
    return lost


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, top: int, first: int, lost: Lost) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise CafsError(f"the archive has the name {quote(member.name)}")
    if not parts:
        return
    try:
        parent = _make_parents(top, parts[:-1])
    except OSError as error:
        raise CafsError(f"cannot extract {quote(member.name)}: {error.strerror}") from error
    name = parts[-1]
    owner = shifted(member.uid, first), shifted(member.gid, first)
    try:
        if member.isdir():
            try:
                os.mkdir(name, 0o755, dir_fd=parent)
            except FileExistsError:
                pass
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=parent)
        elif member.isreg():
            clear(parent, name)
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, dir_fd=parent)
            content = tar.extractfile(member)
            while content and (data := content.read(PIECE)):
                atomic.write_all(fd, data)
        elif member.issym():
            clear(parent, name)
            os.symlink(member.linkname, name, dir_fd=parent)
            os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
            return
        elif member.islnk():
            _link(top, member.linkname, parent, name)
            return
        else:
            kind = next((one for one, letter in _TYPES.items() if letter == member.type), 0)
            if not kind:
                raise CafsError(f"the archive has {quote(member.name)}, which is of no kind that is known")
            clear(parent, name)
            try:
                os.mknod(name, kind | member.mode & 0o7777, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
            except PermissionError:  # an ordinary user makes no devices
                lost.left_out.append(member.name)
                return
            os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
            os.chmod(name, member.mode & 0o7777, dir_fd=parent)
            return
        os.fchown(fd, *owner)
        os.fchmod(fd, member.mode & 0o7777)
        value = member.pax_headers.get(_PAX_CAPABILITY)
        if value and not set_attribute(fd, CAPABILITY, value.encode("utf-8", "surrogateescape")):
            lost.weakened.append(member.name)
        os.utime(fd, (member.mtime, member.mtime))
        os.close(fd)
    except OSError as error:
        raise CafsError(f"cannot extract {quote(member.name)}: {error.strerror}") from error
    finally:
        os.close(parent)


def _make_parents(top: int, parts: list[str]) -> int:
    """The directory of a member, made where it is missing; links lead wherever they do below TOP."""
    fd = os.dup(top)
    for number, part in enumerate(parts, 1):
        try:
            inner = linux.open_in_root(top, "/".join(parts[:number]), os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


def _link(top: int, target: str, parent: int, name: str) -> None:
    """A hard link to what the archive has before; the target is looked up below TOP."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise CafsError(f"the archive links to {quote(target)}")
    source = linux.open_in_root(top, "/".join(parts[:-1]) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        clear(parent, name)
        os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(source)
