"""GPUs of NVIDIA on a host that has no CDI specification of them: which there are, and what of the host their users need.

Device nodes are found in /dev, libraries of the driver in the list of ldconfig(8): those that NVIDIA's container toolkit counts
as "compute" and "utility", which is docker's choice too.  The result is a specification like those in /etc/cdi.
"""

from __future__ import annotations

import os
import re

from runner import programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KIND = "nvidia.com/gpu"
_COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_LIBRARY = re.compile(
    r"lib(cuda|cudadebugger|nvidia-(ml|cfg|opencl|gpucomp|ptxjitcompiler|fatbinaryloader|compiler|nvvm[0-9]*|allocator|pkcs11))"
    r"(-openssl[0-9]+)?\.so(\.[0-9.]+)?"
)
_PROGRAMS = ("nvidia-smi", "nvidia-debugdump", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server")
_LISTED = re.compile(r"\s*(\S+) \([^)]*(?:x86-64|AArch64)[^)]*\) => (/\S+)")


def inventory() -> list[dict[str, Any]]:
    """The GPUs, as the driver's management library knows them: number, uuid, name, memory in bytes; [] where there is none."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            uuid, name = (_text(of(handle)) for of in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append({"number": number, "uuid": uuid, "name": name, "memory": memory})
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def specification(devices: str = "/dev") -> dict[str, Any] | None:
    """What a CDI specification would say of this host; None if it has no GPU.  devices: where the nodes are."""
    try:
        numbers = sorted(int(name[6:]) for name in os.listdir(devices) if re.fullmatch("nvidia[0-9]+", name))
    except OSError:
        numbers = []
    if not numbers:
        return None
    nodes = {number: _node(devices, f"nvidia{number}") for number in numbers}
    uuids = {gpu["number"]: gpu["uuid"] for gpu in inventory()}
    named = [(str(number), [nodes[number]]) for number in numbers]
    named += [(uuids[number], [nodes[number]]) for number in numbers if number in uuids]
    named.append(("all", list(nodes.values())))
    common = [_node(devices, name) for name in _COMMON if os.path.exists(os.path.join(devices, name))]
    mounts = [{"hostPath": path, "containerPath": path} for path in dict.fromkeys(_libraries() + _programs())]
    return {
        "kind": KIND,
        "containerEdits": {"deviceNodes": common, "mounts": mounts, "env": ["NVIDIA_VISIBLE_DEVICES=void"]},
        "devices": [{"name": name, "containerEdits": {"deviceNodes": nodes}} for name, nodes in named],
    }


def _node(devices: str, name: str) -> dict[str, str]:
    return {"path": f"/dev/{name}", "hostPath": os.path.join(devices, name)}


def _libraries() -> list[str]:
    """Real paths of the driver's libraries for this machine."""
    ldconfig = programs.find("ldconfig", "/sbin", "/usr/sbin")
    if ldconfig is None:
        return []
    lines = programs.call([ldconfig, "-p"])[1].splitlines()
    matches = [match for match in map(_LISTED.match, lines) if match and _LIBRARY.fullmatch(match[1])]
    return [path for path in (os.path.realpath(match[2]) for match in matches) if os.path.isfile(path)]


def _programs() -> list[str]:
    return [os.path.realpath(path) for path in map(programs.find, _PROGRAMS) if path]
