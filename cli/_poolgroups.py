"""The verbs of cpool that have verbs: host, node, secret, cloud."""

from __future__ import annotations

import os
import sys

import click

from cli import _pool as asking
from cli._options import Group, json_option, quiet_option


@click.group(cls=Group)
def host() -> None:
    """Machines that the pool may use."""


@host.command("add")
@click.argument("name")
@click.argument("address", metavar="[[USER@]HOST[:PORT]]", required=False)
@click.option("--identity", metavar="FILE", help="The key to log in with.")
@click.option("--label", "labels", multiple=True, metavar="LABEL", help="What jobs may ask for by --constraint.")
@click.option("--yes", "is_sure", is_flag=True, help="Take the host key that is shown there.")
@quiet_option(used=False)
def host_add(name: str, address: str | None, identity: str | None, labels: tuple[str, ...], is_sure: bool) -> int:
    """Add a machine that is reached by SSH, or this one: local."""
    asking.add_host(name, address, identity, labels, is_sure=is_sure)
    return 0


@host.command("ls")
@json_option()
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print names alone.")
def host_ls(as_json: bool, is_quiet: bool) -> int:
    """List them."""
    columns = {"name": "NAME", "address": "ADDRESS", "state": "STATE"}
    asking.table(asking.hosts(), columns, as_json=as_json, only="name" if is_quiet else "")
    return 0


@host.command("rm")
@click.argument("name")
@quiet_option(used=False)
def host_rm(name: str) -> int:
    """Remove one; its jobs are done elsewhere."""
    asking.change_host(what="remove", name=name)
    return 0


@host.command("setup")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@quiet_option()
def host_setup(names: tuple[str, ...], quiet: bool) -> int:
    """Bring what runs images; else it is done for the first job in one."""
    for name in names:
        asking.set_up_host(name, is_quiet=quiet)
    return 0


@click.group(cls=Group)
def node() -> None:
    """Workers: what they may take."""


@node.command("drain")
@click.argument("name")
@quiet_option(used=False)
def node_drain(name: str) -> int:
    """Let no more jobs go there."""
    asking.set_host_state(name, "drain")
    return 0


@node.command("resume")
@click.argument("name")
@quiet_option(used=False)
def node_resume(name: str) -> int:
    """Let jobs go there again."""
    asking.set_host_state(name, "ready")
    return 0


@click.group(cls=Group)
def secret() -> None:
    """What jobs may know and nobody else."""


@secret.command("set")
@click.argument("name")
@quiet_option(used=False)
def secret_set(name: str) -> int:
    """Keep what comes from standard input."""
    asking.secret("put", name, sys.stdin.buffer.read())
    return 0


@secret.command("ls")
@quiet_option(used=False)
def secret_ls() -> int:
    """List their names."""
    for name in asking.secret("ls"):
        click.echo(name)
    return 0


@secret.command("rm")
@click.argument("name")
@quiet_option(used=False)
def secret_rm(name: str) -> int:
    """Forget one."""
    asking.secret("remove", name)
    return 0


@click.group(cls=Group)
def cloud() -> None:
    """Machines that the pool launches itself."""


@cloud.command("ls")
@click.option("-a", "--all", "all_of_them", is_flag=True, help="Those that have ended, too.")
@json_option()
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print names alone.")
def cloud_ls(all_of_them: bool, as_json: bool, is_quiet: bool) -> int:
    """List them, and what they cost."""
    asking.machines(all_of_them=all_of_them, as_json=as_json, is_quiet=is_quiet)
    return 0


@cloud.command("end")
@click.argument("names", metavar="MACHINE...", nargs=-1, required=True)
@quiet_option(used=False)
def cloud_end(names: tuple[str, ...]) -> int:
    """End machines; their jobs are done elsewhere."""
    with asking.client() as client:
        for name in names:
            client.ask("cloud", what="end", name=name)
    return 0


@cloud.command("resume")
@quiet_option(used=False)
def cloud_resume() -> int:
    """Launch again, after ten machines in a row did not come up."""
    with asking.client() as client:
        client.ask("cloud", what="resume")
    return 0


@cloud.command("prices")
@quiet_option()
def cloud_prices(quiet: bool) -> int:
    """Ask what [[machines]] cost, and write it into pool.toml."""
    from pool import pricing, settings

    path = os.path.join(asking.directory(), "pool.toml")
    prices = pricing.ask(settings.read(asking.directory()))
    pricing.fill(path, prices)
    if not quiet:
        asking.table(
            [{"name": name, "price": price} for name, price in prices.items()],
            {"name": "NAME", "price": "PRICE"},
            as_json=False,
            only="",
        )
    return 0


@cloud.command("policy")
@click.argument("provider", type=click.Choice(["aws"]))
@quiet_option(used=False)
def cloud_policy(provider: str) -> int:
    """Print the IAM policy that the controller needs, and no more."""
    from pool import iam

    click.echo(iam.policy(asking.pool_id()))
    return 0
