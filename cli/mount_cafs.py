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
_SUID = ("suid", "dev")
_PASSED_OVER = (
    "defaults", "ro", "rw", "users", "owner", "group", "_netdev", "silent", "loud", "sync", "nosuid", "nodev", "comment",
)  # fmt: skip
_SWITCHES = ("auto", "fail", "user", "exec", "async", "atime", "relatime", "diratime", "strictatime", "lazytime")
"""Passed over as they are, and with "no" before them."""

_WRONG_CALL, _MOUNT_FAILURE = 1, 32


class _WrongCall(Exception):
    pass


def main(arguments: list[str]) -> int:
    """One mount."""
    try:
        given, names = getopt.gnu_getopt(arguments, "sfnvo:t:N:")
        if len(names) != 2:
            raise _WrongCall(USAGE)
        flags = {flag for flag, _ in given}
        values, extra = _options(",".join(value for flag, value in given if flag == "-o"), is_sloppy="-s" in flags)
    except (_WrongCall, getopt.GetoptError, ValueError) as error:
        say(PROGRAM, str(error))
        return _WRONG_CALL
    if "-f" in flags:
        return 0
    code = guarded(PROGRAM, lambda: _mount(names[0], names[1], values, extra))
    return _MOUNT_FAILURE if code else 0


def _options(text: str, *, is_sloppy: bool) -> tuple[dict[str, str], set[str]]:
    """What cafs-mount is to be told, and suid and dev if they are given."""
    values: dict[str, str] = {}
    extra = set()
    for option in filter(None, text.split(",")):
        name, has_value, value = option.partition("=")
        if name in _VALUES and has_value:
            values[name] = value
        elif name in _SUID:
            extra.add(name)
        elif not (
            is_sloppy or name in _PASSED_OVER or name.removeprefix("no") in _SWITCHES or name.startswith(("x-", "comment"))
        ):
            raise _WrongCall(f"unknown option {name!r}")
    _check(values)
    return values, extra


def _check(values: dict[str, str]) -> None:
    """Raises _WrongCall."""
    from cafs.quota import parse_size

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


def _mount(image: str, directory: str, values: dict[str, str], extra: set[str]) -> int:
    from cafs import paths
    from cafs.mount import mount
    from cafs.quota import parse_size
    from cafs.request import FETCH_LIMIT_S, Request

    request = Request(
        image,
        directory,
        store=paths.chosen_store(values.get("store"), values.get("scope")),
        log=values.get("log"),
        extra={one if one in extra else f"no{one}" for one in _SUID},
        limit_s=float(values.get("timeout", FETCH_LIMIT_S)),
        engine=values.get("engine", "auto"),
        upper=values.get("upper"),
        record=values.get("record"),
        prefetch=values.get("prefetch", ""),
        rate=parse_size(values.get("bwlimit", "0")) or 0,
    )
    note = mount(request)
    for text in filter(None, [*request.warnings, note]):
        say(PROGRAM, text)
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))
