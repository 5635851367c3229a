"""What is asked of a build, and the steps that it comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.flags import Flags
    from builder.lexer import Instruction
    from builder.stages import Stage
    from cafs.store import Store


@dataclass(slots=True)
class Request:
    """What is to be built.  args: --build-arg.  contexts: --build-context.  secrets: id -> (kind, where).

    no_cache: None, or names of stages ('' for all).  epoch: SOURCE_DATE_EPOCH, -1 if not given.
    pulls: images of registries are asked for anew.
    """

    target: str = ""
    args: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, tuple[str, str]] = field(default_factory=dict)
    ssh: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    no_cache: set[str] = field(default_factory=set)
    allowed: set[str] = field(default_factory=set)
    network: str = ""
    flags: dict[str, list[str]] = field(default_factory=dict)
    epoch: int = -1
    is_reproducible: bool = False
    cache_from: list[Store] = field(default_factory=list)
    allows_in_layer: set[str] = field(default_factory=set)
    pulls: bool = False


@dataclass(slots=True)
class Step:
    """One instruction of a stage.  number: of the build; where: (its place, how many) in the stage."""

    number: int
    stage: Stage
    one: Instruction
    where: tuple[int, int]
    flags: Flags

    @property
    def title(self) -> str:
        first = " ".join(self.one.original.split("\n")[0].split())
        return f"[{self.stage.label} {self.where[0]}/{self.where[1]}] {first}"
