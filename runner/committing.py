"""A container's files as an image: crun commit."""

from __future__ import annotations

import os
import sys
import time

from cafs import commit, image
from cafs.errors import CafsError, UsageError
from cafs.refs import split_ref
from cafs.store import Store
from runner import cgroups, containers, spec, stubs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container

    Change = Callable[[dict[str, Any], list[str]], dict[str, Any]]


def run(options: Options, change: Change) -> int:
    """crun commit CONTAINER [REF]: print the image's digest.  change: applies --change to a configuration."""
    if len(options.words) > 2:
        raise UsageError("crun commit takes a container and a name for the image", hint="crun commit --help")
    ref = options.words[1] if options.words[1:] else None
    if ref is not None:
        split_ref(ref)
    container = containers.find(options.words[0])
    store = Store(container.asked["store"])
    below = image.get(store, bytes.fromhex(container.asked["digest"]))
    config = _config(container, below.config, options)
    config["config"] = change(config["config"], options.all("change"))
    paused = options.value("pause") != "false" and _freeze(container)
    try:
        made = commit.commit(store, below, container.path("upper"), config, ref, map(os.fsencode, stubs.noted(container)))
    finally:
        if paused:
            cgroups.freeze(container, is_on=False)
    containers.event(container, "commit")
    sys.stdout.write(made.digest.hex() + "\n")
    return 0


def _freeze(container: Container) -> bool:
    """Let it stand still while its files are read, if it runs."""
    if container.status() != containers.RUNNING:
        return False
    try:
        cgroups.freeze(container, is_on=True)
    except CafsError as error:
        error.hint = "--pause=false, or stop it first"
        raise
    return True


def _config(container: Container, below: dict[str, Any], options: Options) -> dict[str, Any]:
    """The image's own, with what the container was made with in its place, as docker has it."""
    config = dict(spec.section(below, "config"))
    asked = container.asked
    config["Env"] = [f"{name}={value}" for name, value in asked["env"].items()]
    config |= {"WorkingDir": asked["cwd"], "User": asked["user"], "Labels": asked["labels"]}
    entrypoint = container.value("entrypoint")
    if entrypoint is not None:
        config |= {"Entrypoint": [entrypoint] if entrypoint else [], "Cmd": []}
    if asked["command"]:
        config["Cmd"] = asked["command"]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    history = {"created": now, "created_by": "crun commit", "comment": options.value("message") or ""}
    found = {**below, "config": {name: value for name, value in config.items() if value}, "created": now}
    found["history"] = [*(below.get("history") or []), {name: value for name, value in history.items() if value}]
    return found | ({"author": options.value("author")} if options.value("author") else {})
