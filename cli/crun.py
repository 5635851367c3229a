"""crun: run a command in an image.  man page: crun(1).  `run` loads no click; see the start-up test."""

from __future__ import annotations

import os
import sys

from cli._app import DEBUG, describe, guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.errors import CafsError

PROGRAM = "crun"
USAGE = """Usage: crun run [FLAG]... IMAGE [COMMAND [ARGUMENT]...]

Run a command in an image, in a container of its own.

  crun run demo:1 python3 -c 'print("hello")'
  tar c . | crun run -i demo:1 sha256sum

Flags:
{flags}
  -h, --help                  Show this.
      --version               Show the version.

Exit status: the command's own; 125 crun failed, 126 the command cannot be
executed, 127 it was not found, 8 missing privilege or program.
Full manual: man crun
"""


def _usage() -> str:
    from runner.options import FLAGS

    rows = []
    for name, (_, letter, value, text) in FLAGS.items():
        flag = f"  {'-' + letter + ',' if letter and name != 'hostname' else '   '} --{name} {value}".ljust(30)
        rows.append(f"{flag}{text}" if len(flag) <= 30 else f"{flag}\n{'':30}{text}")
    return USAGE.format(flags="\n".join(rows))


def main(arguments: list[str]) -> int:
    """Dispatch the verb; the returned number is the exit code."""
    from cafs.errors import CafsError, UnsupportedError, UsageError

    if arguments[:1] == ["--version"]:
        from cafs import __version__

        sys.stdout.write(f"crun (cafs tools) {__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_usage())
        return 0 if arguments else 2
    if arguments[0] != "run":
        raise UsageError(f"unknown command '{arguments[0]}'", hint="crun --help")
    if arguments[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(_usage())
        return 0
    from runner.container import Refused, run
    from runner.options import parse

    try:
        return run(parse(arguments[1:]))
    except (UnsupportedError, Refused, BrokenPipeError):
        raise
    except CafsError as error:
        raise _ours(error) from None
    except OSError as error:
        raise _ours(CafsError(describe(error))) from error
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        hint = f"{DEBUG}=1 shows where; please report it"
        raise _ours(CafsError(f"internal error: {type(error).__name__}: {error}", hint=hint)) from error


def _ours(error: CafsError) -> CafsError:
    """A failure of crun's own: 1 would be taken for the command's."""
    error.exit_code = 125
    return error


def entry() -> None:
    """The console script."""
    sys.exit(guarded(PROGRAM, lambda: main(sys.argv[1:])))
