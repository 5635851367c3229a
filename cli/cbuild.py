"""cbuild: images from Dockerfiles.  man page: cbuild(1)."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

import click

from cafs.errors import NotFound, quote
from cli import _built as built
from cli._app import run
from cli._options import Switchable, quiet_option, store_option, store_root, version_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.progress import Progress
    from builder.request import Request

PROGRAM = "cbuild"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


@click.command(cls=Switchable, context_settings=CONTEXT)
@click.argument("context", metavar="CONTEXT")
@click.option("-f", "--file", "file", metavar="FILE", help="The Dockerfile (default: CONTEXT/Dockerfile; '-': stdin).")
@click.option("-t", "--tag", "tags", multiple=True, metavar="REF", help="Name the image NAME[:TAG]; repeatable.")
@click.option("--target", metavar="STAGE", help="Build up to this stage (default: the last).")
@click.option("--build-arg", "args", multiple=True, metavar="K[=V]", help="Set an ARG; K alone takes the caller's value.")
@click.option(
    "--build-context", "contexts", multiple=True, metavar="NAME=SRC", help="A directory, or an image, for FROM and --from."
)
@click.option("--secret", "secrets", multiple=True, metavar="id=ID[,src=FILE|,env=K]", help="For RUN --mount=type=secret.")
@click.option("--ssh", "agents", multiple=True, metavar="default|ID=SOCKET", help="For RUN --mount=type=ssh.")
@click.option("-o", "--output", "outputs", multiple=True, metavar="DEST", help="Also write it: oci:DIR, oci-archive:FILE, ...")
@click.option("--push", is_flag=True, help="Send each REF to its registry.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="A label of the image.")
@click.option("--cache-from", "others", multiple=True, metavar="STORE", help="Take steps from another store too.")
@click.option("--cache-to", metavar="STORE", help="Bring the steps to another store afterwards.")
@click.option(
    "--cache-mount-to", "cache_images", multiple=True, metavar="ID=REF", help="Make an image of what a cache mount holds."
)
@click.option("--no-cache", is_flag=True, help="Carry out every step.")
@click.option("--no-cache-filter", "filters", multiple=True, metavar="STAGE", help="Carry out every step of a stage.")
@click.option("--allow-secret-in-layer", "leaky", multiple=True, metavar="ID", help="Do not look for this secret in files.")
@click.option("--allow", "allowed", multiple=True, metavar="WHAT", help="network.host, security.insecure or device.")
@click.option("--network", metavar="MODE", help="Of RUN: bridge, none or host (default: bridge).")
@click.option("--add-host", "hosts", multiple=True, metavar="NAME:IP", help="A line of /etc/hosts while RUN runs.")
@click.option("--ulimit", "ulimits", multiple=True, metavar="NAME=SOFT[:HARD]", help="A limit of RUN's processes.")
@click.option("--shm-size", metavar="SIZE", help="Of /dev/shm while RUN runs.")
@click.option("--iidfile", metavar="FILE", help="Write the image's digest to FILE.")
@click.option("--metadata-file", metavar="FILE", help="Write what was built to FILE, as JSON.")
@click.option(
    "--progress", "how", type=click.Choice(["auto", "plain", "json"]), default="auto", help="How to say what is done."
)
@click.option("--depfile", metavar="FILE", help="Write a rule for make: what --iidfile's FILE was made of.")
@click.option("--report", metavar="FILE", help="Write a page about what each step took.")
@click.option("--check", is_flag=True, help="Read the Dockerfile and say what is wrong with it.")
@click.option("--explain", is_flag=True, help="Say of each step what it cost, and whether it was made before.")
@click.option("--reproducible", is_flag=True, help="Let nothing in a layer be later than SOURCE_DATE_EPOCH (or 1970).")
@click.option("--squash", is_flag=True, help="Make it one layer.")
@click.option("--platform", metavar="OS/ARCH", help="Only the host's own is there.")
@click.option("--pull", "pulls", is_flag=True, help="Ask registries anew for images like docker://alpine:3.")
@click.option("--rm", is_flag=True, hidden=True, expose_value=False)  # as it is anyway
@store_option()
@quiet_option()
@version_option(PROGRAM)
def main(context: str, **given: object) -> int:
    """Build an image from a Dockerfile and CONTEXT, and print its digest.

    \b
    cbuild -t app:1 .
    git archive HEAD | cbuild -t app:1 -
    cbuild --target test --build-arg V=3 --secret id=npm,src=.npmrc .

    CONTEXT is a directory, or '-': a tar archive, or a Dockerfile, on stdin.

    Exit status: 0 done, 1 failed, 2 usage, 4 no such thing, 7 network, 8 missing
    program.  Full manual: man cbuild
    """
    from builder.output import is_stdout, read
    from cafs import stopping
    from cafs.errors import CafsError
    from cafs.refs import split_ref

    try:
        if os.geteuid():
            from runner import rootless

            rootless.enter()
        for ref in [*built.texts(given["tags"]), *_pairs(given["cache_images"], "--cache-mount-to").values()]:
            split_ref(ref)
        for one in built.texts(given["outputs"]):
            for ref in read(one, tuple(built.texts(given["tags"]))).names:
                split_ref(ref)
        if given["check"]:
            return _check(context, None if given["file"] is None else str(given["file"]), _request(given), given["store"])
        with ExitStack() as stack:
            progress = _progress(str(given["how"]), stack, is_quiet=bool(given["quiet"]))
            digest = _build(progress, context, given)
        # Not while a live display owns the terminal.
        if given["explain"]:
            built.explain(progress)
        if not any(is_stdout(one) for one in built.texts(given["outputs"])):
            click.echo(digest)
        return 0
    except stopping.Ended:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        raise
    except CafsError as error:
        _annotate(str(error))
        raise


def _annotate(message: str) -> None:
    """Have GitHub Actions show an error beside the line that it is about."""
    import re

    place = re.match(r"(.+?):([0-9]+):(?:([0-9]+):)? (.*)", message, re.DOTALL)
    if place and os.environ.get("GITHUB_ACTIONS") == "true":
        text = place[4].replace("%", "%25").replace("\n", "%0A")
        column = f",col={place[3]}" if place[3] else ""
        sys.stderr.write(f"::error file={place[1]},line={place[2]}{column}::{text}\n")


def _progress(how: str, stack: ExitStack, *, is_quiet: bool) -> Progress:
    from builder import progress as saying

    if how == "auto" and not is_quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from cli._building import Terminal

        return stack.enter_context(Terminal())
    return saying.chosen(how, is_quiet=is_quiet)


def _build(progress: Progress, context: str, given: dict[str, object]) -> str:
    """Build and write all that was asked for; returns the image's digest."""
    from builder import cache, cachemounts, scratch
    from builder.build import Build
    from cafs.store import open_or_init
    from cafs.writer import Writer
    from cli._context import opened

    request, tags = _request(given), built.texts(given["tags"])
    file = None if given["file"] is None else str(given["file"])
    scratch.tidy()
    opened_store = open_or_init(store_root(None if given["store"] is None else str(given["store"])))
    with Writer(opened_store) as writer, opened(context, file, writer) as (dockerfile, found):
        build = Build(writer, dockerfile, found, request, progress)
        for line, text in dockerfile.warnings:
            progress.warn(f"{dockerfile.name}:{line}: {text}")
        made = build.run()
        build.work.places.save()
        if given["cache_to"]:
            cache.send(build.work.records, opened_store, open_or_init(_cache("--cache-to", "dest", str(given["cache_to"]))))
        made = built.squashed(opened_store, made) if given["squash"] else made
        for ref in tags:
            opened_store.set_ref(ref, made.digest)
        read = build.work.places.read_files()
    for identity, ref in _pairs(given["cache_images"], "--cache-mount-to").items():
        cachemounts.export(request, opened_store.root, identity, ref)
    built.write(opened_store, made, tuple(tags), given)
    built.write_reports(progress, context if context != "-" else "standard input", read | {dockerfile.name}, given)
    return made.digest.hex()


def _pairs(words: object, what: str, *, takes_caller: bool = False) -> dict[str, str]:
    found = {}
    for word in built.texts(words):
        name, equals, value = word.partition("=")
        if not name or (not equals and not takes_caller):
            raise click.UsageError(f"{what} {word!r} is not K=V")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _request(given: dict[str, object]) -> Request:
    from builder.request import Request
    from builder.stages import check_platform
    from cafs.store import Store

    if given["platform"] is not None:
        try:
            check_platform(str(given["platform"]))
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    args = _pairs(given["args"], "--build-arg", takes_caller=True)
    flags = {name: built.texts(given[key]) for name, key in (("add-host", "hosts"), ("ulimit", "ulimits")) if given[key]}
    flags |= {"shm-size": [str(given["shm_size"])]} if given["shm_size"] else {}
    epoch = args.get("SOURCE_DATE_EPOCH", os.environ.get("SOURCE_DATE_EPOCH", ""))
    request = Request(
        target=str(given["target"] or ""),
        args=args,
        contexts=_pairs(given["contexts"], "--build-context"),
        secrets=dict(map(_secret, built.texts(given["secrets"]))),
        ssh=dict(map(_agent, built.texts(given["agents"]))),
        labels=_pairs(given["labels"], "--label"),
        no_cache={*_names(given["filters"]), *([""] if given["no_cache"] else [])},
        allowed=set(built.texts(given["allowed"])),
        cache_from=[Store(_cache("--cache-from", "src", text)) for text in built.texts(given["others"])],
        allows_in_layer=set(built.texts(given["leaky"])),
        network="" if given["network"] == "default" else str(given["network"] or ""),
        flags=flags,
        epoch=_epoch(epoch) if epoch else 0 if given["reproducible"] else -1,
        is_reproducible=bool(given["reproducible"]),
        pulls=bool(given["pulls"]),
    )
    _check_flags(flags)
    if strange := request.allows_in_layer - request.secrets.keys():
        raise click.UsageError(f"--allow-secret-in-layer {min(strange)}: no --secret has this id")
    for name, where in request.contexts.items():
        if where.startswith(("/", "./", "../")) and not os.path.isdir(where):
            raise NotFound(f"--build-context {name}: no directory {quote(where)}")
    if given["push"] and not given["tags"]:
        raise click.UsageError("--push needs a REF: -t")
    if request.network == "host":
        request.allowed.add("network.host")
    for name in request.allowed - {"network.host", "security.insecure", "device"}:
        raise click.UsageError(f"--allow {name}: network.host, security.insecure or device")
    return request


def _names(texts: object) -> list[str]:
    """Of stages: repeated, or with commas."""
    return [name.strip().lower() for text in built.texts(texts) for name in text.split(",") if name.strip()]


def _check_flags(flags: dict[str, list[str]]) -> None:
    """What RUN would find wrong with them, also if all is cached.  Raises UsageError."""
    from cafs.options import Options
    from runner import cgroups, etc, privileges

    options = Options(flags, [])
    privileges.ulimits(options)
    for text in flags.get("shm-size", []):
        cgroups.size(text)
    for text in flags.get("add-host", []):
        etc.host(text)


def _epoch(text: str) -> int:
    """Seconds since 1970."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise click.UsageError(f"SOURCE_DATE_EPOCH is a number of seconds, not {text!r}")
    return int(text)


def _cache(option: str, where: str, text: str) -> str:
    """The address of a store with steps; of docker's caches only type=local is one.  where: its field for a directory."""
    from cafs import paths

    if text.startswith("type="):
        fields = dict(field.partition("=")[::2] for field in text.split(","))
        kind, text = fields.pop("type"), fields.pop(where, "")
        if kind != "local" or not text or fields not in ({}, {"mode": "max"}):
            raise click.UsageError(f"{option} takes a store: DIRECTORY, type=local,{where}=DIRECTORY or s3://BUCKET/PREFIX")
    return paths.located(text)


def _secret(text: str) -> tuple[str, tuple[str, str]]:
    fields = dict(field.partition("=")[::2] for field in text.split(","))
    name = fields.pop("id", "")
    kind = fields.pop("type", "env" if "env" in fields else "file")
    where = fields.pop("src", None) or fields.pop("source", None) or fields.pop("env", None) or name
    if not name or fields or kind not in ("file", "env"):
        raise click.UsageError(f"--secret {text!r} is not id=ID,src=FILE or id=ID,env=VARIABLE")
    if kind == "file" and not os.path.exists(where):
        raise NotFound(f"secret {quote(name)}: no file {quote(where)}")
    return name, (kind, where)


def _agent(text: str) -> tuple[str, str]:
    name, equals, socket = text.partition("=")
    socket = socket if equals else os.environ.get("SSH_AUTH_SOCK", "")
    if not name or not socket:
        raise click.UsageError(f"--ssh {text!r}: no socket is given, and SSH_AUTH_SOCK is not set")
    if not os.path.exists(socket):
        raise NotFound(f"no ssh agent at {quote(socket)}")
    return name, socket


def _check(context: str, file: str | None, request: Request, given_store: object) -> int:
    """What can be seen without building."""
    from builder import checking
    from builder.build import read_dockerfile
    from builder.lexer import parse
    from cli._context import dockerfile_of

    if "-" in (context, file):
        dockerfile = parse(sys.stdin.buffer.read(), "Dockerfile")
    else:
        dockerfile = read_dockerfile(file or dockerfile_of(context))
    found = sorted(
        {
            *dockerfile.warnings,
            *checking.check(dockerfile, request, store_root(None if given_store is None else str(given_store))),
        }
    )
    for line, text in found:
        click.echo(f"{dockerfile.name}:{line}: {text}")
        _annotate(f"{dockerfile.name}:{line}: {text}")
    return 1 if found else 0


def entry() -> None:
    """The console script."""
    run(main, PROGRAM)
