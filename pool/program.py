"""The agent's program: one file that any Python 3.9 runs, the same bytes whenever it is made."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from functools import cache

MODULES: tuple[str, ...] = (
    "admitting",
    "agent",
    "attach",
    "calls",
    "cgroup",
    "entering",
    "execution",
    "forking",
    "frames",
    "hiding",
    "hosted",
    "hosting",
    "hostprocess",
    "instance",
    "known",
    "launched",
    "lent",
    "lines",
    "loop",
    "machine",
    "peers",
    "processes",
    "shim",
    "single",
    "sockets",
    "staging",
    "streams",
    "values",
)
SHARED = ("removing",)
"""Of cafs, which all others use, too."""

_MAIN = "import sys\nfrom pool.attach import main\nsys.exit(main({build!r}))\n"
_DATE = (1980, 1, 1, 0, 0, 0)


@cache
def make() -> tuple[str, bytes]:
    """(its build, the file); made once in a process."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sources = {"pool/__init__.py": b"", "cafs/__init__.py": b""}
    for path in (*(f"pool/{name}.py" for name in MODULES), *(f"cafs/{name}.py" for name in SHARED)):
        with open(os.path.join(top, path), "rb") as file:
            sources[path] = file.read()
    digest = hashlib.sha256(b"\0".join(name.encode() + b"\0" + data for name, data in sorted(sources.items())))
    build = digest.hexdigest()[:16]
    out = io.BytesIO(b"#!/usr/bin/env python3\n")
    out.seek(0, os.SEEK_END)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [("__main__.py", _MAIN.format(build=build).encode()), *sorted(sources.items())]:
            archive.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_DEFLATED)
    return build, out.getvalue()
