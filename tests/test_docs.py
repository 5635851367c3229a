"""What the documents say and what the programs do are the same thing."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from cafs import errors
from runner.flags import GROUPS, VERBS
from tests.conftest import BIN

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "cafs-index": ["create", "ls", "stat", "cat", "diff", "verify", "du", "merge", "export", "profile"],
    "cafs-mount": [],
    "cafs-store": ["init", "ls", "info", "tag", "untag", "rm", "fsck", "gc", "push", "pull", "pin", "unpin"],
    "cbuild": [],
    "crun": [*(verb for verb in VERBS if " " not in verb), *GROUPS],
    "cpool": [
        "init",
        "serve",
        "down",
        "submit",
        "map",
        "jobs",
        "job",
        "logs",
        "wait",
        "fetch",
        "exec",
        "cancel",
        "hold",
        "release",
        "nodes",
        "host",
        "node",
        "cloud",
        "secret",
        "simulate",
        "report",
        "events",
        "metrics",
        "tick",
        "top",
        "fn",
    ],
}
BELOW = [("host", "add"), ("host", "ls"), ("host", "rm"), ("host", "setup"), ("node", "drain"), ("node", "resume")]
BELOW += [
    ("cloud", "ls"),
    ("cloud", "end"),
    ("cloud", "resume"),
    ("secret", "set"),
    ("secret", "ls"),
    ("secret", "rm"),
    ("cloud", "policy"),
    ("cloud", "prices"),
]
BELOW += [("fn", verb) for verb in ("deploy", "call", "map", "spawn", "result", "ls", "logs", "rm", "rollback", "top", "serve")]
BELOW += [("fn", "token", verb) for verb in ("add", "ls", "rm")]
BELOW += [(*verb.split(),) for verb in VERBS if " " in verb]
"""Verbs of verbs."""

COMMON = {"--help", "--version"}


def help_of(program: str, *verb: str) -> str:
    done = subprocess.run([BIN / program, *verb, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.mark.parametrize("program", COMMANDS)
def test_every_help_fits_a_terminal_and_lists_every_verb(program: str) -> None:
    for verb in [(), *[(verb,) for verb in COMMANDS[program]]]:
        text = help_of(program, *verb)
        assert text.startswith("Usage: ") and max(map(len, text.splitlines())) <= 80, verb
        assert (
            "..." not in re.sub(r"\]?\.\.\.", "", text.split("Commands:")[0]) and "...\n" not in text.partition("Commands:")[2]
        )
    verbs = re.findall(r"^  (\w+)  ", help_of(program).partition("Commands:")[2], re.M)
    assert set(verbs) == set(COMMANDS[program]) or program in ("crun", "cafs-mount", "cbuild")


@pytest.mark.parametrize("program", COMMANDS)
def test_every_option_is_in_the_man_page_and_the_reverse(program: str) -> None:
    verbs = [(), *[(verb,) for verb in COMMANDS[program]], *[verb for verb in BELOW if verb[0] in COMMANDS[program]]]
    shown = options_in(" ".join(help_of(program, *verb) for verb in verbs))
    text = re.sub(r"\.SH DIFFERENCES FROM DOCKER.*?\.fi", "", (ROOT / "man" / f"{program}.1").read_text(), flags=re.S)
    page = options_in(text)
    assert shown - page - COMMON == set()
    assert page - shown - COMMON == set()


def test_every_exit_code_and_variable_is_in_cafs_7() -> None:
    page = (ROOT / "man" / "cafs.7").read_text()
    codes = [
        getattr(errors, name)
        for name in ("OK", "FAILED", "USAGE", "DIFFERS", "NO_SUCH", "CORRUPT", "BUSY", "REMOTE", "UNSUPPORTED")
    ]
    assert all(re.search(rf"^{code} +\w", page, re.M) for code in codes)
    used = set()
    for path in [p for room in ("cafs", "cli", "runner", "pool") for p in (ROOT / room).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used |= set(re.findall(r"^(?:CAFS|XDG)_[A-Z_]+$", node.value))
    assert len(used) >= 8 and {name for name in used if name not in page} == set()


def test_every_man_page_is_installed_and_sound() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    pages = sorted((ROOT / "man").iterdir())
    for page in pages:
        assert f"man/{page.name}\n" in setup
        assert page.read_text().startswith(f".TH {page.stem.upper()} {page.suffix[1:]} ")
    assert {f"{program}.1" for program in COMMANDS} <= {page.name for page in pages}


def test_the_readme_is_short_and_names_every_command_and_dependency() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for word in [*COMMANDS, "make demo", "make test"]:
        assert word in text
    for requirement in re.findall(r'"([a-z0-9]+)>=', (ROOT / "pyproject.toml").read_text()):
        assert requirement in text or requirement == "setuptools", requirement
