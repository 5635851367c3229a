"""Programs of the host: where they are, and what they say.  Loads nothing, as subprocess and shutil would."""

from __future__ import annotations

import os

_SAID_MAX = 1 << 20


def find(name: str, *more: str) -> str | None:
    """Path of a program: of PATH, then of MORE directories."""
    for directory in [*os.get_exec_path(), *more]:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK):
            return path
    return None


def call(words: list[str], text: str = "") -> tuple[int, str]:
    """Run a program to its end, with TEXT as its input; its exit code, and what it said."""
    given, said = os.memfd_create("input", os.MFD_CLOEXEC), os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        os.write(given, text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((given, 0), (said, 1), (said, 2))]
        child = os.posix_spawn(words[0], words, os.environ, file_actions=actions)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, os.pread(said, _SAID_MAX, 0).decode(errors="replace")
    finally:
        os.close(given)
        os.close(said)
