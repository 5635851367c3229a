"""cpool map --results: what each job has written, in files DIR/1/FIRST/2/SECOND/{seq,stdout,stderr}; as GNU parallel has it."""

from __future__ import annotations

import os

from cafs import atomic
from cafs.errors import os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME_MAX = 255


def keep(directory: str, number: int, arguments: list[str], out: Iterable[bytes], err: Iterable[bytes]) -> None:
    """out, err: in pieces.  Raises CafsError."""
    parts = [part for at, one in enumerate(arguments, 1) for part in (str(at), _name(one))]
    if any(len(os.fsencode(part)) > _NAME_MAX for part in parts):
        parts = [str(number)]
    place = os.path.join(directory, *parts)
    try:
        os.makedirs(place, exist_ok=True)
        for name, pieces in (("stdout", out), ("stderr", err), ("seq", [str(number).encode()])):
            with atomic.replacing(os.path.join(place, name), is_durable=False) as file:
                file.writelines(pieces)
    except OSError as error:
        raise os_error(f"cannot write results in {quote(directory)}", error) from error


def _name(argument: str) -> str:
    """As a name of a file: never out of the directory."""
    name = argument.replace("\\", "\\\\").replace("\t", "\\t").replace("/", "\\z")
    return {"": "\\0", ".": "\\_", "..": "\\__"}.get(name, name)
