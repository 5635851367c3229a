"""Where things are on this machine: the environment, else the XDG directories, else (root) /var and /run.  cafs(7), FILES."""

from __future__ import annotations

import os
import stat


def _directory(variable: str, root: str, xdg: str, fallback: str, name: str) -> str:
    """VARIABLE, else ROOT for root, else $XDG/name, else ~/fallback/name.  An empty value counts as unset.

    Without links, as the kernel shows the places of mounts.
    """
    chosen = os.environ.get(variable)
    if chosen:
        return os.path.realpath(chosen)
    if os.geteuid() == 0:
        return os.path.realpath(root)
    base = os.environ.get(xdg) or os.path.join(_home(variable), fallback)
    return os.path.realpath(os.path.join(base, name))


def _home(variable: str) -> str:
    """Of this user.  Raises UsageError where there is none, as for a number without a name."""
    found = os.path.expanduser("~")
    if found.startswith("/"):
        return found
    from cafs.errors import UsageError

    raise UsageError(f"user {os.geteuid()} has no home directory", hint=f"set HOME, or {variable}")


def located(address: str, secret: str | None = None) -> str:
    """A store's address with absolute paths, in the scope of a secret file.  Raises UsageError."""
    from cafs import scope

    url, named = scope.split(address if secret is None else scope.join(address, secret))
    if "://" not in url:
        if not is_local(url):
            from cafs.errors import UsageError, quote

            hint = f"a path, as {quote('./' + url)}, s3://, http:// or https://" if url else "an unset variable?"
            raise UsageError(f"{quote(url)} is not the address of a store", hint=hint)
        url = os.path.abspath(url)
    return scope.join(url, os.path.abspath(named)) if named else url


def is_local(path: str) -> bool:
    """Whether PATH names a place on this machine only: as for git and rsync, HOST:PATH has a colon before the first slash."""
    return bool(path) and ":" not in path.partition("/")[0]


def store() -> str:
    """The default store: a path or a URL."""
    if os.environ.get("CAFS_STORE"):
        return located(os.environ["CAFS_STORE"])
    return _directory("CAFS_STORE", "/var/lib/cafs/store", "XDG_DATA_HOME", ".local/share", "cafs/store")


def chosen_store(given: str | None, secret: str | None = None) -> str:
    """The store that an option names, else the default one; in the scope of a secret file.  Raises UsageError."""
    return located(store() if given is None else given, secret)


def cache() -> str:
    """Objects and stat caches: safe to delete at any time."""
    return _directory("CAFS_CACHE", "/var/cache/cafs", "XDG_CACHE_HOME", ".cache", "cafs")


def data(cache_root: str) -> str:
    """The part of a cache that is a layer of overlayfs: whatever an image's metadata says, it can name nothing else there."""
    return os.path.join(cache_root, "data")


def objects(cache_root: str) -> str:
    """Where the objects are in a cache."""
    return os.path.join(cache_root, "data", ".cafs-objects")


def listed(path: str) -> list[str]:
    """The names in a directory; none if it cannot be read."""
    try:
        return os.listdir(path)
    except OSError:
        return []


def make_private(path: str, *below: str) -> None:
    """Make PATH, for its owner alone, and a directory below it.  Raises OSError."""
    _make_all(path)
    status = os.stat(path)
    if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not status.st_mode & stat.S_ISVTX:  # /tmp stays open
        os.chmod(path, 0o700)
    if below:
        _make_all(os.path.join(path, *below))


def _make_all(path: str) -> None:
    """As os.makedirs, which leaves the directories above to the umask: these are for their owner alone, too."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        above = os.path.dirname(path)
        if above in ("", path):
            raise
        _make_all(above)
        try:
            os.mkdir(path, 0o700)  # once: where nothing can be made, as in /proc, that is all
        except FileExistsError:
            return  # somebody else has made it


def state() -> str:
    """Writable layers and bundles of containers."""
    return _directory("CAFS_STATE", "/var/lib/cafs", "XDG_DATA_HOME", ".local/share", "cafs")


def pool() -> str:
    """State of a pool of workers."""
    if chosen := os.environ.get("CAFS_POOL"):
        return os.path.realpath(chosen)
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(_home("CAFS_POOL"), ".local/state")
    return os.path.realpath(os.path.join(base, "cafs/pool"))


def _own(path: str) -> str:
    """A directory where others may make one too: ours, made if there is none.  Raises UnsupportedError if it is not ours."""
    from cafs.errors import UnsupportedError, quote

    try:
        os.mkdir(path, 0o700)
    except OSError:
        pass
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
            return path
    except OSError:
        pass
    hint = "set XDG_RUNTIME_DIR or CAFS_RUN"
    raise UnsupportedError(f"{quote(path)} is not a directory of yours alone", hint=hint)


def run() -> str:
    """Live state: mounts and running containers.  Gone after a reboot."""
    if not os.environ.get("XDG_RUNTIME_DIR") and os.geteuid():
        return os.environ.get("CAFS_RUN") or _own(f"/tmp/cafs-{os.getuid()}")
    return _directory("CAFS_RUN", "/run/cafs", "XDG_RUNTIME_DIR", "", "cafs")
