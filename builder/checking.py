"""What is wrong with a Dockerfile, as far as can be said without building: all of it, not the first alone.

Every instruction is read as a build would, with the arguments that were given; nothing is run, and no file of the context is
looked at.  What a base sets is known if it is an image of the store.
"""

from __future__ import annotations

from builder import config, making, steps
from builder import flags as flagging
from builder.config import State
from builder.lexer import Dockerfile
from builder.stages import Plan, Stage, split
from builder.words import UnsetError
from cafs import image
from cafs.errors import CafsError
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.lexer import Instruction
    from builder.request import Request


def check(dockerfile: Dockerfile, request: Request, store_root: str) -> list[tuple[int, str]]:
    """(line, what is wrong there), by line.  Raises DockerfileError for what cannot be read at all."""
    plan = split(dockerfile, request.args, request.target, request.contexts)
    found: list[tuple[int, str]] = []
    states: dict[int, tuple[State, bool]] = {}
    for stage in plan.stages:
        state, is_known = _base(stage, states, store_root)
        state.escape = dockerfile.escape
        for one in stage.instructions:
            try:
                _read(state, plan, request, one)
            except UnsetError as error:
                if is_known:  # else the base may set it
                    found.append((one.lines[0], f"{one.keyword.upper()}: {error}"))
            except (ValueError, CafsError) as error:
                found.append((one.lines[0], f"{one.keyword.upper()}: {error}"))
        states[stage.number] = state, is_known
    if request.target and plan.find(request.target, len(plan.stages)) is None:
        found.append((1, f"no stage '{request.target}'"))
    return sorted(found)


def _base(stage: Stage, states: dict[int, tuple[State, bool]], store_root: str) -> tuple[State, bool]:
    """What a stage begins with, and whether all of that is known."""
    if stage.base_stage is not None:
        state, is_known = states[stage.base_stage.number]
        return state.fork(), is_known
    if stage.base == "scratch":
        return State(), True
    try:
        found = image.resolve(Store(store_root), stage.base).config.get("config")
        return State(config=config.checked(found) if isinstance(found, dict) else {}), True
    except (CafsError, ValueError):
        return State(), False


def _read(state: State, plan: Plan, request: Request, one: Instruction) -> None:
    """One instruction, and what it changes for those after it.  Raises ValueError, CafsError."""
    flags = flagging.parse(one.keyword, one.flags)
    if one.keyword == "arg":
        config.declare(state, one, request.args, plan.globals)
    elif one.keyword == "workdir":
        config.work_in(state, one)
    elif one.keyword == "run":
        steps.read(state, one, flags)
    elif one.keyword in ("copy", "add"):
        making.copy_words(state, one)
        making.origin_of(flags)
        making.how_to(state, flags, None)
        state.expand(flagging.one(flags, "chown") or "")
    elif one.keyword in config.CHANGES:
        config.CHANGES[one.keyword](state, one, flags)
