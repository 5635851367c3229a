"""Whether a secret is in the files that a step has left: a layer is for everybody who has the image."""

from __future__ import annotations

import mmap
import os
import stat

from cafs.errors import CafsError, quote

_LEAST = 8
"""A shorter secret would be found by chance."""


class LeakError(CafsError):
    """name: id of the secret."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(f"secret {quote(name)} is in {quote(path)}, which would become part of the image")
        self.name = name


def check(upper: str, secrets: dict[str, bytes]) -> None:
    """Look through an upper directory, by descriptors.  Raises LeakError."""
    wanted = {name: value.strip() for name, value in secrets.items() if len(value.strip()) >= _LEAST}
    if not wanted:
        return
    for top, directories, names, fd in os.fwalk(upper, follow_symlinks=False):
        for name in [*directories, *names]:
            found = _in_name(fd, name, wanted) or _in_file(fd, name, wanted)
            if found is not None:
                raise LeakError(found, os.path.join("/", os.path.relpath(os.path.join(top, name), upper)))


def _in_name(directory: int, name: str, wanted: dict[str, bytes]) -> str | None:
    """In the name itself, where a link leads, an attribute."""
    texts = [os.fsencode(name)]
    path = f"/proc/self/fd/{directory}/{name}"
    try:
        texts += [
            os.getxattr(path, attribute, follow_symlinks=False) for attribute in os.listxattr(path, follow_symlinks=False)
        ]
        texts.append(os.fsencode(os.readlink(name, dir_fd=directory)))
    except OSError:
        pass  # no link, or no attributes
    return next((secret for secret, value in wanted.items() if any(value in text for text in texts)), None)


def _in_file(directory: int, name: str, wanted: dict[str, bytes]) -> str | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None  # a link, a socket
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return None
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
            return next((secret for secret, value in wanted.items() if data.find(value) >= 0), None)
    finally:
        os.close(fd)
