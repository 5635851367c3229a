"""Nothing is declared and ignored: every flag of every command of crun is read by the code that runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType

import pytest

import runner
from runner import committing, networkverbs, verbs, volumeverbs
from runner.flags import RUN, VERBS, taken

MODULES = {name: importlib.import_module(f"runner.{name}") for _, name, _ in pkgutil.iter_modules(runner.__path__)}
MEANS_NOTHING_HERE = {("cp", "quiet"), ("volume prune", "force"), ("network prune", "force")}
"""There is no progress bar and no question."""


def handler(verb: str) -> object:
    group, _, name = verb.partition(" ")
    if name:
        return {"volume": volumeverbs, "network": networkverbs}[group].VERBS[name]
    return committing.run if verb == "commit" else verbs._VERBS[verb]


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def texts(constants: object) -> Iterator[str]:
    """All that are among constants, and in tuples of them."""
    for one in constants if isinstance(constants, tuple) else ():
        yield from (one,) if isinstance(one, str) else texts(one)


def strings(function: object, seen: set[object]) -> set[str]:
    """Every text in a function, and in those of the runner that it may call."""
    if isinstance(function, partial):
        function = function.func
    if not isinstance(function, FunctionType) or function in seen:
        return set()
    seen.add(function)
    found: set[str] = set()
    for code in codes(function.__code__):
        found |= set(texts(code.co_consts))
        names = [*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars]
        here = MODULES[function.__module__.removeprefix("runner.")]
        places: list[ModuleType] = [here, *(MODULES[m] for m in (n.removeprefix("runner.") for n in names) if m in MODULES)]
        for place in places:
            for name in names:
                one = vars(place).get(name)
                if isinstance(one, type) and one.__module__.startswith("runner."):
                    for method in vars(one).values():
                        found |= strings(method, seen)
                elif isinstance(one, FunctionType) and one.__module__.startswith("runner."):
                    found |= strings(one, seen)
    return found


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("run", "create", "completion")])
def test_every_flag_is_read_by_its_command(verb: str) -> None:
    found = strings(handler(verb), set())
    assert {name for name in VERBS[verb][2] if name not in found and (verb, name) not in MEANS_NOTHING_HERE} == set()


def test_every_flag_of_run_is_read() -> None:
    functions: list[Callable[..., object]] = []
    for name, module in MODULES.items():
        if name != "flags":
            for one in vars(module).values():
                functions += [one] if isinstance(one, FunctionType) else []
                functions += [f for f in vars(one).values() if isinstance(f, FunctionType)] if isinstance(one, type) else []
    found = set()
    for function in functions:
        if function.__module__.startswith("runner."):
            found |= strings(function, set())
    assert set(RUN) - found == set()


def test_how_many_words_a_command_takes_is_in_its_help() -> None:
    assert taken("run") == (1, None) and taken("exec") == (2, None) and taken("cp") == (2, 2) and taken("port") == (1, 2)
    assert taken("stats") == (0, None) and taken("ps") == (0, 0) and taken("volume create") == (0, 1)
