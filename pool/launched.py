"""What the agent does on a machine that its pool has launched: shows that it is needed, and hears when the cloud takes it away.

Part of the agent's program: standard library only, Python 3.9.  What the machine is stands in a file that root wrote when it
booted (boot.py); on a machine without one nothing is done.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MACHINE = "/etc/cpool/machine.json"
_NOTICE_S = 5.0
_METADATA = {"ec2": "http://169.254.169.254", "gce": "http://metadata.google.internal"}
_TOUCH_S = 15.0


class Launched:
    """has_notice: the cloud has said that it will take the machine away."""

    def __init__(self) -> None:
        about = _about(os.environ.get("CPOOL_MACHINE", _MACHINE))
        self._alive = str(about.get("alive", ""))
        self._next = 0.0
        self.has_notice = False
        cloud = str(about.get("notice", ""))
        if cloud:
            where = str(about.get("metadata") or _METADATA.get(cloud, ""))
            threading.Thread(target=self._listen, args=(cloud, where), daemon=True).start()

    def is_needed(self) -> None:
        """A controller is connected: the machine is not to end by itself."""
        now = time.monotonic()
        if self._alive and now >= self._next:
            self._next = now + _TOUCH_S
            try:
                os.utime(self._alive)
            except OSError:
                pass  # then it ends in a while, as one does that nobody can reach

    def _listen(self, cloud: str, where: str) -> None:
        while not self.has_notice:
            try:
                self.has_notice = _is_noticed(cloud, where)
            except (OSError, ValueError):
                pass  # 404: there is none
            time.sleep(_NOTICE_S)


def _about(path: str) -> dict[str, Any]:
    """What stands in the file, {} if it is not root's."""
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            found = json.load(file)
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_noticed(cloud: str, where: str) -> bool:
    """EC2: spot/instance-action is there, by IMDSv2; GCE: instance/preempted is TRUE.  Raises OSError."""
    if cloud == "gce":
        return _get(f"{where}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip() == "TRUE"
    token = _get(f"{where}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    return bool(_get(f"{where}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    import urllib.request

    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=2) as answer:
        return str(answer.read(4096).decode())
