"""A build: the stages that the target needs, step by step, each from the cache if it was made before."""

from __future__ import annotations

import os
from dataclasses import replace

from builder import cache, config, making, parallel, running
from builder import flags as flagging
from builder.config import State
from builder.draft import Draft
from builder.errors import DockerfileError
from builder.lexer import FILE_MAX, Dockerfile, Instruction, parse
from builder.patterns import os_bytes
from builder.request import Request, Step
from builder.stages import Stage, before, check_keyword, needed, platform, sources
from builder.work import Work
from cafs import commit, image, oci
from cafs.errors import CafsError, UsageError, quote
from cafs.image import Image
from cafs.indexing import FOLD_AT
from cafs.layers import merge
from cafs.store import Store
from cafs.writer import Writer
from runner.spec import DEFAULT_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.context import Context
    from builder.progress import Progress

_MANY = 1000
_HEEDED = {"SOURCE_DATE_EPOCH", "BUILDKIT_CACHE_MOUNT_NS"}
"""Arguments that need no ARG."""


class Build:
    """One run.  `run` returns the image, without a ref."""

    def __init__(
        self, writer: Writer, dockerfile: Dockerfile, context: Context | None, request: Request, progress: Progress
    ) -> None:
        self.work = Work(writer, dockerfile, context, request, progress)
        self._first: dict[int, int] = {}

    def run(self) -> Image:
        """Raises DockerfileError, StepError, CafsError."""
        target = self._target()
        waiting = needed(self.work.plan, target)
        for stage in waiting:
            self._first[stage.number] = sum(len(one.instructions) for one in waiting if one.number < stage.number)
        while waiting:
            ready = [stage for stage in waiting if not before(self.work.plan, stage) - set(self.work.states)]
            if len(ready) > 1:
                self.work.writer.flush()
                for number, (state, read, records) in parallel.run(ready, self._elsewhere, self.work.progress).items():
                    self.work.states[number] = state
                    self.work.places.add_read(read)
                    self.work.records |= records
                self.work.store.refresh()
            else:
                self.work.states[ready[0].number] = self._stage(ready[0])
            waiting = [stage for stage in waiting if stage.number not in self.work.states]
        unused = set(self.work.request.args) - self.work.plan.declared - set(self.work.plan.globals) - config.PROXIES
        for name in sorted(unused - _HEEDED):
            what = "does nothing here" if name.startswith("BUILDKIT_") else "is declared by no ARG"
            self.work.progress.warn(f"--build-arg {name} {what}")
        return self._image(self.work.states[target.number])

    def _elsewhere(self, stage: Stage, progress: Progress) -> parallel.Outcome:
        """In a process of its own: build a stage, with a hold on the store of its own."""
        with Writer(Store(self.work.store.root)) as writer:
            context = self.work.context.for_writer(writer) if self.work.context else None
            others = [Store(other.root) for other in self.work.request.cache_from]  # connections are not for two processes
            request = replace(self.work.request, cache_from=others)
            build = Build(writer, self.work.dockerfile, context, request, progress)
            work = build.work
            work.states.update(self.work.states)
            build._first = self._first
            work.places.pulled_now = self.work.places.pulled_now
            state = build._stage(work.plan.stages[stage.number])
            work.places.save()
            return state, work.places.read_files(), work.records

    def _target(self) -> Stage:
        name = self.work.request.target
        found = self.work.plan.find(name, len(self.work.plan.stages)) if name else self.work.plan.stages[-1]
        if found is None:
            raise UsageError(f"no stage {quote(name)} in {self.work.dockerfile.name}", hint=self.work.stage_names())
        return found

    def _error(self, line: int, error: Exception, keyword: str, text: str = "") -> Exception:
        if isinstance(error, DockerfileError | running.StepError):
            return error
        if isinstance(error, CafsError):
            error.args = (f"{self.work.dockerfile.name}:{line}: {keyword.upper()}: {error}",)
            return error
        return DockerfileError(self.work.dockerfile.name, line, f"{keyword.upper()}: {error}", text=text)

    # The base.

    def _stage(self, stage: Stage) -> State:
        try:
            state = self._base(stage)
        except (CafsError, ValueError) as error:
            raise self._error(stage.line, error, "from") from error
        state.escape = self.work.dockerfile.escape
        if self.work.latest_ns() >= 0 and stage.base_stage is None:
            state.key = cache.key_of(state.key, latest_ns=self.work.latest_ns())
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
            return self.work.states[stage.base_stage.number].fork()
        if stage.base == "scratch":
            return State()
        found = self.work.places.base_image(stage.base)
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
            other = self.work.plan.find(name, stage.number)
            if other is not None and other.number not in self.work.states:
                self._first.setdefault(other.number, max(self._first.values(), default=0) + _MANY)
                self.work.states[other.number] = self._stage(other)
        return [replace(one, lines=(stage.line, stage.line)) for one in found]

    # Steps.

    def _step(self, state: State, step: Step) -> None:
        keyword = step.one.keyword
        if keyword == "arg":
            config.declare(state, step.one, self.work.request.args, self.work.plan.globals)
        elif keyword in config.CHANGES:
            what = config.CHANGES[keyword](state, step.one, step.flags)
            state.note(f"{keyword.upper()} {what}", is_empty=True)
        elif keyword == "workdir":
            making.workdir(self.work, state, step)
        elif keyword == "run":
            making.run(self.work, state, step)
        else:
            making.copy(self.work, state, step)

    def _image(self, state: State) -> Image:
        if not state.layers:
            draft = Draft(None, 0)
            data = draft.encode(self.work.header, is_whole=True)
            self.work.writer.flush()
            layer, metadata = commit.add_to(self.work.store, data)
            state.layers, state.metadata = (layer,), (metadata,)
        if len(state.layers) > FOLD_AT:  # each costs a mount and a look-up
            data = merge([image.load_layer(self.work.store, layer) for layer in state.layers])
            layer, metadata = commit.add_to(self.work.store, data)
            state.layers, state.metadata = (layer,), (metadata,)
        if self.work.request.labels:
            state.config["Labels"] = dict(state.config.get("Labels") or {}) | self.work.request.labels
        system, _, architecture = platform().partition("/")
        settings = {
            name: value for name, value in state.config.items() if value not in (None, "", [], {}) or name == "Entrypoint"
        }
        found = {"os": system, "architecture": architecture, **state.top, "config": settings}
        if state.created:
            found["created"] = state.created
        self.work.writer.flush()
        return image.put_layers(self.work.store, state.layers, found, state.metadata)


def read_dockerfile(path: str) -> Dockerfile:
    """Raises CafsError."""
    from cafs import atomic
    from cafs.errors import os_error

    try:
        data = atomic.read_file(path, FILE_MAX)
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    return parse(data, os.path.relpath(path) if os.path.isabs(path) and path.startswith(os.getcwd() + "/") else path)
