"""cafs-store: look after a store.  man page: cafs-store(1)."""

from __future__ import annotations

import click

from cafs.paths import located
from cli._app import run, say, write_json
from cli._options import (
    CONTEXT,
    Amount,
    Group,
    Size,
    exclusive,
    json_option,
    names_store,
    quiet_option,
    store_option,
    store_root,
    version_option,
)
from cli._progress import progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.store import Store

PROGRAM = "cafs-store"


@click.group(cls=Group, context_settings=CONTEXT)
@version_option(PROGRAM)
def main() -> None:
    """Look after a store: images, names, checks.

    \b
    cafs-store ls
    cafs-store tag demo:1 demo:latest
    cafs-store fsck

    Exit status: 0 done, 1 failed, 2 usage, 4 no such thing, 5 corrupt.
    Full manual: man cafs-store
    """


@main.command()
@click.option("--hash", "hash_name", type=click.Choice(["sha256", "xxh128"]), default="sha256", help="Hash of the store.")
@click.option("--group", metavar="GROUP", help="Let members of GROUP read it (default: its owner alone).")
@store_option()
@quiet_option(used=False)
def init(hash_name: str, group: str | None, store: str | None) -> None:
    """Make a store, or leave one with the same hash as it is."""
    from cafs.store import init as make

    make(store_root(store), hash_name, group=group)


@main.command("ls")
@json_option()
@quiet_option()
@store_option()
def list_refs(as_json: bool, quiet: bool, store: str | None) -> None:
    """List refs and the images they name."""
    from cafs.store import Store

    exclusive("", ("-q", quiet), ("--json", as_json))
    opened = Store(store_root(store))
    for ref in opened.refs():
        digest = _digest_of(opened, ref)
        if digest is None:
            continue
        if as_json:
            write_json({"ref": ref, "digest": digest.hex()})
        else:
            click.echo(ref if quiet else f"{ref}\t{digest.hex()}")


def _digest_of(store: Store, ref: str) -> bytes | None:
    """What a ref names; one damaged ref does not stop the rest."""
    from cafs.errors import CafsError

    try:
        return store.get_ref(ref)
    except CafsError as error:
        say(PROGRAM, f"warning: {error}")
        return None


@main.command()
@json_option()
@store_option()
@quiet_option(used=False)
def info(as_json: bool, store: str | None) -> None:
    """Print where the store is and how much is in it."""
    from cafs.fsck import totals
    from cafs.store import Store

    found = totals(Store(store_root(store)))
    if as_json:
        write_json(found)
    else:
        for name, value in found.items():
            click.echo(f"{name}\t{'-' if value is None else value}")


@main.command()
@click.argument("image")
@click.argument("ref")
@store_option()
@quiet_option(used=False)
def tag(image: str, ref: str, store: str | None) -> None:
    """Make REF name IMAGE."""
    from cafs.errors import os_error
    from cafs.image import resolve
    from cafs.refs import split_ref
    from cafs.store import Store
    from cafs.writer import Writer

    opened = Store(store_root(store))
    found = resolve(opened, image)
    split_ref(ref)
    try:
        with Writer(opened) as writer:  # a lease: what the ref is to name must not be collected before it does
            writer.claim(opened.meta_name(found.digest, "image"))
            opened.set_ref(ref, found.digest)
    except OSError as error:
        raise os_error(f"cannot tag '{ref}'", error) from error


@main.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@store_option()
@quiet_option(used=False)
def untag(refs: tuple[str, ...], store: str | None) -> None:
    """Remove REFs; the images stay until gc."""
    from cafs.store import Store

    opened = Store(store_root(store))
    for ref in refs:
        opened.remove_ref(ref)


@main.command("rm")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@store_option()
@quiet_option(used=False)
def remove(images: tuple[str, ...], store: str | None) -> None:
    """Remove every ref of IMAGEs; the content stays until gc."""
    from cafs.image import resolve
    from cafs.store import Store

    opened = Store(store_root(store))
    for name in images:
        digest = resolve(opened, name).digest
        for ref in opened.refs():
            if _digest_of(opened, ref) == digest:
                opened.remove_ref(ref)


@main.command()
@click.option("-n", "--dry-run", is_flag=True, help="Delete nothing; say what would be.")
@click.option("--grace", type=Amount(0), metavar="SECONDS", help="Wait so long before deleting (86400).")
@click.option("--steps", type=Amount(0), metavar="SECONDS", help="Keep steps of builds used since (604800).")
@json_option()
@store_option()
@quiet_option()
def gc(dry_run: bool, grace: float | None, steps: float | None, as_json: bool, store: str | None, quiet: bool) -> None:
    """Delete what no ref and no mount needs.

    What is found is deleted by the first run after the grace time.
    """
    from dataclasses import asdict

    exclusive("", ("-q", quiet), ("--json", as_json))
    from cafs.collect import GRACE_S, collect
    from cafs.steps import KEPT_S
    from cafs.store import Store

    kept_s = KEPT_S if steps is None else steps
    wait_s = GRACE_S if grace is None else grace
    report = collect(Store(store_root(store)), grace_s=wait_s, dry_run=dry_run, steps_s=kept_s)
    if as_json:
        write_json(asdict(report))
    elif not quiet:
        for name, value in asdict(report).items():
            click.echo(f"{name}\t{value}")


@main.command()
@click.argument("image")
@click.argument("url")
@click.option("-t", "--tag", metavar="REF", help="Name it so there (default: as here).")
@json_option()
@store_option()
@quiet_option()
def push(image: str, url: str, tag: str | None, as_json: bool, store: str | None, quiet: bool) -> None:
    """Copy IMAGE to the store at URL, which is made if need be.

    Only what is missing there is sent.
    """
    from cafs.store import Store, open_or_init

    source = Store(store_root(store))
    target = open_or_init(located(url), source.hash_name, source.chunk_size)
    _copy(image, source, target, tag, as_json, quiet)


@main.command()
@click.argument("image")
@click.argument("url", required=False, metavar="[URL]")
@click.option("-t", "--tag", metavar="REF", help="Name it so here (default: as there).")
@click.option("--bwlimit", type=Size(), default=0, metavar="RATE", help="Bytes a second to the cache, like 20M.")
@json_option()
@store_option()
@quiet_option()
def pull(image: str, url: str | None, tag: str | None, bwlimit: int, as_json: bool, store: str | None, quiet: bool) -> None:
    """Copy IMAGE from the store at URL to ours; without URL to the cache.

    Only what is missing is fetched.
    """
    from cafs.store import Store, open_or_init

    if url is None:
        from cafs import complete

        for option, value in (("--tag", tag), ("--json", as_json)):
            if value:
                raise click.UsageError(f"{option} goes with URL")
        complete.pull(store_root(store), image, bwlimit)
        return
    if bwlimit:
        raise click.UsageError("--bwlimit goes without URL")
    source = Store(located(url))
    target = open_or_init(store_root(store), source.hash_name, source.chunk_size)
    _copy(image, source, target, tag, as_json, quiet)


@main.command()
@click.argument("image")
@store_option()
@quiet_option(used=False)
def pin(image: str, store: str | None) -> None:
    """Let what the cache has of IMAGE stay, whatever the quota."""
    from cafs import complete

    complete.pin(store_root(store), image)


@main.command()
@click.argument("image")
@store_option()
@quiet_option(used=False)
def unpin(image: str, store: str | None) -> None:
    """Let IMAGE go from the cache again when it is the oldest."""
    from cafs import kept, paths, quota
    from cafs.errors import NotFound, quote

    if not quota.unpin(paths.cache(), kept.find(store_root(store), image).image.digest):
        raise NotFound(f"image {quote(image)} is not pinned")


def _copy(name: str, source: Store, target: Store, tag: str | None, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from cafs.image import resolve
    from cafs.refs import is_ref, split_ref
    from cafs.transfer import copy

    found = resolve(source, name)
    named = name.partition("@")[0]
    if tag is None and is_ref(named) and source.get_ref(named) is not None:
        tag = ":".join(split_ref(named))
    with progress("copying", "objects", quiet) as report:
        moved = copy(found, source, target, tag, report)
    if as_json:
        write_json(asdict(moved) | {"digest": found.digest.hex(), "ref": tag})


@main.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@click.option("--cache", "is_cache", is_flag=True, help="Verify the cache, not the store.")
@json_option()
@quiet_option()
@store_option()
def fsck(repair: bool, is_cache: bool, as_json: bool, quiet: bool, store: str | None) -> int:
    """Verify everything; a line a finding; exit 5 if any."""
    exclusive("", ("-q", quiet), ("--json", as_json))
    exclusive("the cache is of all stores", ("--cache", is_cache), ("--store or --scope", names_store(store)))
    if is_cache:
        from cafs import cachecheck, paths

        findings = cachecheck.check(paths.cache(), repair=repair)
    else:
        from cafs.fsck import check
        from cafs.store import Store

        findings = check(Store(store_root(store)), repair=repair)
    bad = 0
    for finding in findings:
        bad += not finding.repaired
        if as_json:
            write_json({"problem": finding.problem, "subject": finding.subject, "repaired": finding.repaired})
        elif not quiet:
            click.echo(f"{finding.problem}\t{finding.subject}" + ("\trepaired" if finding.repaired else ""))
    return 5 if bad else 0


def entry() -> None:
    """The console script."""
    run(main, PROGRAM)
