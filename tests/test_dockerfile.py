"""Dockerfiles are read as BuildKit reads them: its own test data, and what that leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.errors import DockerfileError
from builder.lexer import Instruction, parse
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
    with pytest.raises(DockerfileError, match=r"^Dockerfile:\d+: "):
        parse((path / "Dockerfile").read_bytes())
