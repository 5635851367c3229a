"""What a stage has come to: files, as layers, and the configuration of its image; the instructions that change that alone.

Sources: OCI image specification, config.md; BuildKit's Dockerfile reference.
"""

from __future__ import annotations

import copy
import posixpath
import re
import shlex
from dataclasses import dataclass, field

from builder import flags as flagging
from builder.flags import Flags
from builder.words import expand, expand_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from builder.lexer import Instruction

PROXIES = {f"{name}_PROXY" for name in ("HTTP", "HTTPS", "FTP", "NO", "ALL")}
PROXIES |= {name.lower() for name in PROXIES}
"""Arguments that RUN gets without their being declared."""

_SIGNAL = re.compile(r"(?:SIG)?[A-Z][A-Z0-9]*(?:[+-][0-9]+)?|[0-9]{1,3}")


@dataclass(slots=True)
class State:
    """layers, metadata: as of an Image.  key: of the steps that made the files.  config: the part of that name.

    args: what is declared, and visible.  top: created, author, history and what else an image's config has.
    """

    layers: tuple[bytes, ...] = ()
    metadata: tuple[bytes, ...] = ()
    key: str = "scratch"
    config: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    created: str = ""
    has_command: bool = False
    escape: str = "\\"

    def fork(self) -> State:
        """For a stage that is based on this one."""
        found = copy.deepcopy(self)
        found.has_command = False
        return found

    @property
    def env(self) -> dict[str, str]:
        """ENV, in order."""
        return dict(word.partition("=")[::2] for word in self.config.get("Env") or [])

    def variables(self) -> dict[str, str]:
        """What a word, and RUN, may name: of ENV and ARG the later one counts (BuildKit, dispatchArg)."""
        return self.env | self.args

    def set_env(self, name: str, value: str) -> None:
        """One variable, in its place if it is there; an ARG of that name is hidden from now on."""
        self.args.pop(name, None)
        self.config["Env"] = [f"{key}={one}" for key, one in (self.env | {name: value}).items()]

    def expand(self, text: str) -> str:
        """Raises WordError."""
        return expand(text, self.variables(), self.escape)

    def shell(self) -> list[str]:
        """SHELL."""
        return list(self.config.get("Shell") or ["/bin/sh", "-c"])

    @property
    def workdir(self) -> str:
        return str(self.config.get("WorkingDir") or "/")

    def note(self, what: str, *, is_empty: bool, created: str = "", comment: str = "") -> None:
        """A line of the history."""
        self.created = created or self.created
        line = {"created": self.created, "created_by": what, "empty_layer": is_empty, "comment": comment}
        self.top.setdefault("history", []).append({name: value for name, value in line.items() if value})


_KINDS: dict[str, type] = {"Env": list, "Cmd": list, "Entrypoint": list, "Shell": list, "OnBuild": list}
_KINDS |= {"Labels": dict, "Volumes": dict, "ExposedPorts": dict, "User": str, "WorkingDir": str, "StopSignal": str}


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """The config of a base, which may be a stranger's.  Raises ValueError."""
    settings = {name: value for name, value in found.items() if value is not None}
    for name, kind in _KINDS.items():
        value = settings.get(name, kind())
        if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(word, str) for word in value)):
            raise ValueError(f"the base's {name} is not what it should be")
    return settings


def absolute(state: State, path: str) -> str:
    """A path in the image, relative to WORKDIR."""
    return posixpath.normpath(posixpath.join("/", state.workdir, path)).replace("//", "/")


def declare(state: State, one: Instruction, given: Mapping[str, str], outer: Mapping[str, str]) -> None:
    """ARG.  given: --build-arg; outer: the global arguments.  Raises ValueError."""
    if not one.words:
        raise ValueError("needs a name")
    for word in one.words:
        name, equals, value = word.partition("=")
        name = state.expand(name)
        if not name:
            raise ValueError("a name is missing")
        if name in given:
            state.args[name] = given[name]
        elif equals:
            state.args[name] = state.expand(value)
        elif name in outer:
            state.args[name] = outer[name]
    state.note(f"ARG {' '.join(one.words)}", is_empty=True)


def work_in(state: State, one: Instruction) -> str:
    """WORKDIR; returns where that is.  Raises ValueError."""
    if len(one.words) != 1:
        raise ValueError("needs one argument")
    path = absolute(state, state.expand(one.words[0]))
    state.config["WorkingDir"] = path
    return path


def _env(state: State, one: Instruction, flags: Flags) -> str:
    variables, shown = state.variables(), []
    if not one.words:
        raise ValueError("needs a name and a value")
    for name, value in zip(one.words[::2], one.words[1::2], strict=True):
        key, value = expand(name, variables, state.escape), expand(value, variables, state.escape)
        if not key or "=" in key:
            raise ValueError("a name is missing")
        state.set_env(key, value)
        shown.append(f"{key}={value}")
    return " ".join(shown)


def _label(state: State, one: Instruction, flags: Flags) -> str:
    variables, labels = state.variables(), dict(state.config.get("Labels") or {})
    if not one.words:
        raise ValueError("needs a name and a value")
    for name, value in zip(one.words[::2], one.words[1::2], strict=True):
        key = expand(name, variables, state.escape)
        if not key:
            raise ValueError("a name is missing")
        labels[key] = expand(value, variables, state.escape)
    state.config["Labels"] = labels
    return " ".join(f"{name}={labels[name]}" for name in (expand(n, variables, state.escape) for n in one.words[::2]))


def _expose(state: State, one: Instruction, flags: Flags) -> str:
    ports = dict(state.config.get("ExposedPorts") or {})
    words = [word for text in one.words for word in expand_words(text, state.variables(), state.escape)]
    if not words:
        raise ValueError("needs a port")
    for word in words:
        match = re.fullmatch(r"(?:[^:]*:)?([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp|sctp))?", word.lower())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not 0 <= first <= last <= 65535:
            raise ValueError(f"'{word}' is not a port")
        ports |= {f"{port}/{match[3] or 'tcp'}": {} for port in range(first, last + 1)}
    state.config["ExposedPorts"] = ports
    return " ".join(words)


def _volume(state: State, one: Instruction, flags: Flags) -> str:
    words = [state.expand(word) for word in one.words]
    if not words or not all(words):
        raise ValueError("needs a path")
    state.config["Volumes"] = dict(state.config.get("Volumes") or {}) | {word: {} for word in words}
    return f"[{' '.join(words)}]"


def _user(state: State, one: Instruction, flags: Flags) -> str:
    state.config["User"] = state.expand(_only(one))
    return str(state.config["User"])


def _stop_signal(state: State, one: Instruction, flags: Flags) -> str:
    text = state.expand(_only(one))
    if not _SIGNAL.fullmatch(text.upper()):
        raise ValueError(f"'{text}' is not a signal")
    state.config["StopSignal"] = text
    return text


def _only(one: Instruction) -> str:
    if len(one.words) != 1:
        raise ValueError("needs one argument")
    return one.words[0]


def _shell(state: State, one: Instruction, flags: Flags) -> str:
    if not one.is_json or not one.words:
        raise ValueError('needs a JSON array, as ["/bin/bash", "-c"]')
    state.config["Shell"] = list(one.words)
    return f"[{' '.join(one.words)}]"


def command_words(state: State, one: Instruction) -> list[str]:
    """An instruction's command: its words, or one given to the shell."""
    if one.is_json:
        return list(one.words)
    return [*state.shell(), one.words[-1]] if one.words else []


def _cmd(state: State, one: Instruction, flags: Flags) -> str:
    state.config["Cmd"] = command_words(state, one)
    state.has_command = True
    return _shown(state.config["Cmd"])


def _entrypoint(state: State, one: Instruction, flags: Flags) -> str:
    state.config["Entrypoint"] = command_words(state, one)
    if not state.has_command:
        state.config.pop("Cmd", None)
    return _shown(state.config["Entrypoint"])


def _shown(words: list[str]) -> str:
    return "[" + " ".join(f'"{word}"' for word in words) + "]"


def _healthcheck(state: State, one: Instruction, flags: Flags) -> str:
    kind = one.words[0].upper() if one.words else ""
    if kind == "NONE":
        if len(one.words) > 1 and any(one.words[1:]):
            raise ValueError("NONE takes no arguments")
        state.config["Healthcheck"] = {"Test": ["NONE"]}
        return "NONE"
    words = [word for word in one.words[1:] if word]
    if kind != "CMD" or not words:
        raise ValueError("needs NONE, or CMD and a command")
    test = ["CMD", *words] if one.is_json else ["CMD-SHELL", words[0]]
    found: dict[str, Any] = {"Test": test}
    names = {"interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod", "start-interval": "StartInterval"}
    for flag, key in names.items():
        text = flagging.one(flags, flag)
        if text is not None and (value := flagging.duration_ns(text, flag)):
            found[key] = value
    retries = flagging.one(flags, "retries")
    if retries is not None:
        if not retries.isdigit():
            raise ValueError(f"--retries is a number, not '{retries}'")
        found |= {"Retries": int(retries)} if int(retries) else {}
    state.config["Healthcheck"] = found
    return shlex.join(test)


def _onbuild(state: State, one: Instruction, flags: Flags) -> str:
    if one.trigger is None:
        raise ValueError("needs an instruction")
    if one.trigger.keyword in ("onbuild", "from", "maintainer"):
        raise ValueError(f"{one.trigger.keyword.upper()} is not allowed as a trigger")
    text = one.rest + "".join(f"\n{doc.content}{doc.name}" for doc in one.heredocs)
    state.config["OnBuild"] = [*(state.config.get("OnBuild") or []), text]
    return text


def _maintainer(state: State, one: Instruction, flags: Flags) -> str:
    state.top["author"] = state.expand(_only(one))
    return str(state.top["author"])


CHANGES: dict[str, Callable[[State, Instruction, Flags], str]] = {
    "cmd": _cmd, "entrypoint": _entrypoint, "env": _env, "expose": _expose, "healthcheck": _healthcheck, "label": _label,
    "maintainer": _maintainer, "onbuild": _onbuild, "shell": _shell, "stopsignal": _stop_signal, "user": _user,
    "volume": _volume,
}  # fmt: skip
"""Instructions that change the configuration alone: what the history says of them.  Raise ValueError."""
