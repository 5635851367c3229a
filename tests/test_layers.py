"""The shape of the code: imports point one way, heavy modules are loaded in one place and only when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "cafs": {"cafs"},
    "runner": {"runner", "cafs"},
    "builder": {"builder", "runner", "cafs"},
    "pool": {"pool", "cafs"},
    "cli": {"cli", "cafs", "runner", "builder", "pool"},
}
HOMES = {
    "click": "cli/",
    "rich": "cli/",
    "pyfuse3": "cafs/fusefs.py",
    "trio": "cafs/fusefs.py",
    "boto3": ("cafs/s3.py", "pool/ec2.py"),
    "botocore": ("cafs/s3.py", "pool/ec2.py"),
    "google": "pool/gce.py",
    "cryptography": "pool/keys.py",
    "urllib3": ("cafs/web.py", "cafs/unixweb.py"),
    "paramiko": "pool/ssh.py",
}
HEAVY = [
    "rich",
    "pyfuse3",
    "trio",
    "boto3",
    "urllib3",
    "paramiko",
    "google",
    "cryptography",
    "zstandard",
    "xxhash",
    "cafs.index",
    "dataclasses",
]


def imports() -> list[tuple[str, str]]:
    found = []
    for room in MAY_IMPORT:
        for path in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                found += [(str(path.relative_to(ROOT)), name) for name in names]
    return found


def test_imports_point_one_way() -> None:
    for path, name in imports():
        top = name.split(".")[0]
        if top in MAY_IMPORT:
            assert top in MAY_IMPORT[path.split("/")[0]], f"{path} imports {name}"


def test_heavy_libraries_are_imported_in_one_place() -> None:
    for path, name in imports():
        home = HOMES.get(name.split(".")[0])
        assert home is None or path.startswith(home), f"{path} imports {name}"


@pytest.mark.parametrize("module", ["cli.cafs_index", "cli.cafs_mount", "cli.cafs_store", "cli.crun", "cli.cpool"])
def test_help_loads_no_heavy_module(module: str) -> None:
    """cafs-mount and crun load no click either."""
    more = ["click"] if module in ("cli.cafs_mount", "cli.crun") else []
    code = (
        f"import os, sys; sys.argv = ['x', '--help']\nfrom {module} import entry\n"
        f"def end(code=0): print([m for m in {[*HEAVY, *more]} if m in sys.modules], file=sys.stderr); sys.exit(code)\n"
        "os._exit = end\n"
        "try: entry()\nexcept SystemExit: end()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stderr.split("\n")) <= {"[]", ""}
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert done.stdout.startswith("Usage:")


def test_the_agents_program_is_of_python_39_and_needs_nothing_but_itself() -> None:
    """It is sent to machines that have no more; ast knows the grammar of 3.9, and who uses what of ours is seen here."""
    from pool.program import MODULES, SHARED

    shared = [f"cafs.{name}" for name in SHARED]
    for name in [*(f"pool.{name}" for name in MODULES), *shared]:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pool":
                wanted = [node.module.partition(".")[2]] if "." in node.module else [one.name for one in node.names]
                assert set(wanted) <= set(MODULES), (name, wanted)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                names = [one for one in names if one not in shared]
                assert all(one.split(".")[0] in sys.stdlib_module_names for one in names), (name, names)
            if isinstance(node, ast.Call):
                assert not any(word.arg == "strict" for word in node.keywords), f"{name}: zip(strict=) is of 3.10"
