"""cpool fn: functions, and calls of them.  cpool(1), FUNCTIONS."""

from __future__ import annotations

import click

from cli import _calls as calling
from cli import _pool as asking
from cli._options import Amount, Group, Size, bounds_options, json_option, quiet_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_tenant = click.option("--tenant", metavar="NAME", help="Whose it is, for the pool's owner.")


@click.group(cls=Group)
def fn() -> None:
    """Functions: handlers in warm containers."""


@fn.command()
@click.argument("name")
@click.option("--image", required=True, metavar="IMAGE", help="What it runs in.")
@click.option("--handler", required=True, metavar="H", help="python:MODULE:FUNCTION or jsonl:PROGRAM.")
@click.option("--code", metavar="DIR[:DEST]", help="A directory that is added to the image, at /code.")
@click.option("--cpus", type=Amount(0), default=1.0, help="Processors of an instance (1).")
@click.option("--memory", type=Size(), default=0, metavar="SIZE", help="Memory of an instance (0: no limit).")
@click.option("--gpus", type=click.IntRange(0), default=0, help="GPUs of an instance, for itself (0).")
@bounds_options
@click.option("--timeout", "timeout_s", type=Amount(0, min_open=True), default=300.0, metavar="S", help="A call (300).")
@click.option("--start-timeout", "start_s", type=Amount(0, min_open=True), default=60.0, metavar="S", help="A start (60).")
@click.option("-e", "--env", "env", multiple=True, metavar="K[=V]", help="A variable of its environment.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A file of $CPOOL_SECRETS with that secret.")
@click.option("--constraint", "labels", multiple=True, metavar="LABEL", help="On a host with this label alone.")
@click.option("--zygote", is_flag=True, help="Further instances are forks of the first one's process.")
@click.option("--no-try", "is_sure", is_flag=True, help="Do not start an instance first, to see that it does.")
@_tenant
@quiet_option()
def deploy(name: str, quiet: bool, is_sure: bool, tenant: str | None, **given: Any) -> int:
    """Deploy a function, or a new version of it."""
    version = calling.deploy(name, tenant, is_sure=is_sure, **given)
    if not quiet:
        click.echo(f"{name}@{version}")
    return 0


@fn.command()
@click.argument("name")
@click.option("--timeout", "timeout_s", type=Amount(0), default=None, metavar="S", help="In all.")
@click.option("--key", metavar="KEY", help="Called once: the same key again has the same answer.")
@click.option("--idempotent", is_flag=True, help="It may be done twice, if its worker is lost.")
@click.option("--bytes", "is_bytes", is_flag=True, help="Standard input is bytes, not JSON.")
@_tenant
@quiet_option(used=False)
def call(name: str, tenant: str | None, is_bytes: bool, **how: Any) -> int:
    """Call it with standard input, and print its answer."""
    return calling.call(name, tenant, is_bytes=is_bytes, **how)


@fn.command("map")
@click.argument("name")
@click.option("--parallel", type=click.IntRange(1), default=64, metavar="N", help="Calls at once (64).")
@click.option("--unordered", is_flag=True, help="Answers as they come.")
@click.option("--journal", metavar="FILE", help="Note what is done.")
@click.option("--resume", is_flag=True, help="Leave out what the journal has.")
@click.option("--timeout", "timeout_s", type=Amount(0), default=None, metavar="S", help="Of each call, in all.")
@click.option("--idempotent", is_flag=True, help="Calls may be done twice, if a worker is lost.")
@_tenant
@quiet_option()
def map_(name: str, tenant: str | None, journal: str | None, resume: bool, **how: Any) -> int:
    """Call it for each line of JSON, and print a line for each."""
    if resume and not journal:
        raise click.UsageError("--resume needs --journal FILE")
    return calling.map_lines(name, tenant, journal, is_resumed=resume, **how)


@fn.command()
@click.argument("name")
@click.option("--timeout", "timeout_s", type=Amount(0), default=None, metavar="S", help="In all.")
@click.option("--key", metavar="KEY", help="Called once: the same key again is the same call.")
@_tenant
@quiet_option(used=False)
def spawn(name: str, tenant: str | None, key: str | None, timeout_s: float | None) -> int:
    """Call it with standard input; print the id."""
    click.echo(calling.function(name, tenant).spawn(calling.read_value(), key=key, timeout_s=timeout_s))
    return 0


@fn.command()
@click.argument("call_id", metavar="ID")
@click.option("--wait", "is_waiting", is_flag=True, help="Until it is there.")
@quiet_option(used=False)
def result(call_id: str, is_waiting: bool) -> int:
    """Print the answer of a call; 6: not there yet."""
    return calling.result(call_id, wait=is_waiting)


@fn.command("ls")
@json_option()
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print names alone.")
def ls(as_json: bool, is_quiet: bool) -> int:
    """List functions, and what was measured."""
    columns = {name: name.upper() for name in ("name", "version", "instances", "queued", "calls", "errors", "cold_share")}
    columns |= {"p50_s": "P50", "p95_s": "P95", "p99_s": "P99", "cost": "COST", "problem": ""}
    asking.table(calling.listed(), columns, as_json=as_json, only="name" if is_quiet else "")
    return 0


@fn.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("--call", "call_id", metavar="ID", help="Of that call alone.")
@json_option()
@_tenant
@quiet_option(used=False)
def logs(name: str, follow: bool, call_id: str | None, as_json: bool, tenant: str | None) -> int:
    """Print what its instances have written."""
    calling.logs(name, tenant, is_followed=follow, call_id=call_id, as_json=as_json)
    return 0


@fn.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_tenant
@quiet_option(used=False)
def rm(names: tuple[str, ...], tenant: str | None) -> int:
    """Remove functions; calls that run may end."""
    for name in names:
        calling.change("rm", name, tenant)
    return 0


@fn.command()
@click.argument("name")
@_tenant
@quiet_option()
def rollback(name: str, tenant: str | None, quiet: bool) -> int:
    """Let the version before have the calls again."""
    found = calling.change("rollback", name, tenant)
    if not quiet:
        click.echo(f"{name}@{found['version']}")
    return 0


@fn.command()
@click.option("--once", is_flag=True, help="Show it once, and end.")
@quiet_option(used=False)
def top(once: bool) -> int:
    """Show functions, live."""
    from cli import _top

    _top.show_rows(calling.listed, once=once)
    return 0


@fn.command()
@click.option("--listen", "address", default="127.0.0.1:8080", metavar="HOST:PORT", help="Where (127.0.0.1:8080).")
@click.option("--public", "is_public", is_flag=True, help="Also at an address that others reach; needs --cert and --key.")
@click.option("--cert", metavar="FILE", help="TLS: the certificate, PEM.")
@click.option("--key", metavar="FILE", help="TLS: its key, PEM.")
@quiet_option()
def serve(address: str, is_public: bool, cert: str | None, key: str | None, quiet: bool) -> int:
    """Serve functions over HTTP, for tokens."""
    from pool import gateway

    gateway.serve(asking.directory(), address, is_public=is_public, cert=cert, key=key, is_quiet=quiet)
    return 0


@fn.group()
def token() -> None:
    """Tokens for `fn serve`."""


@token.command("add")
@click.argument("label")
@_tenant
@quiet_option(used=False)
def token_add(label: str, tenant: str | None) -> int:
    """Make one, and print it; a digest is kept."""
    from pool import tokens

    click.echo(tokens.add(asking.directory(), label, tenant or ""))
    return 0


@token.command("ls")
@quiet_option(used=False)
def token_ls() -> int:
    """List their labels."""
    from pool import tokens

    for one in tokens.read(asking.directory()):
        click.echo(one.label + (f" {one.tenant}" if one.tenant else ""))
    return 0


@token.command("rm")
@click.argument("label")
@quiet_option(used=False)
def token_rm(label: str) -> int:
    """Take one back."""
    from pool import tokens

    tokens.remove(asking.directory(), label)
    return 0
