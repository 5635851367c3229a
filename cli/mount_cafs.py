"""mount.cafs: how mount(8), and so fstab(5), calls cafs-mount: mount.cafs IMAGE DIR [-sfnv] [-o OPTION,...].

man page: cafs-mount(1), FSTAB.  Exit codes are those of mount(8): 1 a wrong call, 32 the mount failed.
"""

from __future__ import annotations

import getopt
import sys

from cli._app import ENGINES, guarded, say

PROGRAM = "mount.cafs"
USAGE = "usage: mount.cafs IMAGE DIR [-sfnv] [-o OPTION,...]"
_VALUES = ("engine", "store", "scope", "upper", "record", "prefetch", "bwlimit", "log", "timeout")
_FOR_OTHERS = ("auto", "noauto", "fail", "nofail", "nouser", "_netdev", "silent", "loud", "comment")
"""Said to mount(8) and to systemd."""

_DEFAULT = ("relatime", "norelatime", "nostrictatime", "nolazytime", "async")
_WRITTEN = ("sync", "lazytime")
"""How changes are written: nothing to a mount that has none, and not what overlayfs can do."""

_MEANS = {"defaults": ("rw", "exec")} | dict.fromkeys(("user", "users", "owner", "group"), ("noexec", "nosuid", "nodev"))

_WRONG_CALL, _MOUNT_FAILURE = 1, 32


class _WrongCall(Exception):
    pass


def main(arguments: list[str]) -> int:
    """One mount."""
    try:
        given, names = getopt.gnu_getopt(arguments, "sfnvo:t:")
        if len(names) != 2:
            raise _WrongCall(USAGE)
        if strange := [value for flag, value in given if flag == "-t" and value not in ("cafs", "fuse.cafs")]:
            raise _WrongCall(f"type {strange[0]!r} is not cafs")
        flags = {flag for flag, _ in given}
        values, words = _options(",".join(value for flag, value in given if flag == "-o"), is_sloppy="-s" in flags)
    except (_WrongCall, getopt.GetoptError, ValueError) as error:
        say(PROGRAM, str(error))
        return _WRONG_CALL
    if "-f" in flags:
        return 0
    code = guarded(PROGRAM, lambda: _mount(names[0], names[1], values, words, is_verbose="-v" in flags))
    return _MOUNT_FAILURE if code else 0


def _options(text: str, *, is_sloppy: bool) -> tuple[dict[str, str], set[str]]:
    """What cafs-mount is to be told, and what the mount may be used for; of two that contradict each other the last counts."""
    values: dict[str, str] = {}
    words: set[str] = set()
    for option in filter(None, text.split(",")):
        name, has_value, value = option.partition("=")
        if name in _VALUES and has_value:
            values[name] = value
        elif not (_note(name, words) or is_sloppy or name in _FOR_OTHERS or name.startswith(("x-", "X-"))):
            raise _WrongCall(f"unknown option {name!r}")
    _check(values, words)
    return values, words


def _note(name: str, words: set[str]) -> bool:
    """Add a word of mount(8), and remove what says the opposite.  False if it is not known."""
    from cafs.linux import MOUNT_FLAGS

    for word in _MEANS.get(name, (name,)):
        opposite = {"ro": "rw", "rw": "ro"}.get(word) or (word.removeprefix("no") if word.startswith("no") else f"no{word}")
        if not {word, opposite} & MOUNT_FLAGS.keys() and word not in _DEFAULT + _WRITTEN:
            return False
        words.discard(opposite)
        words.add(word)
    return True


def _check(values: dict[str, str], words: set[str]) -> None:
    """Raises _WrongCall."""
    from cafs.quota import parse_size

    if empty := [name for name, value in values.items() if not value]:
        raise _WrongCall(f"{empty[0]}= is empty")
    if "upper" in values and (wrong := words.intersection(_WRITTEN)):
        raise _WrongCall(f"{wrong.pop()!r} is not possible with upper=")
    if values.get("engine", "auto") not in ENGINES:
        raise _WrongCall(f"unknown engine {values['engine']!r}: it is one of {', '.join(ENGINES)}")
    if parse_size(values.get("bwlimit", "0")) is None:
        raise _WrongCall(f"{values['bwlimit']!r} is no size, like 20M")
    try:
        is_right = 0.1 <= float(values.get("timeout", "60")) <= 3600
    except ValueError:
        is_right = False
    if not is_right:
        raise _WrongCall(f"timeout {values['timeout']!r} is not from 0.1 to 3600 seconds")


def _mount(image: str, directory: str, values: dict[str, str], words: set[str], *, is_verbose: bool) -> int:
    from cafs import paths
    from cafs.linux import MOUNT_FLAGS
    from cafs.mount import mount
    from cafs.quota import parse_size
    from cafs.request import FETCH_LIMIT_S, Request

    request = Request(
        image,
        directory,
        store=paths.chosen_store(values.get("store"), values.get("scope")),
        log=values.get("log"),
        extra=words & {*MOUNT_FLAGS, "suid", "dev"},
        limit_s=float(values.get("timeout", FETCH_LIMIT_S)),
        engine=values.get("engine", "auto"),
        upper=values.get("upper"),
        record=values.get("record"),
        prefetch=values.get("prefetch", ""),
        rate=parse_size(values.get("bwlimit", "0")) or 0,
    )
    note = mount(request)
    read_only = "mounted read-only: rw needs upper=DIR" if "rw" in words and not request.upper else ""
    for text in filter(None, [*request.warnings, note, read_only, request.why if is_verbose else ""]):
        say(PROGRAM, text)
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))
