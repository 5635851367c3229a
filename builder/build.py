"""A build: the stages that the target needs, step by step, each from the cache if it was made before."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from builder import cache, config, making, parallel, running
from builder import flags as flagging
from builder.config import State
from builder.draft import Draft
from builder.errors import DockerfileError
from builder.lexer import FILE_MAX, Dockerfile, Instruction, parse
from builder.patterns import os_bytes
from builder.places import Places
from builder.request import Request, Step
from builder.stages import Plan, Stage, before, check_keyword, needed, platform, sources, split
from cafs import commit, image, oci
from cafs.errors import CafsError, UsageError, quote
from cafs.format import Header
from cafs.image import Image
from cafs.indexing import FOLD_AT
from cafs.layers import merge
from cafs.steps import Record
from cafs.store import Store
from cafs.writer import Writer
from runner.spec import DEFAULT_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.context import Context
    from builder.progress import Progress
    from cafs.lookup import Node

_MANY = 1000
_HEEDED = {"SOURCE_DATE_EPOCH", "BUILDKIT_CACHE_MOUNT_NS"}
"""Arguments that need no ARG."""


class Build:
    """One run.  Holds the store for writing; `run` returns the image, without a ref."""

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
                raise UsageError(f"--no-cache-filter: no stage {quote(name)} in {dockerfile.name}", hint=self._stages())
        self.states: dict[int, State] = {}
        self.places = Places(self)
        self._first: dict[int, int] = {}
        self.has_run = False
        self.records: dict[str, Record] = {}

    def run(self) -> Image:
        """Raises DockerfileError, StepError, CafsError."""
        target = self._target()
        waiting = needed(self.plan, target)
        for stage in waiting:
            self._first[stage.number] = sum(len(one.instructions) for one in waiting if one.number < stage.number)
        while waiting:
            ready = [stage for stage in waiting if not before(self.plan, stage) - set(self.states)]
            if len(ready) > 1:
                self.writer.flush()
                for number, (state, read, records) in parallel.run(ready, self._elsewhere, self.progress).items():
                    self.states[number] = state
                    self.places.add_read(read)
                    self.records |= records
                self.store.refresh()
            else:
                self.states[ready[0].number] = self._stage(ready[0])
            waiting = [stage for stage in waiting if stage.number not in self.states]
        unused = set(self.request.args) - self.plan.declared - set(self.plan.globals) - config.PROXIES
        for name in sorted(unused - _HEEDED):
            what = "does nothing here" if name.startswith("BUILDKIT_") else "is declared by no ARG"
            self.progress.warn(f"--build-arg {name} {what}")
        return self._image(self.states[target.number])

    def _elsewhere(self, stage: Stage, progress: Progress) -> parallel.Outcome:
        """In a process of its own: build a stage, with a hold on the store of its own."""
        with Writer(Store(self.store.root)) as writer:
            context = self.context.for_writer(writer) if self.context else None
            others = [Store(other.root) for other in self.request.cache_from]  # connections are not for two processes
            request = replace(self.request, cache_from=others)
            build = Build(writer, self.dockerfile, context, request, progress)
            build.states, build._first = self.states, self._first
            build.places.pulled_now = self.places.pulled_now
            state = build._stage(build.plan.stages[stage.number])
            build.places.save()
            return state, build.places.read_files(), build.records

    def _target(self) -> Stage:
        name = self.request.target
        found = self.plan.find(name, len(self.plan.stages)) if name else self.plan.stages[-1]
        if found is None:
            raise UsageError(f"no stage {quote(name)} in {self.dockerfile.name}", hint=self._stages())
        return found

    def _stages(self) -> str:
        return f"there are {', '.join(stage.label for stage in self.plan.stages)}"

    def _error(self, line: int, error: Exception, keyword: str, text: str = "") -> Exception:
        if isinstance(error, DockerfileError | running.StepError):
            return error
        if isinstance(error, CafsError):
            error.args = (f"{self.dockerfile.name}:{line}: {keyword.upper()}: {error}",)
            return error
        return DockerfileError(self.dockerfile.name, line, f"{keyword.upper()}: {error}", text=text)

    # The base.

    def _stage(self, stage: Stage) -> State:
        try:
            state = self._base(stage)
        except (CafsError, ValueError) as error:
            raise self._error(stage.line, error, "from") from error
        state.escape = self.dockerfile.escape
        if self.latest_ns() >= 0 and stage.base_stage is None:
            state.key = cache.key_of(state.key, latest_ns=self.latest_ns())
        if "PATH" not in state.env:
            state.config["Env"] = [f"PATH={DEFAULT_PATH}", *(state.config.get("Env") or [])]
        try:
            instructions = [*self._triggers(state, stage), *stage.instructions]
        except ValueError as error:
            raise self._error(stage.line, error, "from") from error
        for number, one in enumerate(instructions):
            try:
                step = Step(
                    self._first[stage.number] + number + 1,
                    stage,
                    one,
                    (number + 1, len(instructions)),
                    flagging.parse(one.keyword, one.flags),
                )
                self._step(state, step)
            except (CafsError, ValueError) as error:
                raise self._error(one.lines[0], error, one.keyword, one.original) from error
        return state

    def _base(self, stage: Stage) -> State:
        if stage.base_stage is not None:
            return self.states[stage.base_stage.number].fork()
        if stage.base == "scratch":
            return State()
        found = self.places.base_image(stage.base)
        here = oci.host_platform()
        wanted = oci.read_platform(found.config, here)
        if wanted.architecture != here.architecture and (wanted.architecture, here.architecture) != ("386", "amd64"):
            raise CafsError(f"image {quote(stage.base)} is for {wanted}, and nothing is emulated")
        top = {name: value for name, value in found.config.items() if name not in ("config", "rootfs")}
        inner = found.config.get("config")
        settings = config.checked(inner) if isinstance(inner, dict) else {}
        if not isinstance(top.get("history", []), list):
            del top["history"]
        created = str(found.config.get("created") or "")
        return State(found.layers, found.metadata, f"image {found.digest.hex()}", settings, top, created=created)

    def _triggers(self, state: State, stage: Stage) -> list[Instruction]:
        """The base's ONBUILD: carried out right after FROM, and gone then."""
        texts = state.config.pop("OnBuild", None) or []
        found = [one for text in texts for one in parse(os_bytes(text), "ONBUILD").instructions]
        for one in found:
            check_keyword(one)
            if one.keyword in ("from", "onbuild", "maintainer"):
                raise ValueError(f"the base has a trigger {one.keyword.upper()}, which is not allowed")
        for name in sources(found):  # what a trigger needs nobody could know before
            other = self.plan.find(name, stage.number)
            if other is not None and other.number not in self.states:
                self._first.setdefault(other.number, max(self._first.values(), default=0) + _MANY)
                self.states[other.number] = self._stage(other)
        return [replace(one, lines=(stage.line, stage.line)) for one in found]

    # Steps.

    def _step(self, state: State, step: Step) -> None:
        keyword = step.one.keyword
        if keyword == "arg":
            config.declare(state, step.one, self.request.args, self.plan.globals)
        elif keyword in config.CHANGES:
            what = config.CHANGES[keyword](state, step.one, step.flags)
            state.note(f"{keyword.upper()} {what}", is_empty=True)
        elif keyword == "workdir":
            making.workdir(self, state, step)
        elif keyword == "run":
            making.run(self, state, step)
        else:
            making.copy(self, state, step)

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

    def _image(self, state: State) -> Image:
        if not state.layers:
            draft = Draft(None, 0)
            data = draft.encode(self.header, is_whole=True)
            self.writer.flush()
            layer, metadata = commit.add_to(self.store, data)
            state.layers, state.metadata = (layer,), (metadata,)
        if len(state.layers) > FOLD_AT:  # each costs a mount and a look-up
            data = merge([image.load_layer(self.store, layer) for layer in state.layers])
            layer, metadata = commit.add_to(self.store, data)
            state.layers, state.metadata = (layer,), (metadata,)
        if self.request.labels:
            state.config["Labels"] = dict(state.config.get("Labels") or {}) | self.request.labels
        system, _, architecture = platform().partition("/")
        settings = {
            name: value for name, value in state.config.items() if value not in (None, "", [], {}) or name == "Entrypoint"
        }
        found = {"os": system, "architecture": architecture, **state.top, "config": settings}
        if state.created:
            found["created"] = state.created
        self.writer.flush()
        return image.put_layers(self.store, state.layers, found, state.metadata)


def read_dockerfile(path: str) -> Dockerfile:
    """Raises CafsError."""
    from cafs import atomic
    from cafs.errors import os_error

    try:
        data = atomic.read_file(path, FILE_MAX)
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    return parse(data, os.path.relpath(path) if os.path.isabs(path) and path.startswith(os.getcwd() + "/") else path)
