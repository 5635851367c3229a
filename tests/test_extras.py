"""Without an extra of the package, what needs it says which one, and nothing else breaks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Run


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("boto3", "s3", ["cafs-store", "ls", "--store", "s3://bucket/x"]),
        ("pyfuse3", "fuse", ["cafs-mount", "--engine", "pyfuse3", "x:1", "MNT"]),
        ("yaml", "cdi", ["crun", "run", "--rm", "--device", "a.b/c=d", "x:1", "/true"]),
        ("paramiko", "ssh", ["cpool", "host", "add", "h", "h.invalid", "--yes"]),
    ],
)
def test_what_needs_an_extra_says_so(home: Path, tmp_path: Path, cmd: Run, module: str, extra: str, command: list[str]) -> None:
    for name in ("tree", "MNT", "without", "cdi"):
        (tmp_path / name).mkdir()
    (tmp_path / "without" / f"{module}.py").write_text(f"raise ModuleNotFoundError('none', name='{module}')\n")
    (tmp_path / "tree" / "true").touch(0o755)
    (tmp_path / "cdi" / "a.yaml").write_text("cdiVersion: 0.5.0\nkind: a.b/c\ndevices: []\n")
    more = {"CAFS_CDI": str(tmp_path / "cdi"), "CAFS_POOL": str(tmp_path / "pool")}
    environment = os.environ | more | {"PYTHONPATH": f"{tmp_path}/without:{os.environ.get('PYTHONPATH', '')}"}
    assert cmd("cafs-index", "create", tmp_path / "tree", "-t", "x:1", env=environment).returncode == 0
    assert cmd("cpool", "init", env=environment).returncode == 0
    done = cmd(*command[:1], *[str(tmp_path / word) if word == "MNT" else word for word in command[1:]], env=environment)
    assert done.returncode == 8, done.stderr
    assert f"pip install 'cafs-tools[{extra}]'".encode() in done.stderr
