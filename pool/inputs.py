"""On the controller: files that go to jobs, by the digest of what is in them, while a job that has not ended wants them."""

from __future__ import annotations

import base64
import hashlib
import os
import re

from cafs import atomic
from cafs.errors import UsageError
from pool import staging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


def _path(directory: str, digest: str) -> str:
    return os.path.join(directory, "inputs", digest)


def check(spec: Mapping[str, Any]) -> None:
    """What a job says of files.  Raises UsageError."""
    for one in spec.get("in", ()):
        is_sound = isinstance(one, list) and len(one) == 3 and staging.is_name(one[0]) and type(one[2]) is int
        if not is_sound or not re.fullmatch("[0-9a-f]{64}", str(one[1])):
            raise UsageError("a job's files have names below its directory")
    if not all(staging.is_name(name) for name in spec.get("out", ())) or len(spec.get("out", ())) > 1000:
        raise UsageError("a job's files have names below its directory")


def keep(directory: str, files: Mapping[str, str]) -> None:
    """files: in base64, by the SHA-256 of what is in them.  Raises UsageError, OSError."""
    for digest, text in files.items():
        data = base64.b64decode(text)
        if len(data) > staging.SIZE_MAX or hashlib.sha256(data).hexdigest() != digest:
            raise UsageError("a file that is too large, or another than was said")
        os.makedirs(os.path.dirname(_path(directory, digest)), mode=0o700, exist_ok=True)
        if not os.path.exists(_path(directory, digest)):
            atomic.replace_file(_path(directory, digest), data, 0o600)


def of_job(directory: str, spec: Mapping[str, Any]) -> list[list[object]]:
    """As its agent is told: name, content in base64, mode.  Raises UsageError, OSError."""
    found: list[list[object]] = []
    left = staging.SIZE_MAX
    for name, digest, mode in spec.get("in", ()):
        data = atomic.read_file(_path(directory, digest), staging.SIZE_MAX)
        left -= len(data)
        if left < 0:
            raise UsageError(f"the files of a job are larger than {staging.SIZE_MAX} bytes")
        found.append([name, base64.b64encode(data).decode(), mode])
    return found


def remove_unwanted(directory: str, specs: Iterable[Mapping[str, Any]]) -> None:
    """specs: of all jobs that have not ended."""
    wanted = {one[1] for spec in specs for one in spec.get("in", ())}
    try:
        names = os.listdir(os.path.join(directory, "inputs"))
    except FileNotFoundError:
        return
    for name in names:
        if name not in wanted:
            atomic.unlink_quietly(_path(directory, name))
