"""Reading all that the cache holds and comparing it with its names: `cafs-store fsck --cache`.

A kernel mount reads cached objects without hashing them, so this finds what neither size nor times betray.
"""

from __future__ import annotations

import os
import re

from cafs import atomic, chunks, columns, locator, paths
from cafs.digest import DIGEST_SIZES, hash_function
from cafs.errors import CafsError
from cafs.fsck import Finding
from cafs.keeper import look_anew
from cafs.ledger import Ledger, set_aside
from cafs.ordered import ordered_map
from cafs.store import META_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cafs.ledger import Key

    Check = tuple[str, str, Callable[[], bool]]  # subject, path, whether it is good

_THREADS = 4
_METADATA_MAX = 1 << 32
_HEX = re.compile("[0-9a-f]+")


def check(root: str, *, repair: bool) -> Iterator[Finding]:
    """A finding for each file that is not what its name or checksum says; to repair is to set it aside."""
    has_changed = False
    for subject, path, is_good in ordered_map(_run, _checks(root), _THREADS, window=4 * _THREADS):
        if is_good or not os.path.lexists(path):  # it may have gone meanwhile
            continue
        if repair:
            set_aside(root, path)
            has_changed = True
        yield Finding("damaged-in-cache", subject, repair)
    if has_changed:
        look_anew(os.path.realpath(root))


def _run(task: Check) -> tuple[str, str, bool]:
    subject, path, is_good = task
    try:
        return subject, path, is_good()
    except (OSError, CafsError):
        return subject, path, False


def _checks(root: str) -> Iterator[Check]:
    for hash_name, size in DIGEST_SIZES.items():
        ledger = Ledger(root, hash_name, 0)
        for key, path, _ in ledger.present():
            yield f"object {os.path.basename(os.path.dirname(path))}{os.path.basename(path)}", path, _object(ledger, key, path)
        hashed = hash_function(hash_name)
        for directory, limit in (
            ("lists", chunks.LIST_MAX),
            ("metadata", _METADATA_MAX),
            ("indexes", META_MAX),
            ("meta", META_MAX),
        ):
            for name in _listed(os.path.join(root, directory)):
                digest = name.partition(".")[0]
                if len(digest) == 2 * size and _HEX.fullmatch(digest):
                    path = os.path.join(root, directory, name)
                    yield f"{directory} {name}", path, _hashes(hashed, path, limit, bytes.fromhex(digest))
    for name in _listed(os.path.join(root, "locators")):
        path = os.path.join(root, "locators", name)
        yield f"locators {name}", path, _loads(locator.load, path)
    for name in _listed(os.path.join(root, "columns")):
        path = os.path.join(root, "columns", name)
        yield f"columns {name}", path, _loads(lambda path: os.close(columns.open_checked(path)[0]), path)


def _object(ledger: Ledger, key: Key, path: str) -> Callable[[], bool]:
    return lambda: ledger.verify(key, path)


def _hashes(hashed: Callable[[bytes], bytes], path: str, limit: int, digest: bytes) -> Callable[[], bool]:
    return lambda: hashed(atomic.read_file(path, limit)) == digest


def _loads(load: Callable[[str], object], path: str) -> Callable[[], bool]:
    def is_good() -> bool:
        load(path)
        return True

    return is_good


def _listed(path: str) -> list[str]:
    """Without what is being written."""
    return sorted(name for name in paths.listed(path) if not name.startswith("tmp."))
