"""crun volume ls|create|inspect|rm|prune."""

from __future__ import annotations

import json
import sys

from cafs.errors import UsageError
from runner import listing, logs, volumes
from runner.each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.options import Options


def call(options: Options) -> int:
    """Run one of them; returns the exit code.  Raises CafsError."""
    verb, names = (options.words[:1] or [""])[0], options.words[1:]
    if verb == "ls":
        _list(options)
    elif verb == "create":
        if len(names) > 1:
            raise UsageError("one volume at a time")
        labels = dict(text.partition("=")[::2] for text in options.all("label"))
        sys.stdout.write(volumes.create(names[0] if names else "", labels) + "\n")
    elif verb == "inspect":
        rows = [_document(name) for name in names]
        sys.stdout.write(json.dumps(rows, indent=4, sort_keys=True) + "\n")
    elif verb == "rm":
        return _remove(names, force=options.has("force"))
    elif verb == "prune":
        _prune(everything=options.has("all"))
    else:
        raise UsageError(
            f"unknown command 'volume {verb}'" if verb else "COMMAND is missing", hint="ls, create, inspect, rm or prune"
        )
    return 0


def _list(options: Options) -> None:
    rows = volumes.every()
    if options.has("quiet"):
        sys.stdout.write("".join(f"{row['name']}\n" for row in rows))
        return
    listing.print_table([("DRIVER", "VOLUME NAME"), *(("local", row["name"]) for row in rows)])


def _document(name: str) -> dict[str, object]:
    found = volumes.load(name)
    return {
        "Name": found["name"],
        "Driver": "local",
        "Mountpoint": found["mountpoint"],
        "CreatedAt": logs.stamp(found["created_ns"]),
        "Labels": found["labels"],
    }


def _remove(names: list[str], *, force: bool) -> int:
    if not names:
        raise UsageError("VOLUME is missing")
    return each(names, volumes.remove, missing_ok=force)


def _prune(*, everything: bool) -> None:
    """Those that nobody uses; named ones only if asked."""
    for row in volumes.every():
        if (row["anonymous"] or everything) and not volumes.users(row["name"]):
            volumes.remove(row["name"])
            sys.stdout.write(row["name"] + "\n")
