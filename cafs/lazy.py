"""LAZY: the flat file system of objects under a kernel mount, which fetches what the cache does not have.

/.cafs-objects/ab/cdef…, read-only, for overlayfs' data-only layers.  Which objects there are, and how large they are, say the
locators of the layers that are mounted: state/locators/N, numbered from 1, never changed.  A node is a locator's number and a
record's number in it, so nothing has to be remembered from one server to the next.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat

from cafs import fusedev, locator
from cafs.digest import CHUNK_LIST, CHUNK_LIST_SUFFIX, DIGEST_SIZES, OBJECTS, PLAIN
from cafs.errors import FormatError
from cafs.reader import Reader
from cafs.serving import LOCATORS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.cache import Cache
    from cafs.locator import Locator
    from cafs.reader import Key, Where
    from cafs.record import Recorder

_OBJECTS_NODE = 2
_SHARD_NODE = 256
_LOCATOR_BITS = 32
_DIRECTORY = stat.S_IFDIR | 0o755
_log = logging.getLogger(__name__)


class Lazy(Reader):
    """The answers.  state: directory of the locators.  noticed: called when there may be new ones.  Thread-safe."""

    def __init__(self, state: str, cache: Cache, recorder: Recorder | None, noticed: Callable[[], None]) -> None:
        super().__init__(state, cache, recorder)
        self.noticed = noticed
        self.locators: dict[int, Locator] = {}
        self.look()

    def look(self) -> bool:
        """Open the locators that are new; whether there are any."""
        found = False
        directory = os.path.join(self.state, LOCATORS)
        for name in sorted(os.listdir(directory)):
            number = int(name) if re.fullmatch("[1-9][0-9]{0,8}", name) else 0
            if not number or number in self.locators:
                continue
            try:
                found_locator = locator.load(os.path.join(directory, name))
            except (OSError, FormatError) as error:
                _log.error("cannot use locator %s: %s", name, error)
                continue
            if found_locator.hash_name == self.cache.store.hash_name:
                self.locators[number] = found_locator
                found = True
        self.noticed()
        self.look_for_requests()
        return found

    def lookup(self, node: int, name: bytes) -> bytes:
        """Directories are there whether there is anything in them or not; names of files that are not there are not kept."""
        if node == fusedev.ROOT and name == OBJECTS:
            return fusedev.entry_out(_OBJECTS_NODE, self.getattr(_OBJECTS_NODE))
        if node == _OBJECTS_NODE and re.fullmatch(rb"[0-9a-f]{2}", name):
            shard = _SHARD_NODE + int(name, 16)
            return fusedev.entry_out(shard, self.getattr(shard))
        if _SHARD_NODE <= node < 2 * _SHARD_NODE:
            found = self._named(b"%02x%s" % (node - _SHARD_NODE, name))
            if found is not None:
                return fusedev.entry_out(found, self.getattr(found))
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def getattr(self, node: int) -> bytes:
        if node < 2 * _SHARD_NODE:
            return fusedev.attr(node, _DIRECTORY, 0, 2)
        _, _, size, _ = self._locator(node).record(node & 0xFFFF_FFFF)
        return fusedev.attr(node, stat.S_IFREG | 0o444, size)

    def _named(self, name: bytes) -> int | None:
        """The node of the object with this name, in the first locator that has it; looks for new ones if none has."""
        text = name.decode("latin-1")
        kind = CHUNK_LIST if text.endswith(CHUNK_LIST_SUFFIX) else PLAIN
        text = text.removesuffix(CHUNK_LIST_SUFFIX)
        if not re.fullmatch("[0-9a-f]{%d}" % (2 * DIGEST_SIZES[self.cache.store.hash_name]), text):
            return None
        for again in (False, True):
            if again and not self.look():
                break
            for number, one in list(self.locators.items()):
                record = one.find(bytes.fromhex(text), kind)
                if record is not None and one.record(record)[2]:  # of no bytes there is none: the kernel would not ask for any
                    return number << _LOCATOR_BITS | record
        return None

    def all_locators(self) -> list[Locator]:
        return list(self.locators.values())

    def key(self, node: int) -> Key:
        digest, kind, _, _ = self._locator(node).record(node & 0xFFFF_FFFF)
        return digest, kind

    def where(self, node: int) -> Where:
        locator = self._locator(node)
        _, _, size, place = locator.record(node & 0xFFFF_FFFF)
        return size, place, locator

    def _locator(self, node: int) -> Locator:
        number = node >> _LOCATOR_BITS
        if number not in self.locators:
            self.look()
        if number not in self.locators or node & 0xFFFF_FFFF >= len(self.locators[number]):
            raise OSError(errno.ESTALE, "no such node")
        return self.locators[number]
