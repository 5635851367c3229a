"""The stages of a Dockerfile: what each is based on, what it needs, and which of them a target needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from builder import flags as flagging
from builder.errors import DockerfileError
from builder.mounts import split_fields
from builder.words import WordError, expand
from cafs import oci
from cafs.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from builder.lexer import Dockerfile, Instruction

KEYWORDS = (
    "add", "arg", "cmd", "copy", "entrypoint", "env", "expose", "from", "healthcheck", "label", "maintainer", "onbuild", "run",
    "shell", "stopsignal", "user", "volume", "workdir",
)  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(slots=True)
class Stage:
    """number: from 0.  base: an image's name, or that of a stage; line: of FROM."""

    number: int
    name: str
    base: str
    line: int
    instructions: list[Instruction] = field(default_factory=list)
    base_stage: Stage | None = None

    @property
    def label(self) -> str:
        """For messages."""
        return self.name or f"stage-{self.number}"


def platform() -> str:
    """Of this host: OS/ARCHITECTURE."""
    here = oci.host_platform()
    return f"{here.os}/{here.architecture}"


def check_platform(text: str) -> None:
    """--platform: nothing is emulated.  Raises ValueError."""
    try:
        fits = oci.parse_platform(text) in (oci.host_platform(), oci.parse_platform(platform()))
    except FormatError as error:
        raise ValueError(str(error)) from None
    if not fits:
        raise ValueError(f"platform '{text}' is not this host's, {platform()}, and nothing is emulated")


def automatic(target: str) -> dict[str, str]:
    """The global arguments that are there without being declared."""
    found = {"TARGETSTAGE": target or "default"}
    system, _, architecture = platform().partition("/")
    for side in ("BUILD", "TARGET"):
        found |= {f"{side}PLATFORM": platform(), f"{side}OS": system, f"{side}ARCH": architecture}
        found |= {f"{side}OSVERSION": "", f"{side}VARIANT": ""}
    return found


@dataclass(slots=True)
class Plan:
    """globals: of ARGs before the first FROM, and automatic ones.  declared: names of all ARGs anywhere."""

    stages: list[Stage]
    globals: dict[str, str]
    declared: set[str]

    def find(self, name: str, before: int) -> Stage | None:
        """The stage of a name or number, of those before a stage; the last one of that name."""
        if name.isascii() and name.isdigit():
            return self.stages[int(name)] if len(name) < 9 and int(name) < before else None
        return next((one for one in reversed(self.stages[:before]) if one.name == name.lower()), None)


def split(dockerfile: Dockerfile, given: Mapping[str, str], target: str, contexts: Collection[str] = ()) -> Plan:
    """given: --build-arg.  contexts: names of --build-context, which stand before stages.  Raises DockerfileError."""
    found = Plan([], automatic(target), set())
    found.globals |= {name: given[name] for name in found.globals if name in given}
    for one in dockerfile.instructions:
        try:
            check_keyword(one)
            if one.trigger:
                check_keyword(one.trigger)
            if one.keyword == "arg":
                found.declared |= {word.partition("=")[0] for word in one.words}
            if one.keyword == "from":
                found.stages.append(_stage(found, one, dockerfile.escape, contexts))
            elif found.stages:
                found.stages[-1].instructions.append(one)
            elif one.keyword == "arg":
                _global(found.globals, one, given, dockerfile.escape)
            else:
                raise ValueError("no build stage yet: FROM comes first")
        except ValueError as error:
            what = str(error) if one.keyword not in KEYWORDS else f"{one.keyword.upper()}: {error}"
            raise DockerfileError(dockerfile.name, one.lines[0], what, text=one.original) from None
    if not found.stages:
        raise DockerfileError(dockerfile.name, 1, "no FROM in it")
    return found


def check_keyword(one: Instruction) -> None:
    if one.keyword not in KEYWORDS:
        import difflib

        near = difflib.get_close_matches(one.keyword, KEYWORDS, 1, 0.6)
        hint = f" (did you mean {near[0].upper()}?)" if near else ""
        raise ValueError(f"unknown instruction '{one.keyword.upper()}'{hint}")
    flagging.parse(one.keyword, one.flags)


def _global(variables: dict[str, str], one: Instruction, given: Mapping[str, str], escape: str) -> None:
    for word in one.words:
        name, equals, value = word.partition("=")
        if name in given:
            variables[name] = given[name]
        elif equals:
            variables[name] = expand(value, variables, escape)


def _stage(plan: Plan, one: Instruction, escape: str, contexts: Collection[str]) -> Stage:
    words = one.words
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].lower() != "as"):
        raise ValueError("needs an image, or an image AS a name")
    name = words[2].lower() if len(words) == 3 else ""
    if name and not _NAME.fullmatch(name):
        raise ValueError(f"'{words[2]}' is not a name for a stage: letters, digits, - _ . are")
    wanted = flagging.one(flagging.parse("from", one.flags), "platform")
    if wanted is not None and (wanted := expand(wanted, plan.globals, escape)):
        check_platform(wanted)
    try:
        base = expand(words[0], plan.globals, escape)
    except WordError as error:
        raise ValueError(str(error)) from None
    if not base:
        raise ValueError(f"'{words[0]}' is empty; an ARG before the first FROM may have no default")
    number = len(plan.stages)
    base_stage = None if base.isdigit() or base.lower() in contexts else plan.find(base, number)
    return Stage(number, name, base, one.lines[0], base_stage=base_stage)


def sources(instructions: Iterable[Instruction]) -> set[str]:
    """What COPY, ADD and RUN take files from: names of stages, images, contexts."""
    found = set()
    for one in instructions:
        flags = flagging.parse(one.keyword, one.flags)
        if one.keyword == "copy" and (name := flagging.one(flags, "from")):
            found.add(name)
        for text in flags.get("mount", []):
            found |= {value for key, value in split_fields(text) if key == "from"}
    return found


def before(plan: Plan, stage: Stage) -> set[int]:
    """The numbers of the stages that one stands on, or takes files from."""
    names = (plan.find(name, stage.number) for name in sources(stage.instructions))
    return {one.number for one in (stage.base_stage, *names) if one is not None}


def needed(plan: Plan, target: Stage) -> list[Stage]:
    """The stages that a target needs, in order, itself the last."""
    wanted, todo = {target.number}, [target]
    while todo:
        stage = todo.pop()
        for number in before(plan, stage) - wanted:
            wanted.add(number)
            todo.append(plan.stages[number])
    return [stage for stage in plan.stages if stage.number in wanted]
