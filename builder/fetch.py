"""What is not on this machine: a file behind a URL, a git repository."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess

from cafs.errors import RemoteError, UnsupportedError, quote

GIT = re.compile(r"(?:git@[^:]+:|git://|ssh://git@).+|https?://.+\.git(?:#.*)?")
URL = re.compile(r"https?://.+")
_TIMEOUT_S = 60
_MOST = 1 << 34


def download(url: str, path: str) -> tuple[str, str]:
    """Into a new file; (its SHA-256 in hex, what the server says of its time).  Raises RemoteError."""
    import urllib.request
    from http.client import HTTPException

    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(path, "xb") as file:
            while data := answer.read(1 << 20):
                digest.update(data)
                size += len(data)
                if size > _MOST:
                    raise RemoteError(f"{quote(url)} is larger than {_MOST >> 30} GiB")
                file.write(data)
            # Unlike read(), read(n) says nothing when the connection ends before Content-Length.
            if answer.length:
                raise RemoteError(f"cannot fetch {quote(url)}: it ended after {size} of {size + answer.length} bytes")
            return digest.hexdigest(), str(answer.headers.get("Last-Modified") or "")
    except (OSError, ValueError, HTTPException) as error:
        raise RemoteError(f"cannot fetch {quote(url)}: {getattr(error, 'reason', None) or error}") from error


def clone(url: str, directory: str, *, keeps: bool) -> tuple[str, str]:
    """REPOSITORY[#REF[:DIRECTORY]], with its submodules, into a directory: (the commit, DIRECTORY).  keeps: .git.

    Raises RemoteError, ValueError.
    """
    if shutil.which("git") is None:
        raise UnsupportedError("no git", hint="apt install git")
    repository, _, rest = url.partition("#")
    ref, _, inner = rest.partition(":")
    if ref.startswith("-"):
        raise ValueError(f"'{ref}' is not a ref")
    _git(url, directory, "init", "-q")
    try:
        _git(url, directory, "fetch", "-q", "--depth=1", "--", repository, ref or "HEAD")
    except RemoteError:  # a plain web server knows no part of a history
        _git(url, directory, "fetch", "-q", "--", repository, ref or "HEAD")
    _git(url, directory, "checkout", "-q", "FETCH_HEAD")
    commit = _git(url, directory, "rev-parse", "HEAD").strip()
    if os.path.lexists(os.path.join(directory, ".gitmodules")):
        _git(url, directory, "submodule", "-q", "init")
        try:
            _git(url, directory, "submodule", "-q", "update", "--init", "--recursive", "--depth=1")
        except RemoteError:
            _git(url, directory, "submodule", "-q", "update", "--init", "--recursive")
    if not keeps:
        shutil.rmtree(os.path.join(directory, ".git"))
    for top, names, files in os.walk(directory):
        if not keeps and ".git" in files:  # of a submodule: where its part of the other .git was
            files.remove(".git")
            os.unlink(os.path.join(top, ".git"))
        for name in [*names, *files]:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.path.isdir(path) or os.access(path, os.X_OK) else 0o644)
    return commit, inner


def _git(url: str, directory: str, *words: str) -> str:
    """No hook, no prompt, no helper that a URL names, no file of this machine that a submodule names."""
    forbidden = [word for kind in ("ext", "file") for word in ("-c", f"protocol.{kind}.allow=never")]
    safe = [*forbidden, "-c", "core.hooksPath=/dev/null"]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", directory, *safe, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RemoteError(f"cannot fetch {quote(url)}: {done.stderr.strip()}")
    return done.stdout
