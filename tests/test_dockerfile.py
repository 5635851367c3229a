"""Dockerfiles are read as BuildKit reads them: its own test data, and what that leaves out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import DockerfileError
from builder.lexer import Instruction, parse
from builder.patterns import Ignore, PatternError
from builder.stages import split
from builder.words import WordError, expand, expand_words

VECTORS = Path(__file__).parent.parent.parent / "shared" / "vectors" / "dockerfile"
have_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs the vectors beside the checkout")


def _rows(name: str) -> list[str]:
    return (VECTORS / name).read_text().split("\n") if VECTORS.is_dir() else []


@have_vectors
def test_every_row_of_envvartest_for_linux() -> None:
    variables = {"PWD": "/home", "SHELL": "bash", "KOREAN": "한국어", "NULL": ""}
    count = 0
    for line in _rows("envVarTest"):
        line = line.split("#")[0] if line.startswith("#") else line
        if not line.strip():
            continue
        platform, word, wanted = (part.strip() for part in line.split("|"))
        if platform not in ("A", "U"):
            continue
        count += 1
        try:
            found = expand(word, variables)
        except WordError:
            found = "error"
        assert found == wanted, line
    assert count > 200


@have_vectors
def test_every_row_of_wordstest() -> None:
    variables: dict[str, str] = {}
    for line in _rows("wordsTest"):
        if line.startswith("#") or not line:
            continue
        if line.startswith("ENV "):
            name, _, value = line[4:].partition("=")
            variables[name] = value
            continue
        word, _, wanted = line.partition("|")
        try:
            found = expand_words(word.strip(), variables)
        except WordError:
            found = ["error"]
        assert ",".join(found) == wanted.lstrip(), line


def _dump(one: Instruction) -> str:
    """As BuildKit's parser prints a node."""
    text = one.keyword + (" [" + " ".join(map(_quoted, one.flags)) + "]" if one.flags else "")
    if one.trigger:
        return f"({text} ({_dump(one.trigger)[1:-1]}))"
    if one.separators:
        words = [word for n, mark in enumerate(one.separators) for word in (one.words[2 * n], one.words[2 * n + 1], mark)]
    else:
        words = list(one.words)
    return f"({' '.join([text, *map(_quoted, words)])})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\\u0000", "\\x00")


@have_vectors
@pytest.mark.parametrize("path", sorted((VECTORS / "testfiles").glob("*")), ids=lambda path: path.name)
def test_a_file_of_buildkit_has_the_tree_that_buildkit_sees(path: Path) -> None:
    found = parse((path / "Dockerfile").read_bytes())
    assert "\n".join(map(_dump, found.instructions)) == (path / "result").read_text().strip()


@have_vectors
@pytest.mark.parametrize("path", sorted((VECTORS / "testfiles-negative").glob("*")), ids=lambda path: path.name)
def test_what_buildkit_refuses_is_refused_with_a_place(path: Path) -> None:
    with pytest.raises(DockerfileError, match=r"^Dockerfile:\d+:\d+: "):
        parse((path / "Dockerfile").read_bytes())


TEXT = st.text(st.sampled_from("abAB\\`'\"$ {}:-+?#%/*=<>\n\t[],.!1") | st.characters(), max_size=200)


@given(st.binary(max_size=300) | TEXT.map(lambda text: f"FROM a\n{text}".encode("utf-8", "surrogatepass")))
def test_whatever_is_in_a_file_it_is_read_or_refused_with_a_place(data: bytes) -> None:
    try:
        found = parse(data)
    except DockerfileError as error:
        assert re.match(r"Dockerfile:\d+:\d+: ", str(error))
        return
    assert found.instructions
    try:
        split(found, {"a": "b"}, "")
    except DockerfileError as error:
        assert re.match(r"Dockerfile:\d+:\d+: ", str(error))


@given(TEXT, st.dictionaries(st.sampled_from("abAB"), TEXT))
def test_whatever_is_in_a_word_it_is_expanded_or_refused(text: str, variables: dict[str, str]) -> None:
    for escape in "\\`":
        try:
            assert isinstance(expand(text, variables, escape), str)
            expand_words(text, variables, escape)
            expand(text, variables, escape, keeps_quotes=True)
        except WordError:
            pass


@given(TEXT, st.text("ab/.*", max_size=20))
def test_a_pattern_is_one_or_refused_and_what_it_leaves_out_is_left_out_with_all_below(text: str, path: str) -> None:
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")  # as a file is read
    try:
        ignore = Ignore(text.split("\n"))
    except PatternError:
        return
    name = path.strip("/").encode() or b"a"
    if ignore.matches(name) and "!" not in text:
        assert ignore.matches(name + b"/below/it")


def test_a_very_long_file_takes_time_in_proportion() -> None:
    """A quadratic reader would not end."""
    for text in (
        "RUN a \\\n" * 200_000,
        "ENV A=" + "x" * 2_000_000 + "\n",
        "ENV " + "a=b " * 200_000 + "\n",
        "#\n" * 500_000 + "RUN a\n",
        "RUN " + "<" * 1_000_000 + "\n",
    ):
        assert parse(f"FROM a\n{text}".encode()).instructions
    assert len(expand("$a" * 200_000 + "'x'" * 200_000, {"a": "b"})) == 400_000
