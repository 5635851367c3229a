"""cpool: a pool of machines that runs jobs.  man page: cpool(1)."""

from __future__ import annotations

import os
import sys

import click

from cli import _fn, _poolgroups
from cli import _pool as asking
from cli._app import run
from cli._options import CONTEXT, Amount, Group, Size, bounds_options, json_option, quiet_option, version_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROGRAM = "cpool"
PLAIN = {"allow_interspersed_args": False}
"""What comes after the first word that is no option belongs to the command."""


@click.group(cls=Group, context_settings=CONTEXT)
@version_option(PROGRAM)
def main() -> None:
    """Run jobs on a pool of machines, this one among them.

    \b
    cpool init ; cpool serve &
    cpool submit --cpus 2 --no-container -- make all ; cpool wait 1
    ls *.csv | cpool map --no-container -- wc -l {}

    Exit status: 0 done, 1 failed, 2 usage, 4 no such thing, 5 damaged, 6 busy,
    7 no controller, 8 not possible here; of wait the job's own, of map how
    many failed (101: more).  Full manual: man cpool
    """


def _job_options(command: Callable[..., object]) -> Callable[..., object]:
    """What a job asks for."""
    for option in reversed(
        (
            click.option("--image", metavar="IMAGE", help="Run it in this image, by crun."),
            click.option("--no-container", "is_plain", is_flag=True, help="Run it as a plain command."),
            click.option("--cpus", type=Amount(0), default=1.0, help="Processors that it has for itself (1)."),
            click.option("--memory", type=Size(), default=0, metavar="SIZE", help="Memory that it has for itself (0)."),
            click.option("--gpus", type=click.IntRange(0), default=0, help="GPUs that it has for itself (0)."),
            click.option("-e", "--env", "env", multiple=True, metavar="K[=V]", help="A variable of its environment."),
            click.option(
                "--secret", "secrets", multiple=True, metavar="NAME", help="A file of $CPOOL_SECRETS with that secret."
            ),
            click.option("--workdir", metavar="DIR", help="Where it runs (default: here, or the image's)."),
            click.option("--timeout", type=Amount(0), default=0.0, metavar="S", help="End it after so many seconds."),
            click.option("--retries", type=click.IntRange(0), default=0, help="How often it is tried again if it fails (0)."),
            click.option("--no-requeue", is_flag=True, help="Do not start it again if its worker is lost."),
            click.option("--queue-timeout", type=Amount(0), default=0.0, metavar="S", help="Cancel it if it waits longer."),
            click.option("--disk", type=Size(), default=0, metavar="SIZE", help="Free disk that its worker is to have (0)."),
            click.option("--strict", is_flag=True, help="Never twice at once: a lost worker ends it before another begins."),
            click.option(
                "--start-timeout",
                type=Amount(0),
                default=0.0,
                metavar="S",
                help="Elsewhere if it has not begun.",
            ),
            click.option("--constraint", "labels", multiple=True, metavar="LABEL", help="On a host with this label alone."),
            click.option("--exclude", multiple=True, metavar="NAME", help="Not on this worker."),
            click.option("--tenant", metavar="NAME", help="Whose it is, if the pool's owner submits it."),
            click.option("--priority", type=int, default=0, help="Those of higher priority go first (0)."),
        )
    ):
        command = option(command)
    return command


def _file_options(command: Callable[..., object]) -> Callable[..., object]:
    """Files that go to a job and come back from it."""
    for option in reversed(
        (
            click.option(
                "--in", "given_files", multiple=True, metavar="FILE[:NAME]", help="A file that is there where it runs."
            ),
            click.option("--out", "back", multiple=True, metavar="NAME", help="A file that it leaves."),
            click.option("--code", metavar="DIR[:DEST]", help="A directory that is added to the image, at /code."),
        )
    ):
        command = option(command)
    return command


def _with_code(given: dict[str, Any]) -> dict[str, Any]:
    """Options, with what --code is."""
    code = given.pop("code")
    if not code:
        return given
    from cli import _calls

    if not given["image"]:
        raise click.UsageError("--code needs --image IMAGE")
    return given | {"image": _calls.with_code(given["image"], code), "workdir": given["workdir"] or _calls.code_place(code)}


@main.command()
@quiet_option(used=False)
def init() -> int:
    """Make a pool: in $CAFS_POOL, else $XDG_STATE_HOME/cafs/pool."""
    from cafs import atomic, paths
    from pool import settings, state

    directory = asking.directory()
    paths.make_private(directory)
    state.create(directory)
    path = os.path.join(directory, "pool.toml")
    if not os.path.exists(path):
        atomic.replace_file(path, settings.COMMENTED.encode(), 0o600)
    return 0


_config = click.option("--config", metavar="FILE", help="Instead of the pool's pool.toml.")


@main.command()
@_config
@quiet_option(used=False)
def serve(config: str | None) -> int:
    """Be the controller, until SIGTERM or Ctrl-C.  Jobs go on."""
    from pool import client

    client.serve(asking.directory(), config)
    return 0


@main.command()
@click.option("--seconds", type=Amount(0.1), default=20.0, help="At most so long (20).")
@_config
@quiet_option(used=False)
def tick(seconds: float, config: str | None) -> int:
    """Do one step of what `serve` does, for cron: hear, place, record."""
    from pool import client

    client.tick(asking.directory(), seconds, config)
    return 0


@main.command()
@click.option("--grace", "grace_s", type=float, default=10.0, metavar="S", help="From SIGTERM to SIGKILL (10).")
@quiet_option(used=False)
def down(grace_s: float) -> int:
    """Cancel all jobs, then end agents and controller."""
    from pool import client

    client.down(asking.directory(), grace_s)
    return 0


@main.command(context_settings=PLAIN)
@_job_options
@click.option("--key", metavar="KEY", help="Submitted once: the same key again is the same job.")
@click.option("--name", default="", metavar="TEXT", help="What to call it.")
@click.option("--hold", is_flag=True, help="Do not start it before `release`.")
@click.option("--array", metavar="N-M[%L]", help="A job for each number, which is CPOOL_INDEX; L at once.")
@_file_options
@click.option("--after", "after", type=int, multiple=True, metavar="JOB", help="When that job has ended well.")
@quiet_option(used=False)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(key: str | None, hold: bool, array: str | None, **given: Any) -> int:
    """Put a job into the queue, and print its number."""
    given = _with_code(given)
    said, files = asking.files([one.partition(":")[::2] for one in given.pop("given_files")], given.pop("back"))
    numbers, spec = asking.numbers(array), asking.spec(**given, has_files=bool(said)) | said
    if array:
        spec |= {"array": int.from_bytes(os.urandom(6), "big"), "at_once": asking.at_once(array)}
    jobs = []
    for index in numbers:
        own = f"{key}-{index}" if key and array else key
        jobs.append({"spec": {**spec, "index": index}, "key": own, "hold": hold, "priority": given["priority"]})
    for number in asking.submit(jobs, files):
        click.echo(number)
    return 0


@main.command("map", context_settings=PLAIN)
@_job_options
@_file_options
@click.option("-0", "--null", "is_null", is_flag=True, help="Arguments end in a zero byte, not a newline.")
@click.option("-n", "size", type=click.IntRange(1), default=1, metavar="N", help="So many arguments a job (1).")
@click.option("-k", "--keep-order", is_flag=True, help="Results in the order of the arguments.")
@click.option("--tag", is_flag=True, help="Begin each line with the argument.")
@click.option("--halt", type=click.IntRange(1), default=None, metavar="N", help="End all when so many have failed.")
@click.option("--joblog", default="", metavar="FILE", help="Write a line a job, as GNU parallel does.")
@click.option("--resume", is_flag=True, help="Leave out what the job log has.")
@click.option("--resume-failed", is_flag=True, help="The same, but do again what failed.")
@click.option("--results", default="", metavar="DIR", help="Keep what each has written in files there, too.")
@click.option("--eta", is_flag=True, help="Say how long it will take.")
@click.option("--dry-run", is_flag=True, help="Print the commands.")
@quiet_option(used=False)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def map_(**given: Any) -> int:
    """Run COMMAND for each line of standard input; {} is the line.

    \b
    ls *.csv | cpool map --no-container -- wc -l {}
    ls *.csv | cpool map --image py:1 --in c.py --in {} -- python3 c.py {}
    cpool map --no-container echo {1} {2} ::: a b ::: 1 2 3
    """
    import shlex

    from pool import arguments, client, mapping

    names = ("keep_order", "tag", "joblog", "resume", "resume_failed", "results", "eta")
    how = {name: given.pop(name) for name in names}
    separator, halt, dry_run = b"\0" if given.pop("is_null") else b"\n", given.pop("halt") or 0, given.pop("dry_run")
    size, source = given.pop("size"), sys.stdin.buffer
    template, values = arguments.given([word for at, word in enumerate(given["command"]) if at or word != "--"])
    if not template:
        raise click.UsageError("COMMAND is missing")
    groups = arguments.Arguments(source, separator, size) if values is None else arguments.in_groups(values, size)
    if dry_run:
        for number, one in enumerate(groups, 1):
            click.echo(shlex.join(arguments.expand(template, one, number)))
        return 0
    given = _with_code(given)
    names, back = given.pop("given_files"), given.pop("back")

    def files(words: list[str], number: int) -> tuple[dict[str, Any], dict[str, str]]:
        def filled(text: str) -> str:
            return arguments.filled(text, words, number)

        parts = [one.partition(":") for one in names]  # before a colon of an argument is in it
        named = [(filled(path), filled(name) if colon else asking.in_its_place(filled(path))) for path, colon, name in parts]
        return asking.files(named, [filled(one) for one in back])

    spec = asking.spec(**given, has_files=bool(names or back))
    how |= {"files": files if names or back else None, "bring": asking.bring if back else None}
    options = mapping.Options(template, spec, priority=given["priority"], halt=halt, **how)
    with client.controlled(asking.directory()) as connection:
        return mapping.Map(connection, options).run(groups)


@main.command()
@click.option("-a", "--all", "all_of_them", is_flag=True, help="Those that have ended, too.")
@click.option("--limit", type=click.IntRange(1), default=1000, help="The latest so many (1000).")
@json_option()
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print numbers alone.")
def jobs(all_of_them: bool, limit: int, as_json: bool, is_quiet: bool) -> int:
    """List the jobs."""
    found = asking.ask("jobs", all=all_of_them, limit=limit)["jobs"]
    asking.table(
        found,
        {"id": "JOB", "state": "STATE", "worker": "WORKER", "code": "CODE", "attempt": "TRY", "command": "COMMAND"},
        as_json=as_json,
        only="id" if is_quiet else "",
    )
    return 0


@main.command()
@click.argument("number", metavar="JOB", type=int)
@json_option()
@quiet_option(used=False)
def job(number: int, as_json: bool) -> int:
    """Say all there is to say of a job."""
    asking.describe(asking.ask("job", id=number)["job"], as_json=as_json)
    return 0


@main.command()
@click.argument("number", metavar="JOB", type=int)
@click.option("-f", "--follow", is_flag=True, help="Go on until it has ended.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="Print the output of attempt N, not of the last.")
@quiet_option(used=False)
def logs(number: int, follow: bool, attempt: int | None) -> int:
    """Print what a job has written."""
    import base64

    from cafs import atomic, stopping
    from pool.client import reading

    offsets = {"out": 0, "err": 0}
    left_out = 0
    with reading(asking.directory(), number) as client:
        while True:
            over, has_moved = 0, False
            for stream, fd in (("out", 1), ("err", 2)):
                found = client.ask("read", id=number, stream=stream, offset=offsets[stream], attempt=attempt or 0)
                data, is_running = base64.b64decode(found["data"]), not found["job"]["finished_s"]
                atomic.write_all(fd, data)
                left_out += found["next"] - offsets[stream] - len(data)
                is_still = found["next"] == offsets[stream]
                offsets[stream], has_moved = found["next"], has_moved or not is_still
                over += is_still and (found["end"] or (is_running and not follow))
            if over == 2:
                break
            if not has_moved:
                stopping.wait(seconds=0.1)
    if is_running and left_out:
        sys.stderr.write(f"cpool: job {number}: {left_out} bytes were left out: output_max in pool.toml\n")
    return 3 if asking.lacks(found["job"]) or left_out else 0


@main.command("exec", context_settings=PLAIN)
@click.option("-i", "--interactive", is_flag=True, help="With our standard input.")
@click.option("-t", "--tty", is_flag=True, help="On a terminal.")
@quiet_option(used=False)
@click.argument("number", metavar="JOB", type=int)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(interactive: bool, tty: bool, number: int, command: tuple[str, ...]) -> int:
    """Run COMMAND beside a job that runs, in its container."""
    return asking.run_beside(number, command, "i" * interactive + "t" * tty)


@main.command()
@click.argument("number", metavar="JOB", type=int)
@click.argument("directory", metavar="[DIR]", default=".")
@quiet_option(used=False)
def fetch(number: int, directory: str) -> int:
    """Wait for a job, and bring the files of its --out here."""
    return 3 if asking.fetch(number, directory) else 0


@main.command()
@click.argument("numbers", metavar="JOB...", type=int, nargs=-1, required=True)
@quiet_option(used=False)
def wait(numbers: tuple[int, ...]) -> int:
    """Wait for jobs to end; the exit code is the last one's."""
    code = 0
    jobs = asking.ended(numbers)
    if jobs:
        return asking.exit_code(jobs[-1])
    with asking.client() as client:
        client.wait_for(list(numbers))
        for _ in set(numbers):
            found = client.event()
            if found and found["job"]["id"] == numbers[-1]:
                code = asking.exit_code(found["job"])
    return code


@main.command()
@click.argument("numbers", metavar="JOB...", type=int, nargs=-1, required=True)
@click.option("--grace", "grace_s", type=float, default=10.0, metavar="S", help="From SIGTERM to SIGKILL (10).")
@quiet_option(used=False)
def cancel(numbers: tuple[int, ...], grace_s: float) -> int:
    """End jobs, with all of their processes."""
    from pool import client

    client.cancel(asking.directory(), list(numbers), grace_s)
    return 0


@main.command()
@click.argument("numbers", metavar="JOB...", type=int, nargs=-1, required=True)
@quiet_option(used=False)
def hold(numbers: tuple[int, ...]) -> int:
    """Keep jobs that wait from starting."""
    asking.ask("release", ids=numbers, hold=True)
    return 0


@main.command()
@click.argument("numbers", metavar="JOB...", type=int, nargs=-1, required=True)
@quiet_option(used=False)
def release(numbers: tuple[int, ...]) -> int:
    """Let jobs go that were held."""
    asking.ask("release", ids=numbers, hold=False)
    return 0


@main.command()
@click.option("--once", is_flag=True, help="Show it once, and end.")
@quiet_option(used=False)
def top(once: bool) -> int:
    """Show workers and jobs, live."""
    from cli import _top

    with asking.client() as client:
        _top.show(client, once=once)
    return 0


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@quiet_option(used=False)
def events(follow: bool) -> int:
    """Print what has happened to jobs and machines, as JSON lines."""
    asking.show_events(is_followed=follow)
    return 0


@main.command()
@quiet_option(used=False)
def metrics() -> int:
    """Print the pool in numbers, as Prometheus reads them."""
    with asking.client() as client:
        click.echo(client.ask("metrics")["text"], nl=False)
    return 0


@main.command()
@json_option()
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print names alone.")
def nodes(as_json: bool, is_quiet: bool) -> int:
    """List the workers."""
    names = {
        "name": "NAME",
        "address": "ADDRESS",
        "state": "STATE",
        "jobs": "JOBS",
        "free_cpus": "FREE",
        "cpus": "CPUS",
        "reason": "",
    }
    asking.table(asking.ask("nodes")["nodes"], names, as_json=as_json, only="name" if is_quiet else "")
    return 0


@main.command()
@click.option("--trace", required=True, metavar="CSV", help="When jobs came: times first; - for standard input.")
@click.option("--config", metavar="FILE", help="Machines and policy (default: the pool's pool.toml).")
@click.option("--duration", default="lognormal:10", metavar="DIST", help="How long jobs take, if the trace does not say.")
@click.option("--cpus", type=Amount(0, min_open=True), default=1.0, help="What they need, if it does not say (1).")
@click.option("--seed", type=int, default=1, help="Of what is drawn (1).")
@click.option("--sweep", is_flag=True, help="Policies of spare capacity beside each other.")
@click.option("--goal", metavar="p99=S", help="The cheapest of them that keeps this.")
@click.option("--svg", metavar="FILE", help="Draw them: paid for / needed against waiting.")
@click.option("--functions", "are_calls", is_flag=True, help="They are calls of a function; what follows is of it.")
@click.option("--start", "start_s", type=Amount(0), default=0.5, metavar="S", help="A start takes so long (0.5).")
@bounds_options
@json_option()
@quiet_option()
def simulate(
    trace: str, config: str | None, duration: str, cpus: float, seed: int, sweep: bool, goal: str | None, svg: str | None,
    are_calls: bool, start_s: float, as_json: bool, quiet: bool, **bounds: Any,
) -> int:  # fmt: skip
    """Say what a policy would cost and how long jobs would wait."""
    from cli import _simulating

    given = _simulating.Trace(trace, config, duration, cpus, seed, is_quiet=quiet, as_json=as_json)
    if are_calls:
        if sweep or goal or svg:
            raise click.UsageError("--sweep, --goal and --svg are of jobs")
        _simulating.calls(given, start_s, **bounds)
    else:
        _simulating.jobs(given, is_sweep=sweep, goal=goal, svg=svg)
    return 0


@main.command()
@click.option("--days", type=Amount(0, min_open=True), default=7.0, help="Of the last so many days (7).")
@click.option("--html", "page", metavar="FILE", help="As a page with charts.")
@json_option()
@quiet_option(used=False)
def report(days: float, page: str | None, as_json: bool) -> int:
    """Say what the pool has done: jobs, waiting, machines, money."""
    asking.report(days, page, as_json=as_json)
    return 0


for _group in (_poolgroups.host, _poolgroups.node, _poolgroups.secret, _poolgroups.cloud, _fn.fn):
    main.add_command(_group)


def entry() -> None:
    """The console script."""
    run(main, PROGRAM)
