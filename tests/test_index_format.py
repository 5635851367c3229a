"""cafs-index(5): one vector a rule, round trips, and no input that does anything but load or be refused."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafs import format as fmt
from cafs.errors import FormatError
from cafs.escape import escape, escape_xattr, unescape
from cafs.format import Entry, Header
from cafs.index import load

VECTORS = Path(__file__).parent / "vectors" / "index"
BAD = sorted(VECTORS.glob("*.bad"))
RULES = {int(path.name[:2]) for path in BAD}


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_a_broken_rule_is_named(path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        load(io.BytesIO(path.read_bytes()))
    assert caught.value.rule == int(path.name[:2]), str(caught.value)
    assert caught.value.line >= 1


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.ok")), ids=lambda p: p.stem)
def test_a_valid_vector_loads_and_is_written_back_byte_for_byte(path: Path) -> None:
    data = path.read_bytes()
    index = load(io.BytesIO(data))
    assert index.encode() == data
    assert index.identity == hashlib.sha256(data).digest()


def test_every_rule_of_the_man_page_has_a_vector() -> None:
    page = (Path(__file__).parent.parent / "man" / "cafs-index.5").read_text()
    rules = {int(line.split()[1].rstrip(".")) for line in page.splitlines() if line.startswith(".IP ")}
    assert rules - RULES == {23}  # 67,108,864 entries: tested below with a smaller limit


def test_the_limit_of_entries_is_kept() -> None:
    data = (VECTORS / "all-types.ok").read_bytes()
    with pytest.raises(FormatError) as caught:
        load(io.BytesIO(data), entries_max=5)
    assert caught.value.rule == 23


names = st.binary(min_size=1, max_size=20).filter(lambda n: n not in (b".", b"..") and b"/" not in n and b"\0" not in n)
int64 = st.integers(fmt.INT64_MIN, fmt.INT64_MAX)
ids = st.integers(0, fmt.ID_MAX)


@st.composite
def trees(draw: st.DrawFn) -> list[Entry]:
    """A list of valid entries in order."""
    found = {b"/": Entry(b"d", b"/", 0o755, mtime_ns=draw(int64))}
    directories = [b""]
    for _ in range(draw(st.integers(0, 12))):
        path = draw(st.sampled_from(directories)) + b"/" + draw(names)
        if path in found:
            continue
        kind = draw(st.sampled_from([b"f", b"F", b"d", b"l", b"c", b"b", b"p", b"s"]))
        size = draw(st.integers(0, 4 << 20)) if kind == b"f" else draw(st.integers((4 << 20) + 1, fmt.INT64_MAX))
        size = size if kind in b"fF" else 0
        xattrs = draw(st.dictionaries(names.map(lambda n: b"user." + n), st.binary(max_size=30), max_size=3))
        found[path] = Entry(
            kind,
            path,
            0o777 if kind == b"l" else draw(st.integers(0, 0o7777)),
            draw(ids),
            draw(ids),
            draw(int64),
            size,
            draw(st.binary(min_size=32, max_size=32)) if size else b"",
            tuple(sorted(xattrs.items())),
            draw(st.binary(min_size=1, max_size=30).filter(lambda t: b"\0" not in t)) if kind == b"l" else b"",
            (draw(st.integers(0, 4095)), draw(st.integers(0, 1 << 19))) if kind in b"cb" else (0, 0),
        )
        if kind == b"d":
            directories.append(path)
    entries = sorted(found.values(), key=lambda e: fmt.order_key(e.path))
    files = [e for e in entries if e.type == b"f"]
    if files and draw(st.booleans()):
        link = files[0].path + b"~"
        if link not in found and len(link.rpartition(b"/")[2]) <= 255:
            entries.append(Entry(b"h", link, target=files[0].path))
    return sorted(entries, key=lambda e: fmt.order_key(e.path))


def encode(entries: list[Entry]) -> bytes:
    return Header().encode() + b"".join(e.encode() for e in entries) + fmt.encode_trailer(len(entries))


@given(trees())
def test_what_is_written_is_read_back(entries: list[Entry]) -> None:
    index = load(io.BytesIO(encode(entries)))
    assert index.encode() == encode(entries)
    for number, entry in enumerate(entries):
        assert index.path(number) == entry.path
        assert index.find(entry.path) == number
        if entry.type != b"h":
            assert index.entry(number) == entry


@given(st.binary(max_size=300), st.integers(0, 400), st.sampled_from(sorted(VECTORS.glob("*"))))
@settings(max_examples=400)
def test_any_bytes_load_or_are_refused_with_line_and_rule(noise: bytes, at: int, path: Path) -> None:
    if path.stat().st_size > 10_000:
        return
    data = path.read_bytes()
    for candidate in (noise, data[:at] + noise + data[at:], data[:at] + noise + data[at + len(noise) :], data[:at]):
        try:
            index = load(io.BytesIO(candidate))
        except FormatError as error:
            assert error.line >= 1 and 1 <= error.rule <= 23
        else:
            assert index.encode() == candidate


@given(st.binary(max_size=200))
def test_a_spelling_is_printable_and_stands_for_its_bytes(raw: bytes) -> None:
    for spelled in (escape(raw), escape_xattr(raw)):
        assert unescape(spelled) == raw
        assert spelled.decode().isprintable() or any(ord(c) > 0x9F for c in spelled.decode())
        assert b" " not in spelled and b"\n" not in spelled
    assert b"," not in escape_xattr(raw) and b"=" not in escape_xattr(raw)


def test_a_line_without_end_is_refused_in_bounded_memory() -> None:
    code = (
        "import sys, re; from cafs.index import load; from cafs.errors import FormatError\n"
        "try: load(sys.stdin.buffer)\nexcept FormatError as e: print(e.rule)\n"
        # Not getrusage: its maximum outlives execve(2), so it would be the memory of the tests before this one.
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        try:
            child.stdin.write(b"cafs-index 1 sha256 4194304\n")
            for _ in range(200):
                child.stdin.write(b"a" * (1 << 20))
            child.stdin.close()
        except BrokenPipeError:
            pass
        rule, peak_kib = child.stdout.read().split()
    assert rule == b"8"
    assert int(peak_kib) < 100_000


def test_blocks_are_cut_at_line_ends_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (VECTORS / "all-types.ok").read_bytes()
    for block in (1 << 6, 100, 333):
        monkeypatch.setattr("cafs.index.BLOCK", block)
        assert load(io.BytesIO(data)).encode() == data


def test_the_identity_is_what_sha256sum_says(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes((VECTORS / "smallest.ok").read_bytes())
    said = subprocess.run(["sha256sum", tmp_path / "i"], capture_output=True, text=True, check=True).stdout.split()[0]
    with open(tmp_path / "i", "rb") as stream:
        assert load(stream).identity.hex() == said
    assert os.path.getsize(tmp_path / "i") < 100


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"c 644 0 0 0 4096:1 - - - /dev", 11),
        (b"f 644 4294967295 0 0 0 - - - /f", 11),
        (b"l 777 0 0 0 - - - a\\x00 /l", 15),
        (b"f 644 0 0 0 5000000 " + b"a" * 64 + b" - - /f", 14),
        (b"d 755 0 0 0 - - user.b=,user.a= - /d", 22),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_also_among_many(line: bytes, rule: int) -> None:
    before = b"".join(b"d 755 0 0 0 - - - - /a%03d\n" % number for number in range(300))
    after = b"".join(b"d 755 0 0 0 - - - - /z%03d\n" % number for number in range(300))
    data = b"cafs-index 1 sha256 4194304\nd 755 0 0 0 - - - - /\n" + before + line + b"\n" + after + b"end 602\n"
    with pytest.raises(FormatError) as caught:
        load(io.BytesIO(data))
    assert (caught.value.line, caught.value.rule) == (303, rule)


def test_hard_links_of_a_layer_are_loaded_in_linear_time() -> None:
    """Ten times as many take about ten times as long, and nowhere near a hundred times."""

    def seconds(count: int) -> float:
        links = b"".join(b"h - - - - - - - /d/a /d/l%06d\n" % number for number in range(count))
        data = b"cafs-index 1 sha256 4194304 layer\nf 644 0 0 0 0 - - - /d/a\n" + links + b"end %d\n" % (count + 1)
        start = time.process_time()
        assert load(io.BytesIO(data)).links == {0: count + 1}
        return time.process_time() - start

    assert seconds(20_000) < 40 * seconds(2_000)
