"""The steps that make layers: WORKDIR, COPY, ADD and RUN; from the cache, or carried out and remembered."""

from __future__ import annotations

import time

from builder import adding, cache, config, copying, leaks, running, steps
from builder import flags as flagging
from builder.config import State, absolute
from builder.draft import Draft
from builder.patterns import Ignore, PatternError, os_bytes
from cafs import commit, image
from cafs.errors import CafsError, NotFound, quote
from cafs.image import Image
from cafs.steps import Record, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.flags import Flags
    from builder.lexer import Heredoc, Instruction
    from builder.request import Step
    from builder.work import Work

_TAIL = 4096


def workdir(work: Work, state: State, step: Step) -> None:
    """The directory, made as the user's if it is missing.  Raises CafsError, ValueError."""
    path = config.work_in(state, step.one)
    if path == "/":
        state.note("WORKDIR /", is_empty=True)
        return
    key = cache.key_of(state.key, workdir=path, user=state.config.get("User") or "", epoch=work.request.epoch)

    def make() -> bytes:
        draft = Draft(work.tree(state), work.now_ns())
        draft.make_directory(os_bytes(path), 0o755, _owner_of_user(work, state))
        return _encode(work, state, draft)

    _cached(work, state, step, key, f"WORKDIR {path}", make)


def _owner_of_user(work: Work, state: State) -> tuple[int, int]:
    user = str(state.config.get("User") or "")
    tree = work.tree(state)
    try:
        return work.places.owner(tree, user) if user and tree else (0, 0)
    except CafsError:
        return 0, 0


def _cached(work: Work, state: State, step: Step, key: str, what: str, make: Callable[[], bytes]) -> None:
    """Take a step's layer from the cache, or make it and remember it."""
    began = time.monotonic()
    wanted = work.request.no_cache
    may_find = "" not in wanted and not {step.stage.name, str(step.stage.number)} & (wanted - {""})
    found = cache.find(work.store, key) if may_find else None
    work.progress.begin(step.number, step.title)
    data = None
    if found is None:
        with cache.alone(key):
            if may_find:
                found = cache.find(work.store, key) or cache.bring(work.request.cache_from, key, work.writer)
            if found is None:
                data = make()
                found = _keep(work, data, key, time.monotonic() - began)
    if data is None:
        work.progress.cached(step.number, found.seconds)
    else:
        work.progress.done(step.number, time.monotonic() - began, len(data))
    work.records[key] = found
    if found.layer:
        state.layers, state.metadata = (*state.layers, found.layer), (*state.metadata, found.metadata)
    state.key = key
    created = found.created if work.request.epoch < 0 else work.now_text()
    state.note(what, is_empty=not found.layer, created=created, comment="cafs")


def _keep(work: Work, data: bytes, key: str, seconds: float) -> Record:
    work.writer.flush()
    created = work.now_text()
    made = commit.add_to(work.store, data) if data else None
    layer, metadata = made if made else (b"", b"")
    record = Record(layer, metadata, created, seconds)
    write(work.store, key, record)
    return record


def _encode(work: Work, state: State, draft: Draft) -> bytes:
    """The layer, b'' if nothing is changed; the first one of an empty stage is a whole tree."""
    return draft.encode(work.header, is_whole=not state.layers, latest_ns=work.latest_ns())


def copy_words(state: State, one: Instruction) -> tuple[list[str], list[Heredoc], str]:
    """(sources, documents that are sources, destination) of COPY and ADD, expanded.  Raises ValueError."""
    words = [state.expand(word) for word in one.words if not _is_heredoc(one, word)]
    documents = list(one.heredocs)
    if one.heredocs and one.words and _is_heredoc(one, one.words[-1]):
        raise ValueError("a heredoc cannot be the destination")
    if len(words) + len(documents) < 2 or not words:
        raise ValueError("needs a source and a destination")
    return words[:-1], documents, words[-1]


def origin_of(flags: Flags) -> str | None:
    """--from.  Raises ValueError."""
    origin = flagging.one(flags, "from")
    if origin is not None and "$" in origin:
        raise ValueError("no variables in --from: define a stage with FROM and use that")
    return origin


def how_to(state: State, flags: Flags, owner: tuple[int, int] | None) -> copying.How:
    """What the flags say of how to copy.  owner: --chown, looked up.  Raises ValueError."""
    text = flagging.one(flags, "chmod")
    chmod = flagging.mode_of(state.expand(text)) if text else None
    try:
        exclude = Ignore(flags["exclude"]) if "exclude" in flags else None
    except PatternError as error:
        raise ValueError(str(error)) from None
    is_linked = flagging.is_on(flags, "link")
    return copying.How(owner, chmod, flagging.is_on(flags, "parents"), exclude, follows=not is_linked)


def copy(work: Work, state: State, step: Step) -> None:
    """COPY and ADD.  Raises CafsError, ValueError."""
    one, flags, keyword = step.one, step.flags, step.one.keyword
    sources, documents, target = copy_words(state, one)
    is_directory = target.endswith("/") or target in ("", ".") or target.endswith("/.") or len(sources) + len(documents) > 1
    place = absolute(state, target)
    chown = flagging.one(flags, "chown")
    how = how_to(state, flags, work.places.owner(work.tree(state), state.expand(chown)) if chown else None)
    origin = origin_of(flags)
    found = adding.gather(work, state, step, sources, documents, origin)
    key = cache.key_of(
        "" if flagging.is_on(flags, "link") else state.key,
        copy=place,
        keyword=keyword,
        is_directory=is_directory,
        flags={name: values for name, values in flags.items() if name not in ("from", "checksum", "chmod", "chown")},
        chmod=state.expand(flagging.one(flags, "chmod") or ""),
        owner=how.owner,
        epoch=work.request.epoch,
        files=found.fingerprint(how),
    )
    if flagging.is_on(flags, "link"):
        key = cache.key_of(state.key, link=key)

    def make() -> bytes:
        draft = Draft(work.tree(state), work.now_ns())
        found.put(draft, place, is_directory=is_directory, how=how)
        return _encode(work, state, draft)

    shown = [f"--{name}={value}" for name, values in flags.items() for value in values]
    what = " ".join([keyword.upper(), *shown, *sources, *(f"<<{doc.name}" for doc in documents), target, "# buildkit"])
    _cached(work, state, step, key, what, make)


def run(work: Work, state: State, step: Step) -> None:
    """RUN.  Raises CafsError, ValueError."""
    command, definition, finish = steps.command_of(work, state, step)
    arguments = {name: value for name, value in state.args.items() if name not in config.PROXIES}
    key = cache.key_of(state.key, **definition)
    what = " ".join([f"|{len(arguments)} {' '.join(f'{k}={v}' for k, v in arguments.items())}"] if arguments else [])
    what = f"RUN {what + ' ' if what else ''}{' '.join(config.command_words(state, step.one) or ['heredoc'])} # buildkit"

    def make() -> bytes:
        if not state.layers:
            raise NotFound(f"{quote(command.words[0])}: a stage of nothing has no programs")
        work.writer.flush()
        tail = bytearray()

        def said(data: bytes) -> None:
            tail.extend(data)
            del tail[: max(len(tail) - _TAIL, 0)]
            work.progress.output(step.number, data)

        below = Image(state.layers, {}, metadata=state.metadata)
        try:
            with finish() as ready:
                ready.trusts_cache, work.has_run = work.has_run, True
                data = running.run(work.writer, below, work.places.tree(state.layers), ready, said, work.latest_ns())
        except leaks.LeakError as error:
            raise CafsError(str(error), hint=f"--allow-secret-in-layer {error.name}") from None
        except running.StepError as error:
            raise _failed(work, below, step, error, bytes(tail)) from None
        return b"" if data.count(b"\n") == 2 else data

    _cached(work, state, step, key, what, make)


def _failed(work: Work, below: Image, step: Step, error: running.StepError, tail: bytes) -> running.StepError:
    made = image.put_layers(work.store, below.layers, {}, below.metadata)
    line = step.one.lines[0]
    first = " ".join(step.one.original.split("\n")[0].split())
    work.progress.failed(tail)
    found = running.StepError(f"{work.dockerfile.name}:{line}: {first}: {error}", error.code)
    found.hint = f"crun run --rm -it {made.digest.hex()[:12]} sh   opens a shell where it failed"
    return found


def _is_heredoc(one: Instruction, word: str) -> bool:
    return bool(one.heredocs) and not one.is_json and "<<" in word
