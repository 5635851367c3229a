"""Connect to the cloud that the settings name.  Each is imported when it is used: its library is slow to load."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.cloud import Cloud


def connect(settings: dict[str, Any], pool: str) -> Cloud:
    """settings: [cloud] of pool.toml.  pool: what all of its machines are marked with.  Raises CafsError."""
    if settings["provider"] == "ec2":
        from pool.ec2 import EC2

        return EC2(settings, pool)
    from pool.gce import GCE

    return GCE(settings, pool)
