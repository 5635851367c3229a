"""How long tests wait.  Every bound of time is multiplied by one variable, for machines that are slow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SLOW = float(os.environ.get("CAFS_TEST_SLOW", "1"))
"""How many times slower than the machine of CI this one is: every bound of time in the tests is multiplied by it."""


def until(is_so: Callable[[], object], limit_s: float = 20, pause_s: float = 0.05) -> bool:
    """Look again and again; whether it came to be so."""
    deadline = time.monotonic() + limit_s * SLOW
    while not is_so():
        if time.monotonic() > deadline:
            return bool(is_so())  # it may have become so while nobody let us look
        time.sleep(pause_s)
    return True


def wait_until(is_so: Callable[[], object], limit_s: float = 10) -> None:
    """The same; it has to."""
    assert until(is_so, limit_s, 0.02), f"not within {limit_s * SLOW:g} s"
