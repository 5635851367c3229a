"""What all commands share: one place that runs a command and maps how it ends to stderr and an exit code.  cafs(7)."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    import click

DEBUG = "CAFS_DEBUG"
ENGINES = ("auto", "kernel", "fuse", "pyfuse3")
"""What cafs-mount and mount.cafs can mount with."""


def say(program: str, message: str) -> None:
    """One line on stderr, behind the program's name."""
    sys.stderr.write(f"{program}: {message}\n")


def run(command: click.Command, program: str, arguments: list[str] | None = None) -> None:
    """Run a click command and exit.  Nothing that a user can cause shows a traceback."""
    import click

    no_arguments = getattr(click.exceptions, "NoArgsIsHelpError", ())  # click 8.2; before, it has printed its help

    def main() -> int:
        # Not command.main(): it turns a closed pipe into exit 1 and Ctrl-C into "Aborted!", exit 1.
        try:
            with command.make_context(program, sys.argv[1:] if arguments is None else arguments) as context:
                result = command.invoke(context)
                return result if isinstance(result, int) else 0
        except click.exceptions.Exit as end:
            return end.exit_code
        except no_arguments as error:
            sys.stderr.write(f"{error.format_message()}\n")
            return 2
        except click.UsageError as error:
            say(program, _one_line(error.format_message()))
            sys.stderr.write(f"{(error.ctx or click.Context(command, info_name=program)).get_usage()}\n")
            return 2
        except click.ClickException as error:
            say(program, _one_line(error.format_message()))
            return 1
        except click.Abort:
            raise KeyboardInterrupt from None

    sys.exit(guarded(program, main))


def _one_line(text: str) -> str:
    """Click's sentence in our form: lower case (unless it begins with a NAME), no final period."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def guarded(program: str, main: Callable[[], int]) -> int:
    """Call MAIN and turn its exceptions into messages and exit codes.  Also used by `crun run`, which loads no click."""
    _open_streams()
    from cafs import stopping
    from cafs.errors import CafsError, describe

    stopping.heed()  # what was made for a while is removed
    try:
        code = main()
        sys.stdout.flush()
        return code
    except CafsError as error:
        if stopping.number():
            return 128 + stopping.number()  # a child was told, too, and that is what went wrong
        say(program, str(error))
        if error.hint:
            say(program, f"hint: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except stopping.Ended as end:
        return 128 + end.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except MemoryError:
        say(program, "out of memory")
        return 1
    except OSError as error:
        say(program, describe(error))
        return 1
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        say(program, f"internal error: {type(error).__name__}: {error}")
        say(program, f"hint: {DEBUG}=1 shows where; please report it")
        return 1


def leave(program: str, main: Callable[[], int]) -> None:
    """`guarded`, and then the end, without taking the interpreter apart: that takes 5 ms."""
    code = guarded(program, main)
    try:
        sys.stdout.flush()  # of what was printed before an error
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)


def _open_streams() -> None:
    """Give /dev/null to standard streams that the caller closed: else the next file that is opened takes their place."""
    for fd, stream, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(fd, mode, closefd=False))


def write_json(value: Any) -> None:
    """One compact line on stdout: sorted keys."""
    import json

    sys.stdout.write(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n")


def json_path(path: bytes) -> dict[str, str]:
    """A path for JSON: 'path' if it is UTF-8, else 'path_b64'."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        import base64

        return {"path_b64": base64.b64encode(path).decode()}


def write_lines(lines: Iterable[bytes]) -> None:
    """Raw bytes to stdout, a line each."""
    out = sys.stdout.buffer
    for line in lines:
        out.write(line + b"\n")


def is_terminal() -> bool:
    """Whether to draw a progress bar: stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
