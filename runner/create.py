"""Making a container: from an image and flags to its record on disk.  What depends on the caller is settled here:
environment, paths, names.  What depends on the image's files is settled whenever it starts."""

from __future__ import annotations

import os
import sys
import time

from cafs import atomic, image, linux, mountinfo, paths
from cafs.errors import CafsError, UnsupportedError, UsageError, os_error, quote
from cafs.store import Store
from runner import alive, cgroups, containers, mounts, spec, volumes
from runner.containers import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.image import Image
    from cafs.options import Options
    from runner.ports import Asked

_STOP_TIMEOUT_S = 10
_LOG_SIZE, _LOG_FILES = 128 << 20, 2
_DRIVERS = ("json-file", "none", "k8s-file", "local")
_POLICIES = ("no", "on-failure", "always", "unless-stopped")
_OF_A_NETWORK = ("hostname", "dns", "dns-search", "dns-option", "add-host", "publish", "publish-all", "expose")
_OF_A_CHECK = ("health-cmd", "health-interval", "health-timeout", "health-retries", "health-start-period")
_VARIANTS = {"amd64": ("", "v1", "v2", "v3", "v4"), "arm64": ("", "v8")}
"""Of architectures that a host may be asked for; which of them its processor has, the program finds out."""


def create(
    options: Options,
    *,
    is_foreground: bool,
    more: list[dict[str, Any]] | None = None,
    trusts_cache: bool = False,
    is_volatile: bool = False,
    when_held: Callable[[Container], None] | None = None,
) -> Container:
    """Make it, held by us from its first file on.  Raises CafsError; then nothing of it is left.

    more: mounts, beside those of the options, as mounts.asked has them.  trusts_cache: as of a mount's Request.
    is_volatile: nobody needs its files after a crash of the machine, so fsync(2) in it costs nothing.
    when_held: called before its first file is made, when there is only its mark of life.
    """
    if not options.words or not options.words[0]:
        raise UsageError("IMAGE is missing", hint="crun run [FLAG]... IMAGE [COMMAND [ARGUMENT]...]")
    _check(options)
    root = paths.chosen_store(options.value("store"), options.value("scope"))
    found = _image(root, options)
    config = spec.section(found.config, "config") if "config" in found.config else found.config
    asked = _asked(options, config, is_foreground=is_foreground)
    asked["mounts"] += more or []
    asked |= {"trusts_cache": trusts_cache, "is_volatile": is_volatile}
    if is_volatile:
        asked["builder"] = os.getppid(), containers.start_time(os.getppid())
    asked |= {"digest": found.digest.hex(), "store": root}
    identity = os.urandom(32).hex()
    try:
        _check_state()
        lock = alive.hold(identity, is_new=True)
        container = Container(identity, asked, -1 if lock is None else lock)
        try:
            if when_held:
                when_held(container)
            _write(container, options, is_durable=not (options.has("rm") or is_volatile))
        except BaseException:
            discard(container)
            raise
    except OSError as error:
        raise os_error(f"cannot make a container in {quote(containers.root())}", error) from error
    containers.event(container, "create")
    return container


def _write(container: Container, options: Options, *, is_durable: bool) -> None:
    """Its files, name and volumes.  is_durable: what is acknowledged outlives a crash of the machine."""
    os.mkdir(container.directory, 0o700)
    for name, mode in (("rootfs", 0o700), ("upper", 0o755), ("work", 0o700)):
        os.mkdir(container.path(name), mode)
    _write_cidfile(options.value("cidfile"), container.id)
    _make_outcome(container.asked["outcome"])
    container.asked["name"] = containers.take_name(options.value("name"), container.id)
    for one in container.asked["mounts"]:
        if one["type"] == "volume":
            one["anonymous"] = not one["name"]
            one["name"] = one["name"] or os.urandom(32).hex()
    container.save(is_durable=is_durable)
    # Only now: who cleans up after us knows by container.json which are to go.
    for one in container.asked["mounts"]:
        if one["type"] == "volume":
            volumes.create(one["name"], one.get("labels"), is_anonymous=one["anonymous"])
    if is_durable:
        atomic.fsync_directory(containers.root())
        atomic.fsync_directory(os.path.join(paths.state(), "names"))


def _write_cidfile(path: str | None, identity: str) -> None:
    if path is None:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise CafsError(f"container id file {quote(path)} is there already", hint="remove it, or name another") from None
    except OSError as error:
        raise os_error(f"cannot write container id file {quote(path)}", error) from error
    try:
        atomic.write_all(fd, identity.encode())
    finally:
        os.close(fd)


def _make_outcome(path: str) -> None:
    """Empty, until it has ended."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)) if path else None
    except OSError as error:
        raise os_error(f"cannot write {quote(path)}", error) from error


def discard(container: Container) -> None:
    """Remove all there is of a container that does not run: files, name, anonymous volumes, mark of life."""
    from runner.cleanup import remove_directory

    for one in container.asked.get("mounts", []):  # first: only container.json says which they are
        if one.get("anonymous"):
            remove_directory(os.path.join(volumes.root(), one["name"]))
    remove_directory(container.directory)
    containers.drop_name(container.asked.get("name"), container.id)
    alive.forget(container.id)
    if container.lock >= 0:
        os.close(container.lock)
        container.lock = -1


def _check_state() -> None:
    paths.make_private(containers.root())
    if mountinfo.fstype(containers.root()) == "overlay":
        raise UnsupportedError(
            f"{quote(paths.state())} is on overlayfs, which cannot hold a writable layer",
            hint="set CAFS_STATE to a directory on another file system",
        )


def _image(root: str, options: Options) -> Image:
    name, when = options.words[0], options.value("pull") or "missing"
    if when not in ("missing", "never", "always"):
        raise UsageError(f"--pull {quote(when)}", hint="missing, never or always")
    if not name.startswith("docker://"):
        if when == "always":
            raise UsageError(f"--pull always: image {quote(name)} is of the store", hint=f"crun run docker://{name}")
        return image.resolve(Store(root), name)
    from runner import pull

    return pull.get(root, name, when)


def _check(options: Options) -> None:
    """What can be seen to be wrong before anything is made.  Raises UsageError, CafsError."""
    network = containers.network_of(options)
    _check_together(options, network)
    if containers.is_bridge(network):
        if linux.in_user_namespace():
            raise UnsupportedError(f"network {quote(network)} needs root", hint="--network none, or host")
        from runner import networks

        networks.find(network)
    elif options.all("publish") or options.has("publish-all"):
        if not options.value("network"):
            raise UsageError(f"-p needs a network of its own, not {network}", hint="without root there is none")
        sys.stderr.write(f"crun: warning: -p is without effect with --network {network}\n")
    if (options.value("ipc") or "private") not in ("private", "host", "shareable", "none"):
        _check_other(options, "ipc")
    if options.value("userns") not in (None, "", "host"):
        from runner import idmapping

        idmapping.check(options)
    for flag in ("pid", "uts"):
        if options.value(flag) not in (None, "", "host"):
            _check_other(options, flag)
    if network.startswith("container:"):
        _check_other(options, "network")
    cgroups.resources(options)
    cgroups.path_for(options, "x")
    if options.value("cgroup-parent") and linux.in_user_namespace():
        raise UnsupportedError("cannot set --cgroup-parent without root")
    cgroups.is_private(options)
    platform = options.value("platform")
    if platform is not None:
        from cafs import oci

        wanted, here = oci.parse_platform(platform), oci.host_platform()
        is_known = wanted.variant in _VARIANTS.get(wanted.architecture, ("", here.variant))
        if (wanted.os, wanted.architecture) != (here.os, here.architecture) or not is_known:
            raise UsageError(f"platform {quote(platform)} is not this host's", hint="nothing is emulated")
    driver = options.value("log-driver")
    if driver is not None and driver not in _DRIVERS:
        raise UsageError(f"unknown log driver {quote(driver)}", hint="json-file or none")


def _check_together(options: Options, network: str) -> None:
    """What docker refuses, too: flags that would mean nothing beside another.  Raises UsageError."""
    if len(options.all("network")) > 1:
        raise UsageError("--network is given twice", hint="a container is on one network")
    without = {
        f"--network {network}": _OF_A_NETWORK if network.startswith("container:") else (),
        f"--uts {options.value('uts')}": ("hostname",) if options.value("uts") else (),
        "--no-healthcheck": _OF_A_CHECK if options.has("no-healthcheck") else (),
    }
    for other, flags in without.items():
        if given := [flag for flag in flags if options.has(flag)]:
            raise UsageError(f"--{given[0]} means nothing with {other}")


def _check_other(options: Options, flag: str) -> None:
    kind, _, name = str(options.value(flag)).partition(":")
    if kind != "container" or not name:
        raise UsageError(f"--{flag} is host or container:NAME, not {quote(str(options.value(flag)))}")
    options.flags[flag] = [f"container:{containers.find(name).id}"]  # whatever it is called when this one starts


def _asked(options: Options, config: dict[str, Any], *, is_foreground: bool) -> dict[str, Any]:
    return {
        "image": options.words[0],
        "created_ns": time.time_ns(),
        "flags": {name: values for name, values in options.flags.items() if name not in ("env", "env-file")},
        "arguments": spec.command_line(options, config),
        "command": options.words[1:],
        "env": spec.environment(options, config),
        "cwd": spec.check_cwd(options.value("workdir") or spec.text(config, "WorkingDir") or "/"),
        "user": spec.text(config, "User") if options.value("user") is None else options.value("user"),
        "labels": spec.labels(options, config),
        "mounts": mounts.asked(options, config),
        "foreground": is_foreground,
        "outcome": os.path.realpath(options.value("outcome") or "") if options.value("outcome") else "",
        "ports": _ports(options, config),
        "restart": _restart(options, is_foreground=is_foreground),
        "stop_signal": containers.signal_number(options.value("stop-signal") or spec.text(config, "StopSignal") or "TERM"),
        "stop_timeout_s": _seconds(options, "stop-timeout", _STOP_TIMEOUT_S),
        "timeout_s": _seconds(options, "timeout", 0),
        "log": _log(options),
        "health": _health(options, config),
    }


def _ports(options: Options, config: dict[str, Any]) -> list[Asked]:
    """Those of -p and, with -P, those that are exposed and not among them."""
    exposed = [*(spec.section(config, "ExposedPorts") if options.has("publish-all") else ()), *options.all("expose")]
    if not exposed and not options.all("publish"):
        return []
    from runner import ports

    found = ports.parse_ports(options.all("publish"))
    taken = {(kind, inner) for kind, _, _, inner in found}
    for text in exposed:
        if ":" in text:
            raise UsageError(f"exposed port {quote(text)} is not PORT[/tcp|udp]")
        for one in ports.parse_ports([text]):
            if options.has("publish-all") and (one[0], one[3]) not in taken:
                found.append(one)
                taken.add((one[0], one[3]))
    return found


def _seconds(options: Options, flag: str, default: int) -> int:
    text = options.value(flag)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"--{flag} is a number of seconds, not {quote(text)}")
    return int(text)


def _restart(options: Options, *, is_foreground: bool) -> dict[str, Any]:
    """policy, and how often at most (0: no limit)."""
    policy, colon, most = (options.value("restart") or "no").partition(":")
    if policy not in _POLICIES or (colon and (policy != "on-failure" or not most.isdigit())):
        raise UsageError(f"unknown restart policy {quote(options.value('restart') or '')}", hint="no, on-failure[:N], always")
    if policy != "no" and options.has("rm"):
        raise UsageError("--restart and --rm go not together")
    if policy != "no" and is_foreground:
        raise UsageError("--restart needs -d: what runs in the foreground ends with its crun")
    return {"policy": policy, "most": int(most or 0)}


def _log(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": "none" if options.value("log-driver") == "none" else "json-file"}
    found |= {"max_size": _LOG_SIZE, "max_files": _LOG_FILES}
    for text in options.all("log-opt"):
        name, _, value = text.partition("=")
        if name == "max-size":
            found["max_size"] = max(cgroups.size(value), 4096)
        elif name == "max-file" and value.isdigit() and 0 < int(value) <= 100:
            found["max_files"] = int(value)
        else:
            raise UsageError(f"unknown log option {quote(text)}", hint="max-size=10m, max-file=3")
    return found


def _health(options: Options, config: dict[str, Any]) -> dict[str, Any] | None:
    """test (arguments), interval_s, timeout_s, retries, start_period_s; None if there is no check."""
    given = spec.section(config, "Healthcheck")
    test = given.get("Test") or []
    command = options.value("health-cmd")
    for flag in ("health-interval", "health-timeout", "health-start-period"):
        duration(options.value(flag) or "0")
    if options.has("no-healthcheck") or command == "none":
        return None
    if command:
        test = ["CMD-SHELL", command]
    is_words = isinstance(test, list) and all(isinstance(word, str) for word in test)
    if not is_words or test[:1] not in (["CMD"], ["CMD-SHELL"]):
        if alone := [flag for flag in _OF_A_CHECK if options.value(flag)]:
            raise UsageError(f"--{alone[0]}: there is no check", hint="--health-cmd")
        return None
    arguments = ["/bin/sh", "-c", *test[1:2]] if test[0] == "CMD-SHELL" else test[1:]

    def seconds(flag: str, key: str, default: float) -> float:
        text = options.value(flag)
        if text is not None:
            return duration(text) or default  # docker's 0 means its default
        value = given.get(key) or 0
        return value / 1e9 if isinstance(value, int) and value > 0 else default

    retries, tries = options.value("health-retries") or "0", given.get("Retries")
    if not retries.isdigit():
        raise UsageError(f"--health-retries is a number, not {quote(retries)}")
    return {
        "test": arguments,
        "interval_s": max(seconds("health-interval", "Interval", 30.0), 0.05),
        "timeout_s": seconds("health-timeout", "Timeout", 30.0),
        "start_period_s": seconds("health-start-period", "StartPeriod", 0.0),
        "retries": int(retries) or (tries if isinstance(tries, int) and tries > 0 else 3),
    }


def duration(text: str) -> float:
    """Seconds of 1m30s, 500ms, 2h, 10.  Raises UsageError."""
    import re

    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"{quote(text)} is not a time", hint="1m30s, 500ms")
    return float(sum(float(number) * units[unit] for number, unit in parts))
