"""A build: the stages that the target needs, step by step, each from the cache if it was made before."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace

from builder import adding, cache, config, copying, leaks, parallel, running
from builder import flags as flagging
from builder.config import State, absolute
from builder.draft import Draft
from builder.errors import DockerfileError
from builder.lexer import Dockerfile, Instruction, parse
from builder.patterns import Ignore, PatternError, os_bytes
from builder.places import Places
from builder.stages import Plan, Stage, before, check_keyword, needed, platform, sources, split
from cafs import commit, image
from cafs.errors import CafsError, NotFound, UsageError, quote
from cafs.format import Header
from cafs.image import Image
from cafs.store import Store
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.context import Context
    from builder.flags import Flags
    from builder.progress import Progress
    from cafs.lookup import Node

_TAIL = 4096
_MANY = 1000


@dataclass(slots=True)
class Request:
    """What is to be built.  args: --build-arg.  contexts: --build-context.  secrets: id -> (kind, where).

    no_cache: None, or names of stages ('' for all).  epoch: SOURCE_DATE_EPOCH, -1 if not given.
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
    allows_in_layer: set[str] = field(default_factory=set)


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
        self.states: dict[int, State] = {}
        self.places = Places(self)
        self._first: dict[int, int] = {}
        self._has_run = False

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
                for number, (state, read) in parallel.run(ready, self._elsewhere, self.progress).items():
                    self.states[number] = state
                    self.places.add_read(read)
                self.store.refresh()
            else:
                self.states[ready[0].number] = self._stage(ready[0])
            waiting = [stage for stage in waiting if stage.number not in self.states]
        unused = set(self.request.args) - self.plan.declared - set(self.plan.globals) - _proxies()
        for name in sorted(one for one in unused if not one.startswith("BUILDKIT_") and one != "SOURCE_DATE_EPOCH"):
            self.progress.warn(f"no ARG declares --build-arg {name}")
        return self._image(self.states[target.number])

    def _elsewhere(self, stage: Stage, progress: Progress) -> tuple[State, set[str]]:
        """In a process of its own: build a stage, with a hold on the store of its own."""
        with Writer(Store(self.store.root)) as writer:
            context = self.context.for_writer(writer) if self.context else None
            build = Build(writer, self.dockerfile, context, self.request, progress)
            build.states, build._first = self.states, self._first
            state = build._stage(build.plan.stages[stage.number])
            build.places.save()
            return state, build.places.read_files()

    def _target(self) -> Stage:
        name = self.request.target
        found = self.plan.find(name, len(self.plan.stages)) if name else self.plan.stages[-1]
        if found is None:
            names = ", ".join(stage.label for stage in self.plan.stages)
            raise UsageError(f"no stage {quote(name)} in {self.dockerfile.name}", hint=f"there are {names}")
        return found

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
        if self._latest_ns() >= 0 and stage.base_stage is None:
            state.key = cache.key_of(state.key, latest_ns=self._latest_ns())
        if "PATH" not in state.env:
            state.config["Env"] = [f"PATH={config.DEFAULT_PATH}", *(state.config.get("Env") or [])]
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
        wanted = found.config.get("architecture")
        if wanted and wanted != platform().partition("/")[2] and (wanted, platform()) != ("386", "linux/amd64"):
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
            self._arg(state, step)
        elif keyword in config.CHANGES:
            what = config.CHANGES[keyword](state, step.one, step.flags)
            state.note(f"{keyword.upper()} {what}", is_empty=True)
        elif keyword == "workdir":
            self._workdir(state, step)
        elif keyword == "run":
            self._run(state, step)
        else:
            self._copy(state, step)

    def _arg(self, state: State, step: Step) -> None:
        if not step.one.words:
            raise ValueError("needs a name")
        for word in step.one.words:
            name, equals, value = word.partition("=")
            name = state.expand(name)
            if not name:
                raise ValueError("a name is missing")
            if name in self.request.args:
                state.args[name] = self.request.args[name]
            elif equals:
                state.args[name] = state.expand(value)
            elif name in self.plan.globals:
                state.args[name] = self.plan.globals[name]
        state.note(f"ARG {' '.join(step.one.words)}", is_empty=True)

    def _workdir(self, state: State, step: Step) -> None:
        if len(step.one.words) != 1:
            raise ValueError("needs one argument")
        path = absolute(state, state.expand(step.one.words[0]))
        state.config["WorkingDir"] = path
        if path == "/":
            state.note("WORKDIR /", is_empty=True)
            return
        key = cache.key_of(state.key, workdir=path, user=state.config.get("User") or "", epoch=self.request.epoch)

        def make() -> bytes:
            draft = Draft(self.tree(state), self.now_ns())
            draft.make_directory(os_bytes(path), 0o755, self._owner_of_user(state))
            return self._encode(state, draft)

        self._cached(state, step, key, f"WORKDIR {path}", make)

    def _owner_of_user(self, state: State) -> tuple[int, int]:
        user = str(state.config.get("User") or "")
        tree = self.tree(state)
        try:
            return self.places.owner(tree, user) if user and tree else (0, 0)
        except CafsError:
            return 0, 0

    def _cached(self, state: State, step: Step, key: str, what: str, make: Callable[[], bytes]) -> None:
        """Take a step's layer from the cache, or make it and remember it."""
        began = time.monotonic()
        wanted = self.request.no_cache
        may_find = "" not in wanted and not (step.stage.name and step.stage.name in wanted)
        found = cache.find(self.store, key) if may_find else None
        self.progress.begin(step.number, step.title)
        if found is None:
            with cache.alone(key):
                found = cache.find(self.store, key) if may_find else None
                if found is None:
                    data = make()
                    found = self._keep(state, data, key, time.monotonic() - began)
                    self.progress.done(step.number, time.monotonic() - began, len(data))
                else:
                    self.progress.cached(step.number, found.seconds)
        else:
            self.progress.cached(step.number, found.seconds)
        if found.layer:
            state.layers, state.metadata = (*state.layers, found.layer), (*state.metadata, found.metadata)
        state.key = key
        created = found.created if self.request.epoch < 0 else self._now_text()
        state.note(what, is_empty=not found.layer, created=created, comment="cafs")

    def _now_text(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now_ns() // 10**9))

    def _keep(self, state: State, data: bytes, key: str, seconds: float) -> cache.Record:
        self.writer.flush()
        created = self._now_text()
        made = commit.add_to(self.store, data) if data else None
        layer, metadata = made if made else (b"", b"")
        record = cache.Record(layer, metadata, created, seconds)
        cache.put(self.store, key, record)
        return record

    def _encode(self, state: State, draft: Draft) -> bytes:
        """The layer, b'' if nothing is changed; the first one of an empty stage is a whole tree."""
        return draft.encode(self.header, is_whole=not state.layers, latest_ns=self._latest_ns())

    def tree(self, state: State) -> Node | None:
        """The root of what a stage has come to, None if that is nothing."""
        return self.places.tree(state.layers) if state.layers else None

    def _latest_ns(self) -> int:
        """The time that nothing in a layer is later than, -1 if there is none."""
        return self.request.epoch * 10**9 if self.request.is_reproducible and self.request.epoch >= 0 else -1

    def now_ns(self) -> int:
        """For what is made now."""
        return self.request.epoch * 10**9 if self.request.epoch >= 0 else time.time_ns()

    # COPY and ADD.

    def _copy(self, state: State, step: Step) -> None:
        one, flags, keyword = step.one, step.flags, step.one.keyword
        words = [state.expand(word) for word in one.words if not _is_heredoc(one, word)]
        documents = list(one.heredocs)
        if one.heredocs and one.words and _is_heredoc(one, one.words[-1]):
            raise ValueError("a heredoc cannot be the destination")
        if len(words) + len(documents) < 2 or not words:
            raise ValueError("needs a source and a destination")
        target, sources = words.pop(), words
        is_directory = target.endswith("/") or target in ("", ".") or target.endswith("/.") or len(sources) + len(documents) > 1
        place = absolute(state, target)
        how = self._how(state, flags)
        origin = flagging.one(flags, "from")
        if origin is not None and "$" in origin:
            raise ValueError("no variables in --from: define a stage with FROM and use that")
        found = adding.gather(self, state, step, sources, documents, origin)
        key = cache.key_of(
            "" if flagging.is_on(flags, "link") else state.key,
            copy=place,
            keyword=keyword,
            is_directory=is_directory,
            flags={name: values for name, values in flags.items() if name not in ("from", "checksum", "chmod", "chown")},
            chmod=state.expand(flagging.one(flags, "chmod") or ""),
            owner=how.owner,
            epoch=self.request.epoch,
            files=found.fingerprint(how),
        )
        if flagging.is_on(flags, "link"):
            key = cache.key_of(state.key, link=key)

        def make() -> bytes:
            draft = Draft(self.tree(state), self.now_ns())
            found.put(draft, place, is_directory=is_directory, how=how)
            return self._encode(state, draft)

        shown = [f"--{name}={value}" for name, values in flags.items() for value in values]
        what = " ".join([keyword.upper(), *shown, *sources, *(f"<<{doc.name}" for doc in documents), target, "# buildkit"])
        self._cached(state, step, key, what, make)

    def _how(self, state: State, flags: Flags) -> copying.How:
        owner = chmod = None
        text = flagging.one(flags, "chown")
        if text:
            owner = self.places.owner(self.tree(state), state.expand(text))
        text = flagging.one(flags, "chmod")
        if text:
            chmod = flagging.mode_of(state.expand(text))
        try:
            exclude = Ignore(flags["exclude"]) if "exclude" in flags else None
        except PatternError as error:
            raise ValueError(str(error)) from None
        is_linked = flagging.is_on(flags, "link")
        return copying.How(owner, chmod, flagging.is_on(flags, "parents"), exclude, follows=not is_linked)

    # RUN.

    def _run(self, state: State, step: Step) -> None:
        from builder import steps

        command, definition, finish = steps.command_of(self, state, step)
        arguments = {name: value for name, value in state.args.items() if name not in state.env and name not in _proxies()}
        key = cache.key_of(state.key, **definition)
        what = " ".join([f"|{len(arguments)} {' '.join(f'{k}={v}' for k, v in arguments.items())}"] if arguments else [])
        what = f"RUN {what + ' ' if what else ''}{' '.join(config.command_words(state, step.one) or ['heredoc'])} # buildkit"

        def make() -> bytes:
            if not state.layers:
                raise NotFound(f"{quote(command.words[0])}: a stage of nothing has no programs")
            self.writer.flush()
            tail = bytearray()

            def said(data: bytes) -> None:
                tail.extend(data)
                del tail[: max(len(tail) - _TAIL, 0)]
                self.progress.output(step.number, data)

            below = Image(state.layers, {}, metadata=state.metadata)
            try:
                with finish() as ready:
                    ready.trusts_cache, self._has_run = self._has_run, True
                    data = running.run(self.writer, below, self.places.tree(state.layers), ready, said, self._latest_ns())
            except leaks.LeakError as error:
                raise CafsError(str(error), hint=f"--allow-secret-in-layer {error.name}") from None
            except running.StepError as error:
                raise self._failed(below, step, error, bytes(tail)) from None
            return b"" if data.count(b"\n") == 2 else data

        self._cached(state, step, key, what, make)

    def _failed(self, below: Image, step: Step, error: running.StepError, tail: bytes) -> running.StepError:
        made = image.put_layers(self.store, below.layers, {}, below.metadata)
        line = step.one.lines[0]
        first = " ".join(step.one.original.split("\n")[0].split())
        self.progress.failed(tail)
        found = running.StepError(f"{self.dockerfile.name}:{line}: {first}: {error}", error.code)
        found.hint = f"crun run --rm -it {made.digest.hex()[:12]} sh   opens a shell where it failed"
        return found

    def _image(self, state: State) -> Image:
        if not state.layers:
            draft = Draft(None, 0)
            data = draft.encode(self.header, is_whole=True)
            self.writer.flush()
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


def _is_heredoc(one: Instruction, word: str) -> bool:
    return bool(one.heredocs) and not one.is_json and "<<" in word


def _proxies() -> set[str]:
    return {*config.PROXIES, *(name.lower() for name in config.PROXIES)}


def read_dockerfile(path: str) -> Dockerfile:
    """Raises CafsError."""
    from cafs import atomic
    from cafs.errors import os_error

    try:
        data = atomic.read_file(path, 16 << 20)
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    return parse(data, os.path.relpath(path) if os.path.isabs(path) and path.startswith(os.getcwd() + "/") else path)
