"""crun commit: a container's files, running or not, as an image that runs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from cafs import image as images
from cafs.store import Store
from tests.conftest import BIN
from tests.test_containers import cr, ok

pytestmark = [pytest.mark.needs("root", "fuse", "runc", "busybox"), pytest.mark.usefixtures("image")]
BASE = "b:1"


def diff(one: str, other: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "cafs-index", "diff", one, other], capture_output=True, text=True, check=False)


def test_what_a_container_has_changed_becomes_a_layer_and_nothing_else() -> None:
    ok("run", "--name", "c1", BASE, "sh", "-c", "echo new > /new; rm /bin/seq; mkdir -p /made/below")
    digest = ok("commit", "c1", "made:1").strip()
    listed = diff(BASE, "made:1").stdout.splitlines()
    changed = {line.split(" ")[-1] for line in listed[2:]}
    assert changed == {"/", "/new", "/bin", "/bin/seq", "/made", "/made/below"}
    assert ok("run", "--rm", "made:1", "cat", "/new") == "new\n"
    assert cr("run", "--rm", digest, "seq", "3").returncode == 127
    ok("rm", "c1")


def test_nothing_but_mount_points_made_leaves_the_tree_as_it_was() -> None:
    for number in range(2):
        ok("run", "--name", "c2", "-v", "/tmp:/mnt/deep/er", "-v", "data:/vol", BASE, "true")
        made = ok("commit", "c2").strip()
        assert diff(BASE, made).returncode == 0, number
        ok("rm", "-v", "c2")
    ok("volume", "rm", "data")


def test_a_running_container_stands_still_while_it_is_read_and_goes_on() -> None:
    writing = "echo 1 > /a; until test -f /end; do echo 2 > /b; sleep 0.01; done; touch /ended; exec sleep 1000"
    ok("run", "-d", "--name", "c3", BASE, "sh", "-c", writing)
    ok("exec", "c3", "sh", "-c", "until test -f /b; do sleep 0.01; done")
    ok("commit", "c3", "made:3")
    ok("exec", "c3", "sh", "-c", "touch /end; until test -f /ended; do sleep 0.01; done")
    ok("commit", "--pause=false", "c3", "made:4")
    assert json.loads(ok("inspect", "c3"))["State"]["Status"] == "running"
    assert ok("run", "--rm", "made:3", "cat", "/a", "/b") in ("1\n2\n", "1\n")
    ok("rm", "-f", "c3")


def test_the_image_has_what_the_container_was_made_with() -> None:
    flags = ["-e", "A=1", "-w", "/bin", "-u", "7", "-l", "k=v", "--entrypoint", "echo"]
    ok("run", "--name", "c4", *flags, BASE, "said")
    ok("commit", "-a", "somebody", "-m", "why", "c4", "made:5")
    found = _config("made:5")
    config = found["config"]
    assert config["Entrypoint"] == ["echo"] and config["Cmd"] == ["said"] and config["WorkingDir"] == "/bin"
    assert config["User"] == "7" and config["Labels"] == {"k": "v"} and "A=1" in config["Env"]
    assert found["author"] == "somebody" and found["history"][-1]["comment"] == "why"
    assert ok("run", "--rm", "made:5") == "said\n"
    ok("rm", "c4")


def _config(ref: str) -> dict[str, dict[str, object]]:
    return image_of(ref).config


def image_of(ref: str) -> images.Image:
    return images.resolve(Store(os.environ["CAFS_STORE"]), ref)


def test_layers_are_laid_over_layers_and_wrong_names_are_refused_first() -> None:
    last = BASE
    for number in range(3):
        ok("run", "--name", "c5", last, "sh", "-c", f"echo {number} > /n{number}; rm -f /n{number - 1}")
        last = ok("commit", "c5", f"made:{number}").strip()
        ok("rm", "c5")
    assert ok("run", "--rm", last, "sh", "-c", "cd /; echo n?") == "n2\n"
    assert len(image_of("made:2").layers) == 4
    for words, code in ((["commit"], 2), (["commit", "nobody"], 4), (["commit", "a", "b", "c"], 2)):
        assert cr(*words).returncode == code
    ok("create", "--name", "c6", BASE, "true")
    assert cr("commit", "c6", "NOT A REF").returncode == 2
    ok("commit", "c6")
    ok("rm", "c6")


def test_instructions_change_the_configuration() -> None:
    ok("create", "--name", "c7", BASE, "true")
    changes = ['CMD ["echo", "changed"]', "ENV A=1 B=$A", "WORKDIR /tmp", "EXPOSE 80", "LABEL l=m", "USER 7"]
    ok("commit", *(word for one in changes for word in ("-c", one)), "c7", "made:7")
    config = _config("made:7")["config"]
    assert config["Cmd"] == ["echo", "changed"] and config["Env"][-2:] == ["A=1", "B="]
    assert (config["WorkingDir"], config["ExposedPorts"], config["Labels"], config["User"]) == (
        "/tmp",
        {"80/tcp": {}},
        {"l": "m"},
        "7",
    )
    for wrong in ("RUN true", "ENV A", "NONSENSE", "EXPOSE x"):
        done = cr("commit", "-c", wrong, "c7")
        assert done.returncode in (1, 2) and "--change" in done.stderr and "Traceback" not in done.stderr
    ok("rm", "c7")
