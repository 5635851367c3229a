"""What runs images on a worker, brought there over SSH: our own packages and the few libraries that crun loads, as a virtual
environment of the worker's Python.  Nothing but Python 3.11, tar and a shell is needed there, no pip and no network.

The same version is brought once; another one beside it, so that what runs is not disturbed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from cafs.errors import CafsError, UnsupportedError, quote
from pool.address import LOCAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.address import Pool

OLDEST = (3, 11)
_ROOMS = ("cafs", "runner", "builder", "pool", "cli")
_LIBRARIES = ("xxhash", "zstandard", "urllib3")
_FOR_S3 = ("boto3", "botocore", "s3transfer", "jmespath", "python-dateutil", "six")
_ASK = "python3 -c 'import platform, sys; print(*sys.version_info[:2], platform.machine())'"
_SETUP = """\
set -eu
umask 077
top="$HOME/.cache/cafs-toolkit"
dir="$top/@VERSION@"
if test -x "$dir/bin/cafs-run"; then
  cat >/dev/null
else
  new=$(mkdir -p "$top" && mktemp -d "$top/.new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  tar -xz -C "$new"
  mkdir "$new/bin"
  python=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
  ln -s "$python" "$new/bin/python3"
  printf 'home = %s\\ninclude-system-site-packages = false\\n' "${python%/*}" >"$new/pyvenv.cfg"
  printf '#!%s/bin/python3\\nimport sys\\nfrom cli.crun import entry\\nsys.exit(entry())\\n' "$dir" >"$new/bin/cafs-run"
  chmod 755 "$new/bin/cafs-run"
  "$new/bin/python3" -m compileall -q -s "$new" -p "$dir" "$new/lib" || :
  mv "$new" "$dir" 2>/dev/null || test -x "$dir/bin/cafs-run"
fi
ln -sfn "@VERSION@" "$top/current"
"$dir/bin/cafs-run" --version
PATH="$PATH:/usr/sbin:/sbin"
if test "$(id -u)" != 0 && ! command -v newuidmap >/dev/null; then
  echo "newuidmap is not there, and only root can install it" >&2; exit 8
fi
if ! command -v runc >/dev/null; then
  test "$(id -u)" = 0 || { echo "runc is not there, and only root can install it" >&2; exit 8; }
  if command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends runc
  else
    dnf install -y -q runc
  fi >/dev/null || { echo "runc cannot be installed" >&2; exit 8; }
fi
"""


def setup(pool: Pool, name: str, address: str, *, for_s3: bool = False) -> str:
    """Bring it to a worker, if it is not there; returns its version.  Raises CafsError, OSError."""
    from pool import ssh

    if address == LOCAL:
        return "here"
    with ssh.connected(pool.directory, name, address) as there:
        code, out, error = there.run(_ASK)
        words = out.split()
        if code or len(words) != 3:
            raise UnsupportedError(f"{quote(name)} has no Python: {error.strip()}")
        python = int(words[0]), int(words[1])
        if python < OLDEST:
            raise UnsupportedError(f"{quote(name)} has Python {python[0]}.{python[1]}; images need 3.11")
        version, data = make(python, words[2], for_s3=for_s3)
        code, out, error = there.run(_SETUP.replace("@VERSION@", version), data)
    if code:
        lines = error.strip().splitlines() or [f"exit code {code}"]
        raise CafsError(f"cannot set up {quote(name)}: {lines[-1]}")
    return version


def make(python: tuple[int, int], machine: str, *, for_s3: bool = False) -> tuple[str, bytes]:
    """(its version, a tar.gz) for a Python and a machine; the same bytes whenever it is made.  Raises CafsError."""
    place = f"lib/python{python[0]}.{python[1]}/site-packages"
    wanted = _LIBRARIES + (_FOR_S3 if for_s3 else ())
    is_ours = python == sys.version_info[:2] and machine == platform.machine()
    files = {**_own(), **(_installed(wanted) if is_ours else _downloaded(wanted, python, machine))}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in sorted(files):
            info = tarfile.TarInfo(f"{place}/{name}")
            info.size, info.mode = len(files[name]), 0o755 if name.endswith(".so") else 0o644
            archive.addfile(info, io.BytesIO(files[name]))
    version = hashlib.sha256(out.getvalue()).hexdigest()[:16]
    return version, gzip.compress(out.getvalue(), 6, mtime=0)


def _own() -> dict[str, bytes]:
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = {}
    for room in _ROOMS:
        for name in sorted(os.listdir(os.path.join(top, room))):
            if name.endswith(".py"):
                with open(os.path.join(top, room, name), "rb") as file:
                    found[f"{room}/{name}"] = file.read()
    return found


def _installed(names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of libraries as they are here."""
    found = {}
    for name in names:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise CafsError(f"{name} is not installed here", hint=f"pip install {name}") from None
        for one in files:
            text = str(one)
            if not text.startswith("..") and "__pycache__" not in text and not text.endswith(".pyc"):
                found[text] = one.read_binary()
    return found


def _downloaded(names: tuple[str, ...], python: tuple[int, int], machine: str) -> dict[str, bytes]:
    """The files of the same versions for another machine, from where pip gets them."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as place:
        wanted = [f"{name}=={importlib.metadata.version(name)}" for name in names]
        words = ["--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", f"{python[0]}.{python[1]}"]
        for level in ("manylinux2014", "manylinux_2_17", "manylinux_2_28"):
            words += ["--platform", f"{level}_{machine}"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *words, "-d", place, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip has failed"])[-1]
            raise CafsError(f"cannot get libraries for Python {python[0]}.{python[1]} on {machine}: {last}")
        for name in sorted(os.listdir(place)):
            with zipfile.ZipFile(os.path.join(place, name)) as wheel:
                found |= {one: wheel.read(one) for one in wheel.namelist() if not one.endswith("/") and ".." not in one}
    return found
