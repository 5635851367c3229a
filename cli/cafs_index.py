"""cafs-index: make and read indexes.  man page: cafs-index(1)."""

from __future__ import annotations

import os
import sys

import click

from cli._app import json_path, run, say, write_json, write_lines
from cli._options import (
    CONTEXT,
    Group,
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
    from collections.abc import Iterator

    from cafs.format import Entry
    from cafs.index import Index

PROGRAM = "cafs-index"


@click.group(cls=Group, context_settings=CONTEXT)
@version_option(PROGRAM)
def main() -> None:
    """Index file trees by content, and read what is in an index.

    \b
    cafs-index create ./rootfs -t demo:1
    cafs-index ls demo:1 | wc -l
    cafs-index cat demo:1 /etc/os-release

    Exit status: 0 done, 1 failed, 2 usage, 3 incomplete, 4 no such thing,
    5 corrupt.  Full manual: man cafs-index
    """


@main.command()
@click.argument("source", metavar="SRC")
@click.option("-t", "--tag", metavar="REF", help="Name the image NAME[:TAG] in the store.")
@click.option("-o", "--output", metavar="FILE", help="Write the index to FILE ('-': stdout); needs no store.")
@click.option("-j", "--jobs", type=click.IntRange(1, 64), help="Hashing threads (default: processors).")
@click.option("--base", metavar="IMAGE", help="Keep the layers of IMAGE; add one with what differs.")
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out names like .git, paths like /var/cache/*; repeatable."
)
@click.option("-x", "--one-file-system", is_flag=True, help="Do not enter other mounts.")
@click.option("--numeric", is_flag=True, hidden=True, expose_value=False)  # owners are numbers anyway
@click.option("--platform", metavar="OS/ARCH", help="Of an image for several (default: this machine's).")
@click.option("--rehash", is_flag=True, help="Read every file, whatever is remembered.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out what cannot be read; exit 3.")
@click.option("--hash", "hash_name", type=click.Choice(["sha256", "xxh128"]), help="With -o: the hash (default sha256).")
@click.option("-v", "--verbose", is_flag=True, help="Say what was done and what was left out.")
@json_option()
@store_option()
@quiet_option()
def create(
    source: str,
    tag: str | None,
    output: str | None,
    jobs: int | None,
    exclude: tuple[str, ...],
    base: str | None,
    one_file_system: bool,
    platform: str | None,
    rehash: bool,
    skip_unreadable: bool,
    hash_name: str | None,
    verbose: bool,
    as_json: bool,
    store: str | None,
    quiet: bool,
) -> int:
    """Index SRC and print the image's digest.

    SRC is a directory; a tar archive, plain or compressed with gzip, bzip2, xz
    or zstd: a file, or '-' for stdin; or an image: docker-archive:FILE[:REF]
    (FILE may be '-'), oci:DIR[:TAG], oci-archive:FILE[:TAG],
    docker-daemon:REF, docker://REF.
    """
    from cafs.indexing import Exclusion, Options, create_file, create_image

    if as_json and output == "-":
        raise click.UsageError("--json and '-o -' both want stdout")
    if output is not None:
        exclusive(
            "an index file has no name and no store", ("-o", True), ("-t", tag), ("--store or --scope", names_store(store))
        )
    if base and output is not None:
        raise click.UsageError("--base makes an image: it does not go with -o")
    if hash_name and output is None:
        raise click.UsageError("--hash goes with -o; a store has its own (cafs-store init --hash)")
    options = Options(
        source=source,
        jobs=jobs or os.cpu_count() or 1,
        platform=platform,
        exclude=Exclusion(exclude),
        one_file_system=one_file_system,
        rehash=rehash,
        skip_unreadable=skip_unreadable,
    )
    with progress("indexing", "entries", quiet) as options.progress:
        if output is not None:
            report = create_file(options, output, hash_name or "sha256")
        else:
            report = create_image(options, store_root(store), tag, base)
    if as_json:
        write_json(report.as_json())
    elif report.digest:
        click.echo(report.digest)
    for path, reason in report.skipped:
        say(PROGRAM, f"warning: left out {path}: {reason}")
    for pattern in report.unmatched:
        say(PROGRAM, f"warning: --exclude '{pattern}' matched nothing")
    if verbose:
        say(PROGRAM, report.summary())
    return 3 if report.skipped else 0


@main.command("ls")
@click.argument("image")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("-l", "long", is_flag=True, help="Like ls -l.")
@click.option("-0", "--null", is_flag=True, help="End raw paths with NUL instead of LF.")
@json_option()
@store_option()
@quiet_option(used=False)
def list_entries(image: str, paths: tuple[str, ...], long: bool, null: bool, as_json: bool, store: str | None) -> None:
    """List the paths of IMAGE, one a line, or those at and below PATHs."""
    from cafs import escape, listing

    exclusive("", ("-l", long), ("-0", null), ("--json", as_json))
    index = _load(image, store)
    entries = _chosen(index, paths, image)
    if as_json:
        for entry in entries:
            write_json(listing.as_json(entry) | json_path(entry.path))
    elif long:
        write_lines(listing.long_line(index, entry) for entry in entries)
    elif null:
        sys.stdout.buffer.writelines(entry.path + b"\0" for entry in entries)
    else:
        write_lines(escape.escape(entry.path) for entry in entries)


@main.command()
@click.argument("image")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@store_option()
@quiet_option(used=False)
def stat(image: str, paths: tuple[str, ...], store: str | None) -> None:
    """Print the index lines of PATHs."""
    index = _load(image, store)
    for path in paths:
        sys.stdout.buffer.write(index.entry(_find(index, path, image)).encode())


@main.command()
@click.argument("image")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@store_option()
@quiet_option(used=False)
def cat(image: str, paths: tuple[str, ...], store: str | None) -> None:
    """Write the content of the files at PATHs."""
    from cafs.content import write_content
    from cafs.image import check_hash, load_index
    from cafs.store import Store

    root = store_root(store)
    index, _, found = load_index(image, root)
    if found is None:
        found = Store(root)
        check_hash(index, image, found)
    entries = [_find(index, path, image) for path in paths]
    sys.stdout.flush()
    for entry in entries:
        write_content(index, entry, found, sys.stdout.buffer)


@main.command()
@click.argument("old")
@click.argument("new")
@click.option("--name-only", is_flag=True, help="Print a letter (A, D, M) and the path of each.")
@json_option()
@store_option()
@quiet_option()
def diff(old: str, new: str, name_only: bool, as_json: bool, store: str | None, quiet: bool) -> int:
    """Print what differs between OLD and NEW; exit 3 if anything does.

    Index lines, '-' before those of OLD and '+' before those of NEW.
    """
    from cafs.compare import differences
    from cafs.errors import UsageError
    from cli import _differing as differing

    exclusive("", ("--name-only", name_only), ("--json", as_json))
    before, after = _load(old, store), _load(new, store)
    if (before.header.hash_name, before.header.chunk_size) != (after.header.hash_name, after.header.chunk_size):
        raise UsageError(f"'{old}' and '{new}' are of different hashes or chunk sizes")
    found = differences(before, after)
    if quiet:
        return 3 if next(found, None) else 0
    return differing.print_all(found, (old, new), name_only, as_json)


@main.command()
@click.argument("image")
@click.argument("directory", required=False, metavar="[DIR]")
@click.option("-j", "--jobs", type=click.IntRange(1, 64), help="Hashing threads (default: processors).")
@click.option("--name-only", is_flag=True, help="Print a letter (A, D, M) and the path of each.")
@json_option()
@store_option()
@quiet_option()
def verify(
    image: str, directory: str | None, jobs: int | None, name_only: bool, as_json: bool, store: str | None, quiet: bool
) -> int:
    """Read every file of IMAGE, or compare IMAGE with the tree in DIR.

    Without DIR: exit 5 if content is missing or damaged in the store.
    With DIR, also a mount: print differences as diff does; exit 3 if any.
    """
    from cli import _differing as differing

    exclusive("", ("--name-only", name_only), ("--json", as_json))
    if directory is None:
        for option, value in (("-j", jobs), ("--name-only", name_only), ("--json", as_json)):
            if value:
                raise click.UsageError(f"{option} goes with DIR")
        return differing.verify_content(image, store_root(store), PROGRAM)
    from cafs.compare import differences
    from cafs.indexing import index_directory

    index = _load(image, store)
    found = differences(index, index_directory(directory, index.header, jobs or os.cpu_count() or 1))
    if quiet:
        return 3 if next(found, None) else 0
    return differing.print_all(found, (image, directory), name_only, as_json)


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--svg", metavar="FILE", help="Draw the sharing matrix to FILE.")
@json_option()
@store_option()
@quiet_option(used=False)
def du(images: tuple[str, ...], svg: str | None, as_json: bool, store: str | None) -> None:
    """Print how much IMAGEs hold, share, and add to those before them."""
    from dataclasses import asdict

    from cafs.store import Store
    from cafs.usage import sharing
    from cli import _sharing

    found = sharing(Store(store_root(store)), images)
    if svg:
        _sharing.write_svg(found, svg)
    if as_json:
        write_json(asdict(found))
    else:
        _sharing.write_table(found)


@main.command()
@click.argument("base")
@click.argument("layers", nargs=-1, required=True, metavar="LAYER...")
@click.option("-t", "--tag", metavar="REF", help="Name the image NAME[:TAG] in the store.")
@click.option("-o", "--output", metavar="FILE", help="Write the index to FILE ('-': stdout) instead.")
@store_option()
@quiet_option(used=False)
def merge(base: str, layers: tuple[str, ...], tag: str | None, output: str | None, store: str | None) -> None:
    """Fold LAYERs over BASE into one image.

    BASE is an image or an index, LAYERs are indexes of differences.
    """
    from cafs import atomic
    from cafs.indexing import merge_image
    from cafs.layers import merge as fold

    exclusive("an index file has no name", ("-o", output is not None), ("-t", tag))
    data = fold([_load(one, store) for one in (base, *layers)])
    if output is not None:
        with atomic.output(output) as out:
            out.write(data)
    else:
        click.echo(merge_image(store_root(store), data, base, tag))


@main.command()
@click.argument("image")
@click.argument("dest")
@click.option("-j", "--jobs", type=click.IntRange(1, 64), help="Compressing threads (default: processors).")
@store_option()
@quiet_option(used=False)
def export(image: str, dest: str, jobs: int | None, store: str | None) -> None:
    """Write IMAGE to DEST, the same bytes every time.

    DEST is oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF],
    FILE.tar or '-' (a tar of the tree), or a new directory.
    """
    from cafs.destination import write
    from cafs.image import resolve
    from cafs.store import Store

    opened = Store(store_root(store))
    write(resolve(opened, image), opened, dest, jobs or os.cpu_count() or 1)


def _load(image: str, store: str | None) -> Index:
    from cafs.image import load_index

    return load_index(image, store_root(store))[0]


def _find(index: Index, path: str, image: str) -> int:
    from cafs.errors import NotFound, quote

    entry = index.find(os.fsencode(path))
    if entry is None:
        raise NotFound(f"no {quote(path)} in {quote(image)}", hint=f"cafs-index ls {image}")
    return entry


def _chosen(index: Index, paths: tuple[str, ...], image: str) -> Iterator[Entry]:
    if not paths:
        yield from index.entries()
    for path in paths:
        first = _find(index, path, image)
        below = index.path(first).rstrip(b"/") + b"/"
        yield index.entry(first)
        for number in range(first + 1, len(index)):
            if not index.path(number).startswith(below):
                break
            yield index.entry(number)


@main.command()
@click.argument("image")
@click.option("--from", "records", multiple=True, metavar="FILE", required=True, help="A record; repeatable.")
@click.option("--name", help="Name of the profile (default).")
@click.option("--show", is_flag=True, help="Store nothing; show what was read when.")
@click.option("--svg", metavar="FILE", help="Draw it to FILE, with --show.")
@json_option()
@store_option()
@quiet_option(used=False)
def profile(
    image: str, records: tuple[str, ...], name: str | None, show: bool, svg: str | None, as_json: bool, store: str | None
) -> None:
    """Make a profile of IMAGE from records, for mounts to bring.

    Records are written by cafs-mount and crun run.
    """
    from cafs import image as images
    from cafs.profile import DEFAULT, make
    from cafs.record import parse
    from cafs.store import Store
    from cli._timeline import show_reads, write_svg

    exclusive("nothing is stored", ("--show", show), ("--name", name))
    exclusive("", ("--svg", svg), ("--json", as_json))
    if svg and not show:
        raise click.UsageError("--svg goes with --show")
    opened = Store(store_root(store))
    found = images.resolve(opened, image)
    reads = [read for file in records for read in parse(file, opened.hash_name)]
    if show:
        write_svg(reads, svg) if svg else show_reads(reads, as_json)
        return
    count = make(opened, found, reads, name or DEFAULT)
    if as_json:
        write_json({"image": found.digest.hex(), "name": name or DEFAULT, "objects": count})


def entry() -> None:
    """The console script."""
    run(main, PROGRAM)
