"""cafs-mount: mount an image, list mounts, unmount.  man page: cafs-mount(1).  It loads no click: a mount is fast."""

from __future__ import annotations

import sys

from cafs.options import SWITCH, VALUE, Options, parse, usage
from cli._app import ENGINES, is_terminal, leave, say, write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.options import Flags
    from cafs.request import Request

PROGRAM = "cafs-mount"
_TIMEOUT_S = 60.0
_OPTIONS = "Options"
_GO_WITH_ALONE = {"list", "reload", "unmount", "json", "verbose", "quiet"}
FLAGS: Flags = {
    "engine": (VALUE, "", "|".join(ENGINES), _OPTIONS, "How to mount (default: auto)."),
    "rw": (VALUE, "", "UPPERDIR", _OPTIONS, "Let it be written to; changes go to UPPERDIR/upper."),
    "record": (VALUE, "", "FILE", _OPTIONS, "Write what is read to FILE, for cafs-index profile."),
    "prefetch": (VALUE, "", "PROFILE|all|none", _OPTIONS, "Bring this profile (default: 'default')."),
    "bwlimit": (VALUE, "", "RATE", _OPTIONS, "Bytes a second for --prefetch all, like 20M."),
    "foreground": (SWITCH, "", "", _OPTIONS, "Stay until unmounted; log to stderr."),
    "log": (VALUE, "", "FILE", _OPTIONS, "Log to FILE instead of syslog."),
    "timeout": (VALUE, "", "S", _OPTIONS, "Seconds for a fetch, then EIO (60); 0.1 to 3600."),
    "suid": (SWITCH, "", "", _OPTIONS, "As root: honour set-user-id bits and devices."),
    "unmount": (VALUE, "u", "DIR", _OPTIONS, "Unmount DIR."),
    "list": (SWITCH, "l", "", _OPTIONS, "List what is mounted."),
    "reload": (SWITCH, "", "", _OPTIONS, "Let the program that is installed now take over all mounts."),
    "json": (SWITCH, "", "", _OPTIONS, "Print JSON lines."),
    "store": (VALUE, "", "URL", _OPTIONS, "Store to use (default: $CAFS_STORE, else the user's own)."),
    "scope": (VALUE, "", "SECRETFILE", _OPTIONS, "Only the part of the store that belongs to this secret."),
    "verbose": (SWITCH, "v", "", _OPTIONS, "Say which engine is used, and why."),
    "quiet": (SWITCH, "q", "", _OPTIONS, "Print nothing but the result and errors."),
    "version": (SWITCH, "V", "", _OPTIONS, "Show the version and exit."),
    "help": (SWITCH, "h", "", _OPTIONS, "Show this message and exit."),
}
HELP = """Usage: cafs-mount [OPTIONS] [IMAGE] DIR

Mount IMAGE read-only on DIR; files are fetched when they are read.

  cafs-mount demo:1 /mnt/x
  cafs-mount --list
  cafs-mount --unmount /mnt/x

{options}

Exit status: 0 done, 1 failed, 2 usage, 4 no such thing, 5 corrupt, 6 busy,
8 missing privilege or program.  Full manual: man cafs-mount
"""


def main(arguments: list[str]) -> int:
    """Do what the options say; returns the exit code.  Raises CafsError."""
    from cafs.errors import UsageError

    options = parse(arguments, FLAGS, {}, program=PROGRAM)
    if options.has("help"):
        sys.stdout.write(HELP.format(options=usage(FLAGS)))
        return 0
    if options.has("version"):
        from cafs import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    options.settle_empty()
    if options.has("json") and not options.has("list"):
        raise UsageError("--json goes with --list")
    alone = [options.has("list"), options.has("reload"), options.value("unmount") is not None]
    if any(alone):
        if options.words or sum(alone) > 1 or options.flags.keys() - _GO_WITH_ALONE:
            raise UsageError("--list, --reload and --unmount go alone", hint=f"{PROGRAM} --help")
        _manage(options)
        return 0
    if len(options.words) != 2:
        raise UsageError("IMAGE and DIR are needed, and nothing else", hint=f"{PROGRAM} --help")
    _mount(options, _request(options))
    return 0


def _manage(options: Options) -> None:
    from cafs import mount as mounting

    point = options.value("unmount")
    if point is not None:
        mounting.unmount(point)
    elif options.has("reload"):
        mounting.reload()
    else:
        _list(as_json=options.has("json"))


def _request(options: Options) -> Request:
    from cafs import paths
    from cafs.errors import UsageError, quote
    from cafs.request import Request

    engine = options.value("engine") or "auto"
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {quote(engine)}", hint=", ".join(ENGINES))
    image, directory = options.words
    return Request(
        image,
        directory,
        store=paths.chosen_store(options.value("store"), options.value("scope")),
        log=options.value("log"),
        extra={"suid", "dev"} if options.has("suid") else set(),
        limit_s=_seconds(options.value("timeout")),
        foreground=options.has("foreground"),
        engine=engine,
        upper=options.value("rw"),
        record=options.value("record"),
        prefetch=options.value("prefetch") or "",
        rate=_rate(options.value("bwlimit")),
    )


def _seconds(text: str | None) -> float:
    from cafs.errors import UsageError, quote

    try:
        seconds = _TIMEOUT_S if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise UsageError(f"--timeout is 0.1 to 3600 seconds, not {quote(text or '')}")
    return seconds


def _rate(text: str | None) -> int:
    from cafs.errors import UsageError, quote

    if text is None:
        return 0
    from cafs.quota import parse_size

    found = parse_size(text)
    if found is None:
        raise UsageError(f"--bwlimit {quote(text)} is no size, like 20M")
    return found


def _mount(options: Options, request: Request) -> None:
    from cafs import mount as mounting

    note = mounting.mount(request)
    for warning in request.warnings:
        say(PROGRAM, f"warning: {warning}")
    if request.why and options.has("verbose"):
        say(PROGRAM, request.why)
    if note and not options.has("quiet") and is_terminal():
        say(PROGRAM, note)


def _list(*, as_json: bool) -> None:
    from cafs.mount import listing

    for row in listing():
        if as_json:
            write_json(row)
        else:
            line = f"{row['mountpoint']}\t{row['image'] or '-'}\t{row['digest']}\t{row['engine']}\t{row['pid'] or '-'}\n"
            sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape"))


def entry() -> None:
    """The console script."""
    leave(PROGRAM, lambda: main(sys.argv[1:]))
