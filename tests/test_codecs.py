"""Packs, chunk lists, manifests and flags: what is written is read back, and any bytes are a value or the right error."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cafs import chunks, image, options, pack
from cafs.digest import checksum
from cafs.errors import CorruptError, FormatError, UsageError
from runner.flags import ALIASES, RUN

KIND = st.integers(0, 1)
SHA = st.binary(min_size=32, max_size=32)


@given(st.binary(max_size=5000), KIND, st.booleans())
def test_a_frame_is_read_back(raw: bytes, kind: int, compress: bool) -> None:
    payload = zstandard.ZstdCompressor().compress(raw) if compress else None
    frame = pack.encode_frame(raw, kind, payload)
    assert pack.decode_frame(frame) == (raw, kind)
    assert pack.frame_raw_size(frame) == len(raw)


@given(st.binary(min_size=1, max_size=300), KIND, st.integers(0), st.integers(1, 255))
def test_a_frame_with_any_byte_changed_is_corrupt_or_the_same(raw: bytes, kind: int, at: int, change: int) -> None:
    frame = bytearray(pack.encode_frame(raw, kind, zstandard.ZstdCompressor().compress(raw)))
    at %= len(frame)
    frame[at] ^= change
    try:
        assert pack.decode_frame(bytes(frame)) == (raw, 1 - kind) and at == 5  # the kind: checked by who asked for it
    except CorruptError:
        pass


@given(st.lists(st.tuples(st.binary(max_size=300), KIND, st.sampled_from("rzbds")), max_size=12))
def test_frames_decoded_together_are_as_decoded_one_by_one(cases: list[tuple[bytes, int, str]]) -> None:
    frames = []
    for raw, kind, how in cases:
        payload = None if how == "r" else zstandard.ZstdCompressor().compress(raw)
        frame = bytearray(pack.encode_frame(raw, kind, payload))
        if how == "b":
            frame[-1] ^= 1
        if how == "d" and payload:  # sound but for what it declares
            frame = bytearray(pack.encode_frame(raw + b"x", kind, payload))
        if how == "s" and payload:  # sound but for what zstd says of it
            frame = bytearray(pack.encode_frame(raw, kind, payload[:-1] + bytes([payload[-1] ^ 1])))
        frames.append(bytes(frame))
    alone = []
    for frame in frames:
        try:
            alone.append(pack.decode_frame(frame))
        except CorruptError as error:
            alone.append(str(error))
    together = [str(one) if isinstance(one, CorruptError) else (bytes(one[0]), one[1]) for one in pack.decode_frames(frames)]
    assert together == alone


def test_frames_of_nothing_among_others_are_decoded_one_by_one() -> None:
    """A frame of size 0 at the head of a batch makes python-zstandard 0.25 overrun its memory: only a stranger would make one."""
    empty = pack.encode_frame(b"", 0, zstandard.ZstdCompressor().compress(b""))
    good = pack.encode_frame(b"good" * 1000, 0, zstandard.ZstdCompressor().compress(b"good" * 1000))
    for frames in ([empty, empty], [empty, good], [empty, good, empty], [good, empty]):
        found = [bytes(one[0]) for one in pack.decode_frames(frames) if not isinstance(one, CorruptError)]
        assert found == [pack.decode_frame(frame)[0] for frame in frames]


def test_a_zstd_frame_that_would_grow_beyond_what_it_declares_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(50 << 20))
    small = pack.FRAME.pack(pack.FRAME_MAGIC, pack.ZSTD, 0, 0, len(bomb), 10, checksum(bomb)[:8]) + bomb
    huge = pack.FRAME.pack(pack.FRAME_MAGIC, pack.ZSTD, 0, 0, len(bomb), 0xFFFF_FFFF, checksum(bomb)[:8]) + bomb
    for frame in (small, huge):
        with pytest.raises(CorruptError):
            pack.decode_frame(frame)


ROWS = st.lists(st.tuples(SHA, KIND, st.integers(8, 1 << 30), st.integers(24, 1 << 20), st.integers(0, 1 << 26)), max_size=30)


@given(ROWS)
def test_a_footer_is_read_back_and_finds_what_is_in_it(rows: list[tuple[bytes, int, int, int, int]]) -> None:
    rows = list({row[:2]: row for row in rows}.values())
    footer = pack.Records.build("sha256", rows).encode_footer()
    assert pack.footer_size(footer[-pack.FOOTER.size :]) == len(footer)
    found = pack.decode_footer(footer, (1 << 31) + len(footer))
    assert sorted(found.rows()) == sorted(rows)
    for digest, kind, offset, stored, _ in rows:
        assert found.find(digest, kind) == (offset, stored)
    assert found.find(b"\x55" * 32, 0) is None


@given(ROWS, st.integers(0), st.integers(1, 255))
def test_a_changed_footer_is_refused(rows: list[tuple[bytes, int, int, int, int]], at: int, change: int) -> None:
    footer = bytearray(pack.Records.build("sha256", rows).encode_footer())
    footer[at % len(footer)] ^= change
    with pytest.raises(FormatError):
        if pack.footer_size(bytes(footer[-pack.FOOTER.size :])) != len(footer):
            raise FormatError("another size")
        pack.decode_footer(bytes(footer), 1 << 40)


def test_a_footer_that_points_outside_its_pack_is_refused() -> None:
    for row in (
        (b"d" * 32, 0, 0, 24, 1),
        (b"d" * 32, 0, 8, 1 << 20, 1),
        (b"d" * 32, 2, 8, 24, 1),
        (b"d" * 32, 0, 8, 24, 1 << 27),
    ):
        footer = pack.Records.build("sha256", [row]).encode_footer()
        with pytest.raises(FormatError):
            pack.decode_footer(footer, 1000 + len(footer))


RUNS = st.lists(st.tuples(st.integers(1, 1000), st.one_of(SHA, st.just(b""))), min_size=1, max_size=10)


@given(RUNS, st.integers(1, 4 << 20))
def test_a_chunk_list_is_read_back(runs: list[tuple[int, bytes]], last: int) -> None:
    joined = chunks.join_runs(runs)
    size = (sum(count for count, _ in joined) - 1) * (4 << 20) + last
    found = chunks.ChunkList("sha256", 4 << 20, size, joined)
    assert chunks.decode(found.encode(), "sha256", 4 << 20) == found


@given(st.binary(max_size=200))
def test_any_bytes_are_no_chunk_list(data: bytes) -> None:
    for one in (data, b"cafs-chunks 1 sha256 4194304 5000000\n" + data):
        with pytest.raises(FormatError):
            chunks.decode(one, "sha256", 4 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "cafs-chunks 1 sha256 4194304 5000000\n1 -\n1 -\n",  # neighbours that are equal
        "cafs-chunks 1 sha256 4194304 5000000\n3 -\n",  # does not add up
        "cafs-chunks 1 sha256 4194304 5000000\n02 -\n",
        "cafs-chunks 1 sha256 4194304 5000000\n2 -",
        "cafs-chunks 1 sha256 8388608 5000000\n1 -\n",  # of another store
        "cafs-chunks 2 sha256 4194304 5000000\n2 -\n",
    ],
)
def test_a_chunk_list_has_one_spelling(text: str) -> None:
    with pytest.raises(FormatError):
        chunks.decode(text.encode(), "sha256", 4 << 20)


def test_a_chunk_list_that_is_a_bomb_is_refused_at_its_first_wrong_line() -> None:
    head = b"cafs-chunks 1 sha256 4194304 9223372036854775807\n"
    for body in (b"1 -\n" * (16 << 20), b"2199023255553 -\n", b"1 -\n" + b"junk" * (1 << 20)):
        import tracemalloc

        tracemalloc.start()
        with pytest.raises(FormatError):
            chunks.decode(head + body, "sha256", 4 << 20)
        assert tracemalloc.get_traced_memory()[1] - len(head + body) < 1 << 20
        tracemalloc.stop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
)


@given(st.lists(SHA, min_size=1, max_size=5), st.dictionaries(st.text(max_size=10), json_values, max_size=4))
def test_a_manifest_is_read_back(layers: list[bytes], config: dict[str, object]) -> None:
    made = image.Image(tuple(layers), config)
    found = image.decode(made.encode(), b"d" * 32)
    assert (found.layers, found.config) == (made.layers, made.config)
    assert found.encode() == made.encode()


@given(st.one_of(st.binary(max_size=100), json_values.map(lambda v: repr(v).encode())))
def test_any_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(FormatError):
        image.decode(data, b"d" * 32)


WORDS = st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12), max_size=8)


def parsed(words: list[str]) -> options.Options:
    return options.parse(words, RUN, ALIASES, program="crun run", stop_at=1)


@given(WORDS, st.sampled_from(sorted(RUN)))
def test_any_command_line_is_options_or_a_usage_error_and_the_commands_words_are_untouched(words: list[str], flag: str) -> None:
    try:
        found = parsed(words)
        command = found.words[1:]
        assert words[len(words) - len(command) :] == command
    except UsageError:
        pass
    value = [] if RUN[flag][0] == options.SWITCH else ["v"]
    found = parsed([f"--{flag}", *value, "image:1", *words])
    assert found.words == ["image:1", *words]
    assert found.all(flag) == (value or ["true"])


def test_flags_may_be_joined_and_have_values_as_dockers() -> None:
    found = parsed(["-it", "-e", "A=1", "-eB=2", "--env=C=3", "-w=/x", "--rm=false", "--", "i", "-e", "x"])
    assert found.all("env") == ["A=1", "B=2", "C=3"] and found.value("workdir") == "/x"
    assert found.has("interactive") and found.has("tty") and not found.has("rm")
    assert found.words == ["i", "-e", "x"]
    for wrong in (["-e"], ["--nothing", "i"], ["-Z", "i"], ["--rm=maybe", "i"]):
        with pytest.raises(UsageError):
            parsed(wrong)
