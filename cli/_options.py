"""Options that several commands have."""

from __future__ import annotations

import math

import click

from cafs import __version__
from cafs.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

    Decorator = Callable[[Any], Any]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


_SCOPE = "cafs.scope"


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, as 500K, 20M, 1G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from cafs.quota import parse_size

        found = parse_size(value) if isinstance(value, str) else int(value)
        if found is None:
            self.fail(f"{value!r} is no size, like 20M", param, ctx)
        return found


class Careful(click.Command):
    """A command that refuses an option with an empty value: an unset variable would turn off what was asked for."""

    default_if_empty: ClassVar[frozenset[str]] = frozenset()

    def invoke(self, ctx: click.Context) -> Any:
        for param in self.params:
            value = ctx.params.get(param.name or "")
            is_given = ctx.get_parameter_source(param.name or "") == click.core.ParameterSource.COMMANDLINE
            is_empty = value == "" or (isinstance(value, tuple) and "" in value)
            if isinstance(param, click.Option) and is_given and is_empty and param.name not in self.default_if_empty:
                raise UsageError(f"{max(param.opts, key=len)} is empty", hint="an unset variable?")
        return super().invoke(ctx)


class Group(click.Group):
    """A group of such commands."""

    command_class = Careful
    group_class = type


class Switchable(Careful):
    """A command whose switches can be given as docker's: --NAME=true, --NAME=false; the last one counts.

    What hidden ones say is so anyway.
    """

    default_if_empty = frozenset({"target", "network", "platform", "iidfile", "metadata_file"})  # as docker has it

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        switches = {name: one for one in self.params if isinstance(one, click.Option) and one.is_flag for name in one.opts}
        end = args.index("--") if "--" in args else len(args)
        words: list[str] = []
        for word in args[:end]:
            name, equals, value = word.partition("=")
            if not equals or name not in switches:
                words.append(word)
            elif value.lower() in ("true", "1", "t"):
                words.append(name)
            elif value.lower() in ("false", "0", "f") and not switches[name].hidden:
                words = [one for one in words if one != name]
            else:
                values = "true" if switches[name].hidden else "true or false"
                raise click.UsageError(f"{name} can be {values}, not {value!r}", ctx)
        return super().parse_args(ctx, words + args[end:])


def store_option() -> Decorator:
    """--store: where images are; the default is worked out when it is needed.  --scope: which part of it."""

    def keep(context: click.Context, _: click.Parameter, value: str | None) -> None:
        context.meta[_SCOPE] = value

    def both(command: Any) -> Any:
        text = "Only the part of the store that belongs to this secret."
        command = click.option("--scope", metavar="SECRETFILE", expose_value=False, callback=keep, help=text)(command)
        text = "Store to use (default: $CAFS_STORE, else the user's own)."
        return click.option("--store", "store", metavar="URL", help=text)(command)

    return both


def store_root(given: str | None) -> str:
    """The store's address from the options, the environment, or the default."""
    from cafs import paths

    return paths.chosen_store(given, click.get_current_context().meta[_SCOPE])


def names_store(given: str | None) -> bool:
    """Whether --store or --scope is given."""
    return given is not None or click.get_current_context().meta[_SCOPE] is not None


def exclusive(why: str, *options: tuple[str, object]) -> None:
    """Refuse two options of which one would be ignored.  options: (name, value).  Raises UsageError."""
    given = [name for name, value in options if value]
    if len(given) > 1:
        raise click.UsageError(f"{given[1]} does not go with {given[0]}" + (f": {why}" if why else ""))


def json_option() -> Decorator:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")


def quiet_option(*, used: bool = True) -> Decorator:
    """-q.  used: whether the command has anything to leave out; it is accepted everywhere."""
    return click.option("-q", "--quiet", is_flag=True, expose_value=used, help="Print nothing but the result and errors.")


def version_option(program: str) -> Decorator:
    """--version."""
    return click.version_option(__version__, "-V", "--version", prog_name=program, message="%(prog)s %(version)s")


class Amount(click.FloatRange):
    """A number that is one, and has an end."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is no amount", param, ctx)
        return found


def bounds_options(command: Any) -> Any:
    """How many instances a function has, as of pool.autoscaling.Bounds."""
    more = Amount(0, min_open=True)
    for option in reversed(
        (
            click.option("--concurrency", type=click.IntRange(1), default=1, help="Calls at once in an instance (1)."),
            click.option("--idle", "idle_s", type=more, default=60.0, metavar="S", help="Kept at most so long (60)."),
            click.option("--min", "least", type=click.IntRange(0), default=0, help="Instances that are always there (0)."),
            click.option("--max", "most", type=click.IntRange(1), default=10, help="Instances at most (10)."),
            click.option("--buffer", type=click.IntRange(0), default=0, help="More than needed, while it is used (0)."),
            click.option("--wait-goal", "wait_s", type=Amount(0), default=0.5, metavar="S", help="A call may wait (0.5)."),
        )
    ):
        command = option(command)
    return command
