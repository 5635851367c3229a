"""What a build works on, shared by its stages: the store, the Dockerfile, the options, and what was made so far."""

from __future__ import annotations

import time

from builder.places import Places
from builder.stages import Plan, split
from cafs.errors import UsageError, quote
from cafs.format import Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.config import State
    from builder.context import Context
    from builder.lexer import Dockerfile
    from builder.progress import Progress
    from builder.request import Request
    from cafs.lookup import Node
    from cafs.steps import Record
    from cafs.writer import Writer


class Work:
    """The data of one build.

    writer: holds the store for writing.  states: what each finished stage has come to, by number.  records: of the steps that
    were carried out, by key.  has_run: whether any step was.  Raises UsageError.
    """

    def __init__(
        self, writer: Writer, dockerfile: Dockerfile, context: Context | None, request: Request, progress: Progress
    ) -> None:
        self.writer = writer
        self.store = writer.store
        self.dockerfile = dockerfile
        self.context = context
        self.request = request
        self.progress = progress
        self.header = Header(self.store.hash_name, self.store.chunk_size)
        request.contexts = {name.lower(): where for name, where in request.contexts.items()}
        self.plan: Plan = split(dockerfile, request.args, request.target, request.contexts)
        for name in sorted(request.no_cache - {""}):
            if self.plan.find(name, len(self.plan.stages)) is None:
                raise UsageError(f"--no-cache-filter: no stage {quote(name)} in {dockerfile.name}", hint=self.stage_names())
        self.states: dict[int, State] = {}
        self.places = Places(writer, context, request, self.plan, self.states)
        self.has_run = False
        self.records: dict[str, Record] = {}

    def stage_names(self) -> str:
        """A hint that lists the stages."""
        return f"there are {', '.join(stage.label for stage in self.plan.stages)}"

    def tree(self, state: State) -> Node | None:
        """The root of what a stage has come to, None if that is nothing."""
        return self.places.tree(state.layers) if state.layers else None

    def latest_ns(self) -> int:
        """The time that nothing in a layer is later than, -1 if there is none."""
        return self.request.epoch * 10**9 if self.request.is_reproducible and self.request.epoch >= 0 else -1

    def now_ns(self) -> int:
        """For what is made now."""
        return self.request.epoch * 10**9 if self.request.epoch >= 0 else time.time_ns()

    def now_text(self) -> str:
        """The same, as an image's configuration has it (RFC 3339)."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now_ns() // 10**9))
