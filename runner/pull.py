"""--pull: an image of a registry, docker://REFERENCE, brought into the store under a ref of its own when it is run."""

from __future__ import annotations

import hashlib
import os

from cafs import image, linux
from cafs.errors import CafsError, NotFound, quote
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.image import Image


def get(root: str, name: str, when: str) -> Image:
    """when: missing, always, never.  Raises CafsError; NotFound if it is not here and never to be pulled."""
    ref = f"docker/{hashlib.sha256(name.encode()).hexdigest()[:32]}:latest"
    if when != "always":
        try:
            return image.resolve(Store(root), ref)
        except NotFound:
            if when == "never":
                raise NotFound(f"no image {quote(name)} here, and it is not to be pulled") from None
    child = os.fork()
    if not child:
        _pull(name, root, ref)
    _, status = os.waitpid(child, 0)
    if status:
        error = CafsError(f"cannot pull {quote(name)}")
        error.exit_code = linux.exit_code(status)
        raise error
    return image.resolve(Store(root), ref)


def _pull(name: str, root: str, ref: str) -> None:
    """In a child: what it loads is not loaded here.  Never returns."""
    import sys

    program = "from cli.cafs_index import entry; entry()"
    os.dup2(2, 1)
    try:
        os.execv(sys.executable, [sys.executable, "-P", "-c", program, "create", name, "--store", root, "-t", ref])
    finally:
        os._exit(1)
