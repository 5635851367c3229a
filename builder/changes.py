"""Instructions by themselves, applied to an image's configuration: crun commit --change."""

from __future__ import annotations

from builder import flags as flagging
from builder.config import CHANGES, State, absolute, checked
from builder.lexer import parse
from builder.patterns import os_bytes
from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ALLOWED = (
    "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "ONBUILD", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
)  # fmt: skip


def apply(config: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The 'config' part of an image's configuration after some instructions.  Raises UsageError, DockerfileError."""
    state = State(config=checked(config), has_command=True)
    for text in texts:
        for one in parse(os_bytes(text), "--change").instructions:
            keyword = one.keyword.upper()
            if keyword not in _ALLOWED:
                raise UsageError(f"--change {quote(text)}: {keyword} is not one of {', '.join(_ALLOWED)}")
            try:
                if keyword == "WORKDIR":
                    state.config["WorkingDir"] = absolute(state, state.expand(one.rest))
                else:
                    CHANGES[one.keyword](state, one, flagging.parse(one.keyword, one.flags))
            except ValueError as error:
                raise UsageError(f"--change {quote(text)}: {error}") from None
    return state.config
