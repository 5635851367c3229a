"""crun: run commands in images, and look after the containers.  man page: crun(1).  `run` and `exec` load no click."""

from __future__ import annotations

import gc
import os
import sys

gc.disable()  # until the container runs: of a start that takes 80 ms, looking for garbage takes 4

from cli._app import DEBUG, leave  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.errors import CafsError
    from cafs.options import Options

PROGRAM = "crun"
OLDEST_RUNC = ((1, 3, 6), (1, 4, 3))
"""Without CVE-2025-31133, -52565, -52881 and CVE-2026-41579; of a later series every version is."""

_INSTEAD = {
    "build": "cbuild",
    "images": "cafs-store ls",
    "load": "cafs-index create docker-archive:FILE",
    "ls": "crun ps",
    "pull": "cafs-index create docker://REF -t REF",
    "push": "cafs-store push",
    "rmi": "cafs-store rm",
    "save": "cafs-index export",
    "tag": "cafs-store tag",
    "version": "crun --version",
}
"""What does the work of commands of docker's that crun has not."""

USAGE = """Usage: crun COMMAND [FLAG]... [ARGUMENT]...

Run commands in images, in containers, and look after them.

  crun run --rm demo:1 python3 -c 'print("hello")'
  tar c . | crun run -i --rm demo:1 sha256sum
  crun run -d --name web demo:1 serve ; crun logs -f web ; crun stop web

Commands:
{rows}

crun COMMAND --help tells more.  Exit status of run and exec: the command's own;
125 crun failed, 126 the command cannot be executed, 127 it was not found.
Full manual: man crun
"""


def _usage() -> str:
    from cafs.options import row
    from runner.flags import GROUPS, VERBS

    texts = {verb: text for verb, (_, text, _) in VERBS.items() if " " not in verb} | GROUPS
    return USAGE.format(rows="\n".join(row(f"  {verb}", text, 12) for verb, text in texts.items()))


def _group_usage(group: str) -> str:
    from cafs.options import row
    from runner.flags import GROUPS, VERBS

    verbs = {verb.partition(" ")[2]: text for verb, (_, text, _) in VERBS.items() if verb.startswith(f"{group} ")}
    rows = "\n".join(row(f"  {verb}", text, 12) for verb, text in verbs.items())
    return f"Usage: crun {group} COMMAND\n\n{GROUPS[group]}\n\nCommands:\n{rows}\n\nFull manual: man crun\n"


def _instead_of(verb: str) -> str:
    """What does what docker's command does; else the nearest of ours.  A hint."""
    import difflib

    from runner.flags import GROUPS, VERBS

    if verb in _INSTEAD:
        return f"{_INSTEAD[verb]} does that"
    group = verb.partition(" ")[0]
    names = [one for one in (*VERBS, *GROUPS) if group not in GROUPS or one.startswith(f"{group} ")]
    near = difflib.get_close_matches(verb, names, 1, 0.65)
    return f"did you mean {near[0]}?" if near else f"crun {group} --help" if group in GROUPS else "crun --help"


def _help(verb: str) -> str:
    from cafs.options import usage
    from runner.flags import VERBS

    words, text, flags = VERBS[verb]
    rows = f"\n{usage(flags)}\n" if flags else ""
    return f"Usage: crun {verb} {words}\n\n{text}\n{rows}\nFull manual: man crun\n"


def _version() -> str:
    """Ours and runc's; a warning if runc's is known to let containers out."""
    import re
    import subprocess

    from cafs import __version__
    from cafs.errors import UnsupportedError
    from runner.starting import find_runc

    try:
        done = subprocess.run([find_runc(), "--version"], capture_output=True, text=True, check=False)
        said = done.stdout.partition("\n")[0]
    except UnsupportedError:
        said = "no runc"
    found = re.search(r"([0-9]+)\.([0-9]+)\.([0-9]+)", said)
    if found:
        version = (int(found[1]), int(found[2]), int(found[3]))
        same = [one for one in OLDEST_RUNC if one[:2] == version[:2]]
        if version < (same[0] if same else OLDEST_RUNC[0] if version < OLDEST_RUNC[0] else version):
            sys.stderr.write(
                "crun: warning: this runc is older than 1.3.6 and 1.4.3: a hostile image may get out of its container"
                " (CVE-2025-31133, -52565, -52881, CVE-2026-41579), unless your distribution has mended it\n"
            )
    return f"crun (cafs tools) {__version__}\n{said}\n"


def main(arguments: list[str]) -> int:
    """Dispatch the verb; the returned number is the exit code."""
    from cafs.errors import CafsError, UnsupportedError, UsageError, quote

    if arguments[:1] == ["--version"]:
        sys.stdout.write(_version())
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb == "completion" and rest != ["--help"]:
        from cli._completion import script

        sys.stdout.write(script(rest[0] if len(rest) == 1 else ""))
        return 0
    if verb == "run":
        from cafs.options import parse
        from runner.flags import ALIASES, DEFAULT_IF_EMPTY, MAY_BE_EMPTY, RUN, check_words

        flags, aliases, stop_at = RUN, ALIASES, 1
    else:
        from cafs.options import parse
        from runner.flags import ALIASES, DEFAULT_IF_EMPTY, GROUPS, MAY_BE_EMPTY, VERBS, check_words

        if verb in GROUPS:
            if not rest or rest[0] in ("-h", "--help"):
                (sys.stdout if rest else sys.stderr).write(_group_usage(verb))
                return 0 if rest else 2
            if rest[0].startswith("-"):
                raise UsageError(f"crun {verb} COMMAND: the command is missing", hint=f"crun {verb} --help")
            verb, rest = f"{verb} {rest[0]}", rest[1:]
        if verb not in VERBS:
            raise UsageError(f"unknown command {quote(verb)}", hint=_instead_of(verb))
        flags, aliases, stop_at = VERBS[verb][2], ALIASES, {"create": 1, "exec": 1, "top": 1}.get(verb, 0)
    is_strict = verb in ("run", "exec", "create")
    asked = {"--help"} if verb in ("run", "create") else {"-h", "--help"}  # -h is their --hostname
    if asked & set(rest[:1] if is_strict else rest):
        sys.stdout.write(_help(verb))
        return 0
    try:
        options = parse(rest, flags, aliases, program=f"crun {verb}", stop_at=stop_at)
        check_words(verb, options.words)
        options.settle_empty(default=DEFAULT_IF_EMPTY, kept=MAY_BE_EMPTY)
        return _call(verb, options)
    except BrokenPipeError:
        raise
    except CafsError as error:
        if is_strict and error.exit_code not in (UnsupportedError.exit_code, 126, 127):
            raise _ours(error) from None
        raise
    except OSError as error:
        if is_strict:
            from cafs.errors import describe

            raise _ours(CafsError(describe(error))) from error
        raise
    except Exception as error:
        if os.environ.get(DEBUG) or not is_strict:
            raise
        hint = f"{DEBUG}=1 shows where; please report it"
        raise _ours(CafsError(f"internal error: {type(error).__name__}: {error}", hint=hint)) from error


def _call(verb: str, options: Options) -> int:
    if os.geteuid():
        from runner import rootless

        rootless.enter()
    if verb == "run":
        from runner.foreground import run

        return run(options)
    gc.enable()
    from runner.verbs import call

    if verb == "gc":
        from builder import scratch

        scratch.tidy()
    return call(verb, options, {"commit": _commit})


def _commit(options: Options) -> int:
    from builder import changes
    from runner import committing

    return committing.run(options, changes.apply)


def _ours(error: CafsError) -> CafsError:
    """A failure of crun's own: 1 would be taken for the command's."""
    error.exit_code = 125
    return error


def entry() -> None:
    """The console script."""
    leave(PROGRAM, lambda: main(sys.argv[1:]))
