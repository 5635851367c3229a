"""cafs-mount: mount an image, list mounts, unmount.  man page: cafs-mount(1)."""

from __future__ import annotations

import click

from cli._app import ENGINES, is_terminal, run, say, write_json
from cli._options import CONTEXT, Size, json_option, quiet_option, store_option, store_root, version_option

PROGRAM = "cafs-mount"


@click.command(context_settings=CONTEXT)
@version_option(PROGRAM)
@click.argument("image", required=False)
@click.argument("directory", required=False, metavar="DIR")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", help="How to mount (default: auto).")
@click.option("--rw", "upper", metavar="UPPERDIR", help="Let it be written to; changes go to UPPERDIR/upper.")
@click.option("--record", metavar="FILE", help="Write what is read to FILE, for cafs-index profile.")
@click.option("--prefetch", metavar="PROFILE|all|none", default="", help="Bring this profile (default: 'default').")
@click.option("--bwlimit", type=Size(), default=0, metavar="RATE", help="Bytes a second for --prefetch all, like 20M.")
@click.option("--foreground", is_flag=True, help="Stay until unmounted; log to stderr.")
@click.option("--log", metavar="FILE", help="Log to FILE instead of syslog.")
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=60.0, help="Seconds for a fetch, then EIO (60).")
@click.option("--suid", is_flag=True, help="As root: honour set-user-id bits and devices.")
@click.option("--unmount", "-u", "unmount", metavar="DIR", help="Unmount DIR.")
@click.option("--list", "-l", "listing", is_flag=True, help="List what is mounted.")
@click.option("--reload", is_flag=True, help="Let the program that is installed now take over all mounts.")
@click.option("-v", "--verbose", is_flag=True, help="Say which engine is used, and why.")
@json_option()
@store_option()
@quiet_option()
def main(
    image: str | None,
    directory: str | None,
    engine: str,
    upper: str | None,
    record: str | None,
    prefetch: str,
    bwlimit: int,
    foreground: bool,
    log: str | None,
    timeout: float,
    suid: bool,
    unmount: str | None,
    listing: bool,
    reload: bool,
    verbose: bool,
    as_json: bool,
    store: str | None,
    quiet: bool,
) -> None:
    """Mount IMAGE read-only on DIR; files are fetched when they are read.

    \b
    cafs-mount demo:1 /mnt/x
    cafs-mount --list
    cafs-mount --unmount /mnt/x

    Exit status: 0 done, 1 failed, 2 usage, 4 no such thing, 5 corrupt,
    6 busy, 8 missing privilege or program.  Full manual: man cafs-mount
    """
    from cafs import mount as mounting
    from cafs.request import Request

    if listing or reload or unmount is not None:
        if image is not None or listing + reload + (unmount is not None) > 1:
            raise click.UsageError("--list, --reload and --unmount go alone")
        if unmount is not None:
            mounting.unmount(unmount)
        elif reload:
            mounting.reload()
        else:
            _list(as_json)
        return
    if image is None or directory is None:
        raise click.UsageError("IMAGE and DIR are needed")
    extra = {"suid", "dev"} if suid else {"nosuid", "nodev"}
    request = Request(
        image,
        directory,
        store=store_root(store),
        log=log,
        extra=extra,
        limit_s=timeout,
        foreground=foreground,
        engine=engine,
        upper=upper,
        record=record,
        prefetch=prefetch,
        rate=bwlimit,
    )
    note = mounting.mount(request)
    for warning in request.warnings:
        say(PROGRAM, f"warning: {warning}")
    if request.why and verbose:
        say(PROGRAM, request.why)
    if note and not quiet and is_terminal():
        say(PROGRAM, note)


def _list(as_json: bool) -> None:
    from cafs.mount import listing

    for row in listing():
        if as_json:
            write_json(row)
        else:
            click.echo(f"{row['mountpoint']}\t{row['image'] or '-'}\t{row['digest']}\t{row['engine']}\t{row['pid'] or '-'}")


def entry() -> None:
    """The console script."""
    run(main, PROGRAM)
