"""Images of others in and out: skopeo and umoci make them, read them, and say whether they are right."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cafs import oci
from cafs.errors import NotFound
from cafs.export import oci_config
from cafs.image import Image
from tests.conftest import BIN, Run
from tests.test_mount import make_everything
from tests.test_tar import DIR, LNK, REG, SYM, archive
from tests.waiting import SLOW, wait_until

pytestmark = pytest.mark.needs("root", "skopeo", "umoci")


def umoci(*arguments: object) -> None:
    subprocess.run(["umoci", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the images v1, v2, v3 of one, two and three layers; the tree of v3 is in rootfs."""
    base = tmp_path_factory.mktemp("image")
    layout, bundle = base / "layout", base / "bundle"
    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:v1")

    def step(old: str, new: str) -> Iterator[Path]:
        umoci("unpack", "--image", f"{layout}:{old}", bundle)
        yield bundle / "rootfs"
        umoci("repack", "--image", f"{layout}:{new}", bundle)
        shutil.rmtree(bundle)

    for root in step("v1", "v1"):
        make_everything(root / "all", many=200)
        (root / "all" / "sparse").unlink()  # umoci would write all of it
        (root / "all" / "socket").unlink()
        os.removexattr(root / "all" / "plain", "user.key,=")  # Go's archive/tar cannot write it
        os.setxattr(root / "all" / "plain", "user.key", b"binary\xff\n")
        for name in ("gone", "replaced-by-file", "emptied"):
            (root / name / "deep").mkdir(parents=True)
            (root / name / "deep" / "file").write_text(name)
        (root / "file").write_text("to be a directory")
        (root / "one").write_text("one")
        os.link(root / "one", root / "two")
    for root in step("v1", "v2"):
        shutil.rmtree(root / "gone")
        shutil.rmtree(root / "replaced-by-file")
        (root / "replaced-by-file").write_text("now a file")
        (root / "file").unlink()
        (root / "file").mkdir()
        (root / "file" / "inside").write_text("x")
        (root / "all" / "plain").chmod(0o600)
        os.chown(root / "all" / "sub", 5, 6)
    for root in step("v2", "v3"):
        shutil.rmtree(root / "emptied")
        (root / "emptied").mkdir()
        (root / "emptied" / "new").write_text("new")
        os.link(root / "one", root / "three")
    umoci("config", "--image", f"{layout}:v3", "--config.cmd", "/bin/sh", "--config.env", "A=1", "--config.user", "7")
    umoci("unpack", "--image", f"{layout}:v3", base / "final")
    shutil.move(base / "final" / "rootfs", base / "rootfs")
    return base


def create(cmd: Run, source: str, *options: str, **more: object) -> str:
    done = cmd("cafs-index", "create", source, *options, **more)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.decode().strip())


def test_an_image_has_the_tree_that_umoci_unpacks_from_every_kind_of_source(
    home: Path, layout: Path, tmp_path: Path, cmd: Run
) -> None:
    digest = create(cmd, f"oci:{layout}/layout:v3", "-t", "v:3")
    same = cmd("cafs-index", "verify", "v:3", layout / "rootfs")
    assert (same.returncode, same.stdout) == (0, b""), same.stdout
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}/layout:v3", f"docker-archive:{tmp_path}/d.tar:app:3"], check=True)
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}/layout:v3", f"oci-archive:{tmp_path}/o.tar:v3"], check=True)
    assert create(cmd, f"docker-archive:{tmp_path}/d.tar") == digest
    assert create(cmd, f"docker-archive:{tmp_path}/d.tar:app:3") == digest
    assert create(cmd, f"oci-archive:{tmp_path}/o.tar:v3", "-j", "1") == digest
    with open(tmp_path / "d.tar", "rb") as file:
        packed = subprocess.Popen(["gzip", "-1"], stdin=file, stdout=subprocess.PIPE)
        assert create(cmd, "docker-archive:-", stdin=packed.stdout) == digest
        assert packed.wait() == 0
    config = json.loads(next((tmp_path / "store" / "meta").glob(f"{digest[:2]}/{digest[2:]}.image")).read_text())["config"]
    assert config["config"] == {"Cmd": ["/bin/sh"], "Env": ["A=1"], "User": "7"} and config["architecture"] == "amd64"


def test_what_is_exported_is_read_back_as_the_same_image_and_by_others(
    home: Path, layout: Path, tmp_path: Path, cmd: Run
) -> None:
    digest = create(cmd, f"oci:{layout}/layout:v3", "-t", "v:3")
    for destination in (
        f"oci:{tmp_path}/out:x",
        f"oci-archive:{tmp_path}/out.tar:x",
        f"docker-archive:{tmp_path}/dock.tar:app:1",
    ):
        done = cmd("cafs-index", "export", "v:3", destination)
        assert done.returncode == 0, done.stderr
        assert create(cmd, destination) == digest
        seen = json.loads(subprocess.run(["skopeo", "inspect", destination], check=True, capture_output=True).stdout)
        assert (seen["Env"], seen["Architecture"], len(seen["Layers"])) == (["A=1"], "amd64", 1)
    umoci("unpack", "--image", f"{tmp_path}/out:x", tmp_path / "bundle")
    assert cmd("cafs-index", "verify", "v:3", tmp_path / "bundle" / "rootfs").stdout == b""
    assert cmd("cafs-index", "export", "v:3", tmp_path / "tree").returncode == 0
    assert cmd("cafs-index", "verify", "v:3", tmp_path / "tree").stdout == b""
    assert cmd("cafs-index", "export", "v:3", tmp_path / "tree").returncode == 1, "a directory that is not empty"
    assert cmd("cafs-index", "export", "v:3", tmp_path / "t:1.tar").returncode == 0
    subprocess.run(["tar", "--diff", "-f", tmp_path / "t:1.tar", "-C", layout / "rootfs"], check=True, capture_output=True)
    piped = cmd("cafs-index", "export", "v:3", "-")
    assert piped.stdout == (tmp_path / "t:1.tar").read_bytes()
    assert (
        create(cmd, "-", "-o", "-", input=piped.stdout)
        == cmd("cafs-index", "create", layout / "rootfs", "-o", "-").stdout.decode().strip()
    )


@pytest.mark.parametrize(
    ("asked", "there", "chosen"),
    [
        ("linux/amd64", "linux/amd64 linux/amd64/v3", 0),
        ("linux/amd64/v3", "linux/amd64 linux/amd64/v3 linux/amd64/v2", 1),
        ("linux/amd64/v4", "linux/amd64 linux/amd64/v2 linux/amd64/v3", 2),
        ("linux/amd64", "linux/amd64/v2 linux/386", None),
        ("amd64", "linux/arm64 linux/amd64", 1),
        ("linux/x86_64", "linux/arm64 linux/amd64", 1),
        ("linux/amd64/v1", "linux/amd64", 0),
        ("aarch64", "linux/arm64/v8 linux/amd64", 0),
        ("linux/arm64/v9", "linux/arm/v7 linux/arm64", 1),
        ("linux/arm/v7", "linux/arm/v5 linux/arm/v6 linux/arm64", 1),
        ("linux/arm", "linux/arm/v6 linux/arm/v7", 1),
        ("linux/armhf", "linux/arm/v6 linux/arm/v7", 1),
        ("linux/arm/v6", "linux/arm/v7", None),
    ],
)
def test_platforms_are_chosen_as_containerd_does(asked: str, there: str, chosen: int | None) -> None:
    words = [dict(zip(("os", "architecture", "variant"), one.split("/"), strict=False)) for one in there.split()]
    found = [oci.Descriptor(oci.MANIFEST_TYPES[0], f"sha256:{at:064x}", 1, {}, one) for at, one in enumerate(words)]
    if chosen is None:
        with pytest.raises(NotFound, match="no image for linux/"):
            oci.choose(found, None, oci.parse_platform(asked), "x")
    else:
        assert oci.choose(found, None, oci.parse_platform(asked), "x") is found[chosen]


def test_as_many_steps_of_the_history_have_a_layer_as_there_are_layers() -> None:
    """Docker: too many non-empty layers in History section."""
    for steps, layers, shown in (
        ("", 2, "++"),
        ("L", 1, "L"),
        ("LEE", 1, "LEE"),
        ("ELLEE", 1, "EELEE"),
        ("EEE", 1, "EEL"),
        ("EELE", 2, "ELLE"),
        ("LE", 3, "++LE"),
    ):
        history = [{"created_by": "x"} | ({"empty_layer": True} if one == "E" else {}) for one in steps]
        config = json.loads(oci_config(Image((b"",) * layers, {"config": {}, "history": history}), ["00"] * layers))
        found = ["E" if one.get("empty_layer") else "L" if one["created_by"] == "x" else "+" for one in config["history"]]
        assert "".join(found) == shown, steps


def test_exports_are_the_same_bytes_whatever_the_clock_and_the_number_of_threads(
    home: Path, layout: Path, tmp_path: Path, cmd: Run
) -> None:
    create(cmd, f"{layout}/rootfs", "-t", "plain:1")
    for kind in ("oci-archive", "docker-archive"):
        sums = set()
        for number, jobs in enumerate(("1", "7")):
            out = tmp_path / f"{kind}-{number}"
            assert cmd("cafs-index", "export", "-j", jobs, "plain:1", f"{kind}:{out}:x:1").returncode == 0
            sums.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert len(sums) == 1
        assert not list(tmp_path.glob(".cafs-export-*"))
    dated = tmp_path / "dated"
    done = cmd("cafs-index", "export", "plain:1", f"oci:{dated}:x", env=os.environ | {"SOURCE_DATE_EPOCH": "1000000000"})
    assert done.returncode == 0
    seen = json.loads(subprocess.run(["skopeo", "inspect", f"oci:{dated}:x"], check=True, capture_output=True).stdout)
    assert seen["Created"] == "2001-09-09T01:46:40Z"
    bad = cmd("cafs-index", "export", "plain:1", f"oci:{dated}:x", env=os.environ | {"SOURCE_DATE_EPOCH": "today"})
    assert bad.returncode == 2 and b"SOURCE_DATE_EPOCH" in bad.stderr


def test_a_sparse_file_is_exported_sparse(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree").mkdir()
    with open(tmp_path / "tree" / "sparse", "wb") as file:
        file.truncate(1 << 30)
        for at in (0, 300 << 20, (1 << 30) - 5):
            file.seek(at)
            file.write(b"data!")
    create(cmd, f"{tmp_path}/tree", "-t", "s:1")
    assert cmd("cafs-index", "export", "s:1", tmp_path / "t.tar").returncode == 0
    assert (tmp_path / "t.tar").stat().st_size < 20 << 20
    subprocess.run(["tar", "--diff", "-f", tmp_path / "t.tar", "-C", tmp_path / "tree"], check=True, capture_output=True)
    assert cmd("cafs-index", "export", "s:1", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "sparse").stat().st_blocks * 512 < 20 << 20
    assert cmd("cafs-index", "verify", "s:1", tmp_path / "out").stdout == b""


def save(path: Path, layers: list[bytes], *, diff_ids: list[str] | None = None, names: list[str] | None = None) -> None:
    """An archive as of `docker save`, the manifest last, as docker writes it."""
    ids = diff_ids or ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": ids}}
    ).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    names = names or [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": config_name, "RepoTags": ["app:1"], "Layers": names}]).encode()
    with tarfile.open(path, "w") as out:
        for name, data in [*dict(zip(names, layers, strict=True)).items(), (config_name, config), ("manifest.json", manifest)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def paths(cmd: Run, path: Path) -> list[str]:
    create(cmd, f"docker-archive:{path}", "-t", "x:1")
    return cmd("cafs-index", "ls", "x:1").stdout.decode().split()


def test_whiteouts_are_about_lower_layers_wherever_they_stand(home: Path, tmp_path: Path, cmd: Run) -> None:
    base = archive(("d/a", REG, "a"), ("d/b", REG, "b"), ("e/x", REG, "x"), ("l", SYM, "d"))
    opaque, new = ("d/.wh..wh..opq", REG, ""), ("d/new", REG, "new")
    for members in ((opaque, new), (new, opaque)):
        save(tmp_path / "i.tar", [base, archive(*members)])
        assert paths(cmd, tmp_path / "i.tar") == ["/", "/d", "/d/new", "/e", "/e/x", "/l"]
    again = [("d/.wh.a", REG, ""), ("d/a", REG, "again"), ("e/.wh.nothing", REG, ""), ("l/.wh.b", REG, "")]
    for order in (again, again[::-1]):
        save(tmp_path / "i.tar", [base, archive(*order)])
        assert paths(cmd, tmp_path / "i.tar") == ["/", "/d", "/d/a", "/e", "/e/x", "/l"]
    save(tmp_path / "i.tar", [base, archive((".wh.d", REG, ""), (".wh..wh.aufs", REG, "")), archive(("d", REG, "file"))])
    assert paths(cmd, tmp_path / "i.tar") == ["/", "/d", "/e", "/e/x", "/l"]


def test_a_hard_link_to_a_lower_layer_is_one_inode_with_it(home: Path, tmp_path: Path, cmd: Run) -> None:
    save(tmp_path / "i.tar", [archive(("a", REG, "a")), archive(("late", LNK, "later"), ("b", LNK, "a"), ("later", REG, "z"))])
    create(cmd, f"docker-archive:{tmp_path}/i.tar", "-t", "x:1")
    lines = cmd("cafs-index", "ls", "-l", "x:1").stdout.decode().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2", "2", "2", "2"]


def test_a_layer_that_is_listed_twice_is_laid_twice(home: Path, tmp_path: Path, cmd: Run) -> None:
    layer, other = archive(("d", DIR, ""), ("d/x", REG, "x")), archive(("d/y", REG, "y"))
    removal = archive((".wh.d", REG, ""))
    save(tmp_path / "i.tar", [layer, other, removal, layer], names=["a", "b", "c", "a"])
    assert paths(cmd, tmp_path / "i.tar") == ["/", "/d", "/d/x"]


def test_a_layer_that_is_not_what_its_digest_says_is_refused_and_nothing_is_named(home: Path, tmp_path: Path, cmd: Run) -> None:
    layers = [archive(("a", REG, "a")), archive(("b", REG, "b"))]
    ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    for wrong, said in (
        (ids[::-1], "is not what its digest says"),
        (ids[:1], "1 diff_ids for 2 layers"),
        (["x", "y"], "no list of diff_ids"),
    ):
        save(tmp_path / "i.tar", layers, diff_ids=wrong)
        done = cmd("cafs-index", "create", f"docker-archive:{tmp_path}/i.tar", "-t", "x:1")
        assert done.returncode == 5 and said in done.stderr.decode(), done.stderr
        assert cmd("cafs-store", "ls").stdout == b""


@pytest.mark.parametrize("blob", ["manifest", "config", "layer"])
def test_a_changed_blob_of_a_layout_is_refused(home: Path, layout: Path, tmp_path: Path, cmd: Run, blob: str) -> None:
    shutil.copytree(layout / "layout", tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    digest = next(m["digest"] for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == "v3")
    blobs = tmp_path / "copy" / "blobs" / "sha256"
    manifest = json.loads((blobs / digest[7:]).read_text())
    name = {"manifest": digest, "config": manifest["config"]["digest"], "layer": manifest["layers"][1]["digest"]}[blob][7:]
    (blobs / name).chmod(0o644)
    data = bytearray((blobs / name).read_bytes())
    data[len(data) // 2] ^= 1
    (blobs / name).write_bytes(data)
    done = cmd("cafs-index", "create", f"oci:{tmp_path}/copy:v3", "-t", "x:1")
    assert done.returncode == 5 and b"Traceback" not in done.stderr, done.stderr
    assert cmd("cafs-store", "ls").stdout == b""


def test_an_image_that_is_not_clear_or_not_there_is_said(home: Path, layout: Path, tmp_path: Path, cmd: Run) -> None:
    for source, code, said in (
        (f"oci:{layout}/layout", 5, "name one: v1, v2, v3"),
        (f"oci:{layout}/layout:v9", 4, "has no image 'v9'"),
        (f"oci:{tmp_path}", 4, "has no 'oci-layout'"),
        (f"oci:{tmp_path}/nothing", 4, "No such file"),
        (f"docker-archive:{tmp_path}/nothing", 4, "No such file"),
        ("docker:x", 2, "is not docker://REF"),
        ("oci:", 2, "names nothing"),
    ):
        done = cmd("cafs-index", "create", source)
        assert done.returncode == code and said in done.stderr.decode(), (source, done.stderr)
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    done = cmd("cafs-index", "create", f"docker-archive:{tmp_path}/empty.tar")
    assert done.returncode == 4 and b"has no 'manifest.json'" in done.stderr
    done = cmd("cafs-index", "create", f"oci:{layout}/layout:v3", "--platform", "linux/s390x")
    assert done.returncode == 2 and b"is for linux/amd64" in done.stderr


def test_the_platform_chooses_among_the_images_of_an_index(home: Path, layout: Path, tmp_path: Path, cmd: Run) -> None:
    shutil.copytree(layout / "layout", tmp_path / "many")
    index = json.loads((tmp_path / "many" / "index.json").read_text())
    platforms = {"v1": "arm64", "v2": "amd64"}
    chosen = []
    for one in index["manifests"]:
        name = one.pop("annotations")["org.opencontainers.image.ref.name"]
        if name in platforms:
            chosen.append(one | {"platform": {"os": "linux", "architecture": platforms[name]}})
    (tmp_path / "many" / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": chosen}))
    assert create(cmd, f"oci:{tmp_path}/many") == create(cmd, f"oci:{layout}/layout:v2")
    missing = cmd("cafs-index", "create", f"oci:{tmp_path}/many", "--platform", "linux/riscv64")
    assert missing.returncode == 4 and b"no image for linux/riscv64" in missing.stderr


def test_a_link_in_a_layout_does_not_lead_out_of_it(home: Path, layout: Path, tmp_path: Path, cmd: Run) -> None:
    shutil.copytree(layout / "layout", tmp_path / "copy")
    (tmp_path / "secret").write_text('{"imageLayoutVersion": "1.0.0"}')
    (tmp_path / "copy" / "oci-layout").unlink()
    (tmp_path / "copy" / "oci-layout").symlink_to(tmp_path / "secret")
    done = cmd("cafs-index", "create", f"oci:{tmp_path}/copy:v3")
    assert done.returncode == 4 and b"has no 'oci-layout'" in done.stderr


@pytest.mark.needs("root", "skopeo", "docker-registry")
def test_an_image_is_copied_from_a_registry(home: Path, layout: Path, tmp_path: Path, cmd: Run) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/registry\nhttp:\n  addr: 127.0.0.1:{port}\n"
    )
    with subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"], stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 20)
            name = f"docker://127.0.0.1:{port}/app:3"
            subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}/layout:v3", name], check=True)
            assert create(cmd, name) == create(cmd, f"oci:{layout}/layout:v3")
            missing = cmd("cafs-index", "create", f"docker://127.0.0.1:{port}/nothing:1")
            assert missing.returncode == 7 and b"cannot copy 'docker://127.0.0.1" in missing.stderr
            assert b"manifest unknown" in missing.stderr and missing.stderr.count(b"\n") == 1
        finally:
            server.terminate()
    assert not list((tmp_path / "cache").glob("copy-*"))


def test_an_image_of_the_daemon_comes_through_docker_save(home: Path, tmp_path: Path, cmd: Run) -> None:
    """No daemon runs on the test machine: a program called docker stands in, and fails once."""
    save(tmp_path / "i.tar", [archive(("a", REG, "a"))])
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "docker"
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "save -- app:1" ] || {{ echo "No such image: $3" >&2; exit 1; }}\ncat {tmp_path}/i.tar\n'
    )
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert create(cmd, "docker-daemon:app:1", env=environment) == create(cmd, f"docker-archive:{tmp_path}/i.tar")
    failed = cmd("cafs-index", "create", "docker-daemon:app:2", env=environment)
    assert failed.returncode == 7 and b"No such image: app:2" in failed.stderr
    none = cmd("cafs-index", "create", "docker-daemon:app:1", env=os.environ | {"PATH": f"{BIN}:/nonexistent"})
    assert none.returncode == 8 and b"no docker" in none.stderr


def test_a_sparse_file_that_ends_in_a_hole_has_its_size_when_others_extract_it(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree").mkdir()
    for name, data in (("all-hole", b""), ("tail", b"data")):
        with open(tmp_path / "tree" / name, "wb") as file:
            file.write(data)
            file.truncate(21 << 20)
    create(cmd, f"{tmp_path}/tree", "-t", "s:1")
    assert cmd("cafs-index", "export", "s:1", tmp_path / "t.tar").returncode == 0
    for number, program in enumerate(("tar", "bsdtar")):
        out = tmp_path / f"out{number}"
        out.mkdir()
        subprocess.run([program, "xf", tmp_path / "t.tar", "-C", out], check=True)
        differs = cmd("cafs-index", "verify", "--name-only", "s:1", out).stdout
        assert differs in (b"", b"M\t/\n"), program  # bsdtar leaves the date of '.' alone


def test_what_no_layer_can_hold_is_refused_and_links_to_sockets_are_left_out(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".wh.foo").touch()
    (tmp_path / "tree" / "foo").touch()
    create(cmd, f"{tmp_path}/tree", "-t", "w:1")
    done = cmd("cafs-index", "export", "w:1", f"oci:{tmp_path}/out:x")
    assert done.returncode == 8 and b"'/.wh.foo' cannot be in an image's layer" in done.stderr
    assert create(cmd, "-", "-o", "-", input=cmd("cafs-index", "export", "w:1", "-").stdout).count("\n") == 4
    (tmp_path / "tree" / ".wh.foo").unlink()
    os.mknod(tmp_path / "tree" / "s", 0o644 | 0o140000)
    os.link(tmp_path / "tree" / "s", tmp_path / "tree" / "z")
    create(cmd, f"{tmp_path}/tree", "-t", "w:2")
    assert create(cmd, "-", "-o", "-", input=cmd("cafs-index", "export", "w:2", "-").stdout).count("\n") == 3


def test_a_damaged_layer_that_no_image_needs_changes_nothing(home: Path, tmp_path: Path, cmd: Run) -> None:
    good = archive(("f", REG, "x" * (9 << 20)))
    cut = archive(("g", REG, "y" * (30 << 20)))[: 20 << 20]
    save(tmp_path / "clean.tar", [good])
    with tarfile.open(tmp_path / "clean.tar") as source, tarfile.open(tmp_path / "stray.tar", "w") as out:
        info = tarfile.TarInfo("stray/layer.tar")
        info.size = len(cut)
        out.addfile(info, io.BytesIO(cut))
        for member in source:
            out.addfile(member, source.extractfile(member))
    assert create(cmd, f"docker-archive:{tmp_path}/stray.tar") == create(cmd, f"docker-archive:{tmp_path}/clean.tar")


def test_an_archive_with_a_sparse_or_endless_list_of_members_is_refused(home: Path, tmp_path: Path, cmd: Run) -> None:
    sparse = subprocess.run(
        ["sh", "-c", f"cd {tmp_path} && truncate -s 1T hole && tar --sparse -cf - hole"], capture_output=True, check=True
    ).stdout
    done = cmd("cafs-index", "create", "docker-archive:-", input=sparse)
    assert done.returncode == 5 and b"is sparse" in done.stderr
    many = b"".join(bytes(tarfile.TarInfo(f"{n:099}").tobuf()) for n in range(200_000)) + bytes(1024)
    begin = time.monotonic()
    done = cmd("cafs-index", "create", "docker-archive:-", input=many)
    assert done.returncode == 5 and b"too many members" in done.stderr and time.monotonic() - begin < 30 * SLOW


def test_destinations_that_are_none_are_refused(home: Path, layout: Path, tmp_path: Path, cmd: Run) -> None:
    create(cmd, f"oci:{layout}/layout:v3", "-t", "v:3")
    for destination in ("oci:", "oci-archive:", "docker-daemon:x", "docker://x/y"):
        done = cmd("cafs-index", "export", "v:3", destination, cwd=tmp_path)
        assert done.returncode == 2 and b"cannot export to" in done.stderr
    script = f"{BIN}/cafs-index export v:3 docker-archive:/dev/stdout | cat > {tmp_path}/piped"
    subprocess.run(["bash", "-c", script], check=True)
    assert create(cmd, f"docker-archive:{tmp_path}/piped") == create(cmd, f"oci:{layout}/layout:v3")


def test_what_aufs_left_is_no_part_of_the_tree_but_for_links_to_it(home: Path, tmp_path: Path, cmd: Run) -> None:
    base = archive(("dd", DIR, ""), ("dd/x", REG, "x"), ("e", DIR, ""), ("e/y", REG, "y"), ("kept", REG, "k"))
    top = archive(
        (".wh..wh.aufs", REG, ""),
        (".wh..wh.orph", DIR, ""),
        (".wh..wh.orph/z", REG, "z"),
        (".wh..wh.plnk", DIR, ""),
        (".wh..wh.plnk/12.34", REG, "linked"),
        ("one", LNK, ".wh..wh.plnk/12.34"),
        ("two", LNK, ".wh..wh.plnk/12.34"),
        (".wh.dd/", DIR, ""),
        (".wh.dd/inside", REG, ""),
        ("e/.wh..wh..opq", REG, ""),
        ("e/new", REG, "n"),
    )
    save(tmp_path / "i.tar", [base, top])
    create(cmd, f"docker-archive:{tmp_path}/i.tar", "-t", "a:1")
    assert cmd("cafs-index", "ls", "a:1").stdout.split() == [b"/", b"/e", b"/e/new", b"/kept", b"/one", b"/two"]
    assert cmd("cafs-index", "cat", "a:1", "one", "two").stdout == b"linkedlinked"
    assert cmd("cafs-index", "export", "a:1", f"oci:{tmp_path}/o").returncode == 0


def test_a_copy_that_is_told_to_end_leaves_nothing(home: Path, tmp_path: Path) -> None:
    import signal

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "skopeo").write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 3939.{os.getpid()}\n")
    (tmp_path / "bin" / "skopeo").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with subprocess.Popen([BIN / "cafs-index", "create", "docker://x/y"], env=environment) as child:
        wait_until((tmp_path / "begun").exists, 20)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20 * SLOW) == 143
    assert not list((tmp_path / "cache").glob("copy-*"))
    assert subprocess.run(["pgrep", "-f", f"sleep 3939.{os.getpid()}"], capture_output=True, check=False).returncode == 1


def rewrite(layout: Path, algorithm: str, sizes: dict[str, int]) -> None:
    """Name all blobs of a layout with one image by another hash.  sizes: what is added to those that descriptors say."""
    blobs = layout / "blobs"
    (blobs / algorithm).mkdir(exist_ok=True)

    def put(data: bytes, descriptor: dict[str, object], what: str) -> None:
        digest = hashlib.new(algorithm, data).hexdigest()
        (blobs / algorithm / digest).write_bytes(data)
        descriptor |= {"digest": f"{algorithm}:{digest}", "size": len(data) + sizes.get(what, 0)}

    def get(descriptor: dict[str, str]) -> bytes:
        return (blobs / descriptor["digest"].replace(":", "/")).read_bytes()

    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(get(index["manifests"][0]))
    config = json.loads(get(manifest["config"]))
    plain = gzip.decompress(get(manifest["layers"][0]))
    config["rootfs"]["diff_ids"] = [f"{algorithm}:{hashlib.new(algorithm, plain).hexdigest()}"]
    put(get(manifest["layers"][0]), manifest["layers"][0], "layer")
    put(json.dumps(config).encode(), manifest["config"], "config")
    put(json.dumps(manifest).encode(), index["manifests"][0], "manifest")
    (layout / "index.json").write_text(json.dumps(index))


def test_descriptors_may_have_sha512_and_must_have_the_right_size(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a")
    cmd("cafs-index", "create", tmp_path / "tree", "-t", "a:1")
    assert cmd("cafs-index", "export", "a:1", f"oci:{tmp_path}/o").returncode == 0
    rewrite(tmp_path / "o", "sha512", {})
    assert cmd("cafs-index", "create", f"oci:{tmp_path}/o", "-t", "b:1").returncode == 0
    assert cmd("cafs-index", "diff", "a:1", "b:1").stdout == b""
    subprocess.run(["tar", "-C", tmp_path / "o", "-cf", tmp_path / "o.tar", "."], check=True)
    assert cmd("cafs-index", "create", f"oci-archive:{tmp_path}/o.tar").returncode == 0
    for what in ("manifest", "config", "layer"):
        for wrong in (1, -1):
            rewrite(tmp_path / "o", "sha256", {what: wrong})
            done = cmd("cafs-index", "create", f"oci:{tmp_path}/o")
            assert done.returncode == 5 and b"descriptor says" in done.stderr, done.stderr


def test_a_path_of_a_layer_is_found_however_it_is_spelled(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree" / "etc").mkdir(parents=True)
    cmd("cafs-index", "create", tmp_path / "tree", "-t", "a:1")
    (tmp_path / "tree" / "etc" / "new").touch()
    layer = json.loads(cmd("cafs-index", "create", tmp_path / "tree", "--base", "a:1", "-t", "a:2", "--json").stdout)["digest"]
    manifest = json.loads((tmp_path / "store" / "meta" / layer[:2] / f"{layer[2:]}.image").read_text())
    top = manifest["layers"][-1]["index"]
    (tmp_path / "l.idx").write_bytes((tmp_path / "store" / "meta" / top[:2] / f"{top[2:]}.index").read_bytes())
    for path in ("etc/new", "/etc/new", "//etc//new/"):
        done = cmd("cafs-index", "stat", tmp_path / "l.idx", path)
        assert done.returncode == 0 and done.stdout.endswith(b" /etc/new\n"), (path, done.stderr)
