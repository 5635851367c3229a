"""crun volume ls|create|inspect|rm|prune."""

from __future__ import annotations

import json
import sys

from cafs.errors import UsageError, quote
from runner import filters, listing, logs, volumes
from runner.each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.options import Options

TRUTH = ("true", "false", "1", "0")
_FILTERS: dict[str, tuple[str, ...]] = {"name": (), "label": (), "dangling": TRUTH, "driver": ()}
_PRUNE_FILTERS: dict[str, tuple[str, ...]] = {"label": (), "label!": ()}


def labels_of(options: Options) -> dict[str, str]:
    """--label."""
    return dict(text.partition("=")[::2] for text in options.all("label"))


def check_driver(options: Options, only: str) -> None:
    """Raises UsageError."""
    if (options.value("driver") or only) != only:
        raise UsageError(f"there is no driver {quote(str(options.value('driver')))}", hint=only)


def _create(options: Options) -> int:
    check_driver(options, "local")
    sys.stdout.write(volumes.create(options.words[0] if options.words else "", labels_of(options)) + "\n")
    return 0


def _inspect(options: Options) -> int:
    rows = [_document(name) for name in options.words]
    sys.stdout.write(json.dumps(rows, indent=4, sort_keys=True) + "\n")
    return 0


def _remove(options: Options) -> int:
    return each(options.words, volumes.remove, missing_ok=options.has("force"))


def _list(options: Options) -> int:
    wanted = filters.parse(options.all("filter"), _FILTERS)
    rows = [row for row in volumes.every() if filters.fits(wanted, _tests(row))]
    if options.has("quiet"):
        sys.stdout.write("".join(f"{row['name']}\n" for row in rows))
    else:
        listing.print_table([("DRIVER", "VOLUME NAME"), *(("local", row["name"]) for row in rows)])
    return 0


def _tests(row: dict[str, Any]) -> dict[str, Callable[[str], bool]]:
    return {
        "name": lambda text: filters.is_like(text, row["name"]),
        "label": lambda text: filters.has_label(row["labels"], text),
        "label!": lambda text: not filters.has_label(row["labels"], text),
        "dangling": lambda text: (text in ("true", "1")) != bool(volumes.users(row["name"])),
        "driver": lambda text: text == "local",
    }


def _document(name: str) -> dict[str, object]:
    found = volumes.load(name)
    return {
        "Name": found["name"],
        "Driver": "local",
        "Mountpoint": found["mountpoint"],
        "CreatedAt": logs.stamp(found["created_ns"]),
        "Labels": found["labels"],
    }


def _prune(options: Options) -> int:
    """Those that nobody uses; named ones only if asked."""
    wanted, everything = filters.parse(options.all("filter"), _PRUNE_FILTERS), options.has("all")
    for row in volumes.every():
        is_meant = (row["anonymous"] or everything) and filters.fits(wanted, _tests(row))
        if is_meant and not volumes.users(row["name"]):
            volumes.remove(row["name"])
            sys.stdout.write(row["name"] + "\n")
    return 0


VERBS = {"ls": _list, "create": _create, "inspect": _inspect, "rm": _remove, "prune": _prune}
"""Each returns the exit code, and raises CafsError."""
