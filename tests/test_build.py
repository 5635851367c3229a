"""cbuild: what Dockerfiles make, what is taken from the cache, and what is refused."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from builder.build import Build
from builder.context import open_context
from builder.lexer import parse
from builder.progress import Progress
from builder.request import Request
from cafs import image as images
from cafs.content import pieces
from cafs.errors import CafsError
from cafs.index import Index
from cafs.store import Store
from cafs.writer import Writer
from tests.buildcases import CASES, Case
from tests.conftest import BIN
from tests.waiting import SLOW

pytestmark = [pytest.mark.needs("root", "fuse", "runc", "busybox"), pytest.mark.usefixtures("image")]
SPEC = re.compile(r"([fdl])([0-7]+)?(?:,([0-9]+):([0-9]+))?(?:=(.*))?", re.DOTALL)


def archive(*members: tuple[str, str, int], link: tuple[str, str] | None = None, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, text, bits in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid, info.gid = len(text), bits, 3, 4
            tar.addfile(info, io.BytesIO(text.encode()))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
    return out.getvalue()


ARCHIVES = {
    "TAR": archive(("in/f", "in", 0o640), link=("l", "in/f")),
    "TURNED": archive(("l/g", "g", 0o644), link=("in", "l")),
    "TGZ": archive(("in/f", "in", 0o640), mode="w:gz"),
    "EVIL": archive(("../../climbed", "evil", 0o644)),
    "ABSOLUTE": archive(("/etc/passwd", "evil", 0o644)),
    "THROUGH": archive(("out/passwd", "evil", 0o644), link=("out", "/etc")),
}


def linked() -> bytes:
    """dst/f, and a as another name of it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("dst/f")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"f"))
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.LNKTYPE, "dst/f"
        tar.addfile(info)
    return out.getvalue()


ARCHIVES["LINKS"] = linked()


def make_context(top: Path, files: dict[str, str], text: str) -> Path:
    top.mkdir(exist_ok=True)
    (top / "Dockerfile").write_bytes(text.encode("utf-8", "surrogateescape"))
    for name, content in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = re.match("([0-7]{3}):", content)
        if content.startswith("->"):
            path.symlink_to(content[2:])
        elif content == "dir":
            path.mkdir()
        elif content.startswith("=") and (top / content[1:]).exists():
            os.link(top / content[1:], path)
        elif content.startswith("mode "):
            path.chmod(int(content[5:], 8))
        elif content in ARCHIVES:
            path.write_bytes(ARCHIVES[content])
        else:
            path.write_text(content[4:] if mode else content)
            path.chmod(int(mode[1], 8) if mode else 0o644)
    return top


def build(top: Path, **wanted: object) -> images.Image:
    return build_all(top, **wanted)[0]


def build_all(top: Path, **wanted: object) -> tuple[images.Image, Progress]:
    progress = Progress()
    with Writer(Store(os.environ["CAFS_STORE"])) as writer:
        dockerfile = parse((top / "Dockerfile").read_bytes())
        context = open_context(str(top), str(top / "Dockerfile"), writer)
        one = Build(writer, dockerfile, context, Request(**wanted), progress)  # type: ignore[arg-type]
        made = one.run()
        one.work.places.save()
    return made, progress


def tree_of(made: images.Image) -> Index:
    return images.load_tree(Store(os.environ["CAFS_STORE"]), made)


def described(index: Index, path: str, spec: str) -> str:
    """What is at a path, with the parts that the spec has."""
    number = index.find(path.encode("utf-8", "surrogateescape"))
    if number is None:
        return ""
    wanted = SPEC.fullmatch(spec)
    assert wanted, spec
    entry = index.entry(index.inode(number))
    found = entry.type.decode().lower()
    found += f"{entry.mode:o}" if wanted[2] else ""
    found += f",{entry.uid}:{entry.gid}" if wanted[3] else ""
    if wanted[5] is not None:
        store = Store(os.environ["CAFS_STORE"])
        content = entry.target if found[0] == "l" else b"".join(pieces(index, number, store).data(zeros=True))
        found += "=" + content.decode()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^A-Za-z0-9]+", "-", case.name))
def test_a_dockerfile_makes_what_buildkit_makes(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: text for name, text in case.files.items()}
    top = make_context(tmp_path / "context", files, case.base + case.text)
    secrets = {}
    for name, value in case.secrets.items():
        (tmp_path / name).write_text(value)
        secrets[name] = ("file", str(tmp_path / name))
    wanted = {"args": case.args, "target": case.target, "allowed": set(case.allowed), "secrets": secrets}
    if case.error:
        with pytest.raises(CafsError) as caught:
            build(top, **wanted)
        assert case.error in str(caught.value)
        assert re.match(r"(Dockerfile:\d+(:\d+)?: |.*\.dockerignore: )", str(caught.value)), caught.value
        return
    made = build(top, **wanted)
    index = tree_of(made)
    for path, spec in case.tree.items():
        assert described(index, path, spec or "f") == spec or (spec == "f" and described(index, path, "f") == "f"), path
    for key, value in case.config.items():
        assert made.config["config"].get(key) == value, key


def test_the_table_is_long_enough_and_its_names_are_different() -> None:
    assert len(CASES) >= 150 and len({case.name for case in CASES}) == len(CASES)


def how(progress: Progress) -> list[str]:
    """Of each step with a layer: made or cached."""
    return ["cached" if row.is_cached else "made" for row in progress.rows]


STEPS = "FROM b:1\nARG V=1\nCOPY a /a\nRUN echo $V > /v\nWORKDIR /w\nCOPY sub /sub\nRUN cat /a /sub/c > /all\n"


def test_what_was_made_before_is_not_made_again_and_the_digest_is_the_same(tmp_path: Path) -> None:
    top = make_context(tmp_path / "one", {"a": "A", "sub/c": "C"}, STEPS)
    first, progress = build_all(top)
    assert how(progress) == ["made"] * 5
    again, progress = build_all(top)
    assert how(progress) == ["cached"] * 5 and again.digest == first.digest
    elsewhere = make_context(tmp_path / "two", {"a": "A", "sub/c": "C", "unused": "x"}, STEPS)
    os.utime(elsewhere / "a", (1, 1))
    other, progress = build_all(elsewhere)
    assert how(progress) == ["cached"] * 5 and other.digest == first.digest, "times, places and other files are no reason"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("content", ["cached", "cached", "cached", "made", "made"]),
        ("mode", ["cached", "cached", "cached", "made", "made"]),
        ("first", ["made"] * 5),
        ("arg", ["cached", "made", "made", "made", "made"]),
        ("no cache", ["made"] * 5),
        ("no cache of a stage", ["made"] * 5),
    ],
)
def test_what_has_changed_is_made_again_and_what_comes_after_it(tmp_path: Path, change: str, wanted: list[str]) -> None:
    tag = change.replace(" ", "-")
    text = STEPS.replace("FROM b:1", f"FROM b:1 AS one\nENV TAG={tag}").replace("COPY a", "COPY --chown=0 a")
    top = make_context(tmp_path / "one", {"a": f"A {change}", "sub/c": "C"}, text)
    build(top)
    options: dict[str, object] = {}
    if change == "content":
        (top / "sub" / "c").write_text("changed")
    elif change == "mode":
        (top / "sub" / "c").chmod(0o755)
    elif change == "first":
        (top / "a").write_text("changed")
    elif change == "arg":
        options = {"args": {"V": "2"}}
    else:
        options = {"no_cache": {"no cache": {""}, "no cache of a stage": {"one"}}.get(change, {"other"})}
    assert how(build_all(top, **options)[1]) == wanted


def test_a_step_that_failed_is_tried_again_and_those_before_it_are_not(tmp_path: Path) -> None:
    top = make_context(tmp_path / "one", {}, "FROM b:1\nRUN echo failing > /a\nRUN test -e /b\n")
    for _ in range(2):
        with pytest.raises(CafsError, match="exit code 1"):
            build(top)
    (top / "Dockerfile").write_text("FROM b:1\nRUN echo failing > /a\nRUN true # mended\n")
    assert how(build_all(top)[1]) == ["cached", "made"]


def test_what_a_bind_shows_is_part_of_the_key_and_what_a_cache_holds_is_not(tmp_path: Path) -> None:
    text = "FROM b:1\nRUN --mount=source=a,target=/m --mount=type=cache,id=KEY,target=/k cp /m /a; echo x >> /k/n\n"
    top = make_context(tmp_path / "one", {"a": "A", "b": "B"}, text)
    assert how(build_all(top)[1]) == ["made"]
    (top / "b").write_text("unused")
    assert how(build_all(top)[1]) == ["cached"]
    (top / "a").write_text("changed")
    made, progress = build_all(top)
    assert how(progress) == ["made"] and described(tree_of(made), "/a", "f=changed") == "f=changed"


def test_a_layer_that_is_gone_is_made_again(tmp_path: Path) -> None:
    top = make_context(tmp_path / "one", {"a": "gone"}, "FROM b:1\nCOPY a /gone\n")
    made = build(top)
    store = Store(os.environ["CAFS_STORE"])
    store.backend.remove(store.meta_name(made.layers[-1], "index"))
    again, progress = build_all(top)
    assert how(progress) == ["made"] and again.layers == made.layers


def test_copying_what_is_in_the_store_writes_no_data(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    top = make_context(
        tmp_path / "one", {}, "FROM b:1 AS one\nCOPY large /large\nFROM b:1\nCOPY --from=one --chown=7:8 /large /copied\n"
    )
    (top / "large").write_bytes(content)
    packs = Path(os.environ["CAFS_STORE"]) / "packs"
    before = sum(path.stat().st_size for path in packs.iterdir())
    made = build(top)
    added = sum(path.stat().st_size for path in packs.iterdir()) - before
    assert 3 << 20 <= added < (3 << 20) + 65536
    assert described(tree_of(made), "/copied", "f,7:8") == "f,7:8"


def test_with_an_epoch_two_builds_make_the_same_image(tmp_path: Path) -> None:
    text = "FROM b:1\nWORKDIR /made/here\nCOPY a /d/a\nCOPY <<X /x\nx\nX\n"
    digests = set()
    for number in range(2):
        top = make_context(tmp_path / str(number), {"a": "A"}, text)
        os.utime(top / "a", (1000, 1000))
        digests.add(build(top, epoch=1_700_000_000, no_cache={""}).digest)
    assert len(digests) == 1


def test_nothing_is_left_of_a_step_whether_it_ends_well_or_not(tmp_path: Path) -> None:
    """The fixture looks for containers, mounts and names."""
    top = make_context(
        tmp_path / "one", {"a": "A"}, "FROM b:1\nRUN --mount=target=/m --mount=type=secret,id=s,required cat /m/a\n"
    )
    (tmp_path / "secret").write_text("a real secret")
    secrets = {"s": ("file", str(tmp_path / "secret"))}
    build(top, secrets=secrets)
    (top / "Dockerfile").write_text("FROM b:1\nRUN --mount=target=/m --mount=type=secret,id=s,required false\n")
    with pytest.raises(CafsError):
        build(top, secrets=secrets)
    assert list((Path(os.environ["CAFS_RUN"]) / "builds").iterdir()) == []
    for directory, _, names in os.walk(os.environ["CAFS_STATE"]):
        assert not [name for name in names if "secret" in name], directory


def test_a_reproducible_build_is_the_same_under_another_clock_umask_and_locale(tmp_path: Path) -> None:
    text = "FROM b:1\nCOPY a /d/a\nRUN date > /dev/null; mkdir /made; echo x > /made/x; touch /bin\nWORKDIR /w\n"
    digests = set()
    for number, (umask, locale) in enumerate(((0o022, "C"), (0o077, "de_DE.UTF-8"))):
        top = make_context(tmp_path / str(number), {"a": "A"}, text)
        (top / "a").chmod(0o644)
        os.utime(top / "a", (1_900_000_000 + number, 1_900_000_000 + number))
        before = os.umask(umask)
        os.environ["LC_ALL"] = locale
        try:
            made = build(top, epoch=1_700_000_000, is_reproducible=True, no_cache={""})
        finally:
            os.umask(before)
            del os.environ["LC_ALL"]
        digests.add(made.digest)
        store = Store(os.environ["CAFS_STORE"])
        times = [entry.mtime_ns for layer in made.layers[1:] for entry in images.load_layer(store, layer).entries()]
        assert times and max(times) == 1_700_000_000 * 10**9
    assert len(digests) == 1


def test_stages_that_do_not_need_one_another_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other: one after the other they would wait for ever."""
    wait = "for i in $(seq 500); do test -e /k/{other} && exit 0; sleep 0.02; done; exit 1"
    one, two = (
        f"RUN --mount=type=cache,id=meet,target=/k touch /k/{me} /{me}; {wait.format(other=other)}\n"
        for me, other in (("x", "y"), ("y", "x"))
    )
    text = f"FROM b:1 AS one\n{one}FROM b:1 AS two\nCOPY a /a\n{two}FROM scratch\nCOPY --from=one /x /x\nCOPY --from=two /y /a /d/\n"
    made, progress = build_all(make_context(tmp_path / "one", {"a": "A"}, text))
    assert [described(tree_of(made), path, "f") for path in ("/x", "/d/y", "/d/a")] == ["f", "f", "f"]
    assert len({row.number for row in progress.rows}) == 5
    assert how(build_all(tmp_path / "one")[1]) == ["cached"] * 5


def test_a_stage_that_fails_ends_those_beside_it(tmp_path: Path) -> None:
    text = (
        "FROM b:1 AS one\nRUN sleep 1000\nFROM b:1 AS two\nRUN false\nFROM scratch\nCOPY --from=one / /\nCOPY --from=two / /\n"
    )
    with pytest.raises(CafsError, match="RUN false: exit code 1"):
        build(make_context(tmp_path / "one", {}, text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ARG M=755\nCOPY --chmod=$M a /f\n", "ARG M=600\nCOPY --chmod=$M a /f\n"),
        ("ENV HTTP_PROXY=aaa\nRUN echo $HTTP_PROXY > /f\n", "ENV HTTP_PROXY=bbb\nRUN echo $HTTP_PROXY > /f\n"),
        ("COPY --parents sub/deep/d /dst/\n", "COPY --parents sub/./deep/d /dst/\n"),
        ("COPY --exclude=c sub /f\n", "COPY sub /f\n"),
        ("COPY a /f\n", "COPY --chown=5 a /f\n"),
        ("COPY a /f\n", "COPY a /f/\n"),
        ("COPY a b /f/\n", "COPY b a /f/\n"),
        ("USER 5\nWORKDIR /of-a-user\n", "WORKDIR /of-a-user\n"),
        ("RUN --mount=type=bind,source=a,target=/f cp /f /g\n", "RUN --mount=type=bind,source=b,target=/f cp /f /g\n"),
        ("RUN id > /f\n", "USER 5\nRUN id > /tmp/f\n"),
        ("RUN echo $0 > /f\n", 'SHELL ["/bin/sh", "-e", "-c"]\nRUN echo $0 > /f\n'),
        ("RUN pwd > /f\n", "WORKDIR /tmp\nRUN pwd > /f\n"),
    ],
)
def test_what_makes_a_difference_is_in_the_key(tmp_path: Path, one: str, other: str) -> None:
    files = {"a": "A", "b": "B", "sub/c": "C", "sub/deep/d": "D"}
    top = make_context(tmp_path / "context", files, "FROM b:1\n" + one)
    build(top)
    (top / "Dockerfile").write_text("FROM b:1\n" + other)
    from_cache, progress = build_all(top)
    assert "made" in how(progress)
    again = build(top, no_cache={""})
    assert [entry.path for entry in tree_of(again).entries()] == [entry.path for entry in tree_of(from_cache).entries()]


def test_the_network_and_the_epoch_are_in_the_key(tmp_path: Path) -> None:
    top = make_context(tmp_path / "context", {}, "FROM b:1\nRUN ip -o link | grep -c . > /n\n")
    assert how(build_all(top, network="none")[1]) == ["made"] and how(build_all(top, network="none")[1]) == ["cached"]
    assert how(build_all(top, network="bridge")[1]) == ["made"]
    (top / "Dockerfile").write_text("FROM b:1\nWORKDIR /aa\n")
    plain, dated = build(top), build(top, epoch=1000)
    assert plain.digest != dated.digest and dated.config["created"] == "1970-01-01T00:16:40Z"


def test_a_named_context_stands_before_a_stage_and_what_is_not_given_is_no_file_of_the_host(tmp_path: Path) -> None:
    top = make_context(tmp_path / "context", {}, "FROM scratch AS base\nFROM base\nRUN true\n")
    build(top, contexts={"Base": "docker-image://b:1"})
    with pytest.raises(CafsError, match="has no programs"):
        build(top)


def test_bases_of_strangers_are_checked(tmp_path: Path) -> None:
    store = Store(os.environ["CAFS_STORE"])
    below = images.resolve(store, "b:1")
    for number, config in enumerate(
        ({"OnBuild": 5}, {"Labels": [1]}, {"Env": [5]}, {"Cmd": "x"}, {"OnBuild": ["FROM x"]}, {"OnBuild": ["FOO"]})
    ):
        made = images.put_layers(store, below.layers, {"config": config}, below.metadata)
        top = make_context(tmp_path / str(number), {}, f"FROM {made.digest.hex()}\nENV A=1\n")
        with pytest.raises(CafsError, match=r"^Dockerfile:1:1: FROM: "):
            build(top)
    made = images.put_layers(store, below.layers, {"history": 5}, below.metadata)
    build(make_context(tmp_path / "history", {}, f"FROM {made.digest.hex()}\nENV A=1\n"))


def test_caches_that_are_made_at_once_are_made_once(tmp_path: Path) -> None:
    text = "FROM b:1\nRUN --mount=type=cache,id=race,target=/k,from=b:1,source=/bin ls /k | wc -l > /n # {}\n"
    running = []
    for number in range(3):
        top = make_context(tmp_path / str(number), {}, text.format(number))
        running.append(subprocess.Popen([BIN / "cbuild", "-q", top], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert [one.communicate(timeout=60 * SLOW)[1] for one in running] == [b""] * 3


def test_a_key_file_is_no_agent(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("private")
    top = make_context(tmp_path / "context", {}, "FROM b:1\nRUN --mount=type=ssh cat $SSH_AUTH_SOCK\n")
    with pytest.raises(CafsError, match="is not the socket of an agent"):
        build(top, ssh={"default": str(tmp_path / "key")})
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "agent"))
        (top / "Dockerfile").write_text("FROM b:1\nRUN --mount=type=ssh test -S $SSH_AUTH_SOCK\n")
        build(top, ssh={"default": str(tmp_path / "agent")})


def test_very_many_layers_are_folded_into_one(tmp_path: Path) -> None:
    text = "FROM b:1\n" + "".join(f"WORKDIR /many/{number}\n" for number in range(110))
    made = build(make_context(tmp_path / "context", {}, text))
    assert len(made.layers) == 1 and described(tree_of(made), "/many/109", "d755") == "d755"
