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


def say(program: str, message: str) -> None:
    """One line on stderr, behind the program's name."""
    sys.stderr.write(f"{program}: {message}\n")


def run(command: click.Command, program: str, arguments: list[str] | None = None) -> None:
    """Run a click command and exit.  Nothing that a user can cause shows a traceback."""
    import click

    def main() -> int:
        try:
            result = command.main(arguments, prog_name=program, standalone_mode=False)
            return result if isinstance(result, int) else 0
        except click.UsageError as error:
            context = error.ctx
            usage = context.get_usage() if context else f"Usage: {program}"
            sys.stderr.write(
                f"{program}: {error.format_message()[0].lower()}{error.format_message()[1:].rstrip('.')}\n{usage}\n"
            )
            return 2
        except click.ClickException as error:
            say(program, error.format_message())
            return 1
        except click.Abort:
            raise KeyboardInterrupt from None

    sys.exit(guarded(program, main))


def guarded(program: str, main: Callable[[], int]) -> int:
    """Call MAIN and turn its exceptions into messages and exit codes.  Also used by `crun run`, which loads no click."""
    from cafs.errors import CafsError

    try:
        code = main()
        sys.stdout.flush()
        return code
    except CafsError as error:
        say(program, str(error))
        if error.hint:
            say(program, f"hint: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except MemoryError:
        say(program, "out of memory")
        return 1
    except OSError as error:
        name = f" '{os.fsdecode(error.filename)}'" if error.filename else ""
        say(program, f"{error.strerror or error}{name}")
        return 1
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        say(program, f"internal error: {type(error).__name__}: {error}")
        say(program, f"hint: {DEBUG}=1 shows where; please report it")
        return 1


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
