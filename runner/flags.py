"""The flags of every verb, spelled as docker and podman spell them.  crun(1) says of each docker flag what it does here."""

from __future__ import annotations

from cafs.errors import UsageError, quote
from cafs.options import LIST, SWITCH, VALUE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.options import Flag, Flags

_COMMAND, _FILES, _LIMITS, _SAFETY, _NET, _LIFE, _OURS = (
    "Command",
    "Files",
    "Limits",
    "Security",
    "Network",
    "Life",
    "Images",
)

RUN: Flags = {
    "env": (LIST, "e", "K[=V]", _COMMAND, "Set a variable; K alone takes the caller's."),
    "env-file": (LIST, "", "FILE", _COMMAND, "Read variables from FILE, K=V a line."),
    "workdir": (VALUE, "w", "DIR", _COMMAND, "Working directory."),
    "user": (VALUE, "u", "USER[:GROUP]", _COMMAND, "User (name or id)."),
    "group-add": (LIST, "", "GROUP", _COMMAND, "One more group (name or id)."),
    "entrypoint": (VALUE, "", "CMD", _COMMAND, "Replace the image's entrypoint."),
    "interactive": (SWITCH, "i", "", _COMMAND, "Pass standard input."),
    "tty": (SWITCH, "t", "", _COMMAND, "Give the command a terminal."),
    "init": (SWITCH, "", "", _COMMAND, "Run tini or catatonit of the host as process 1."),
    "detach-keys": (VALUE, "", "KEYS", _COMMAND, "What detaches from a terminal (default: ctrl-p,ctrl-q)."),
    "volume": (LIST, "v", "SRC:DST[:OPTS]", _FILES, "Bind-mount a host path or a named volume; ro, rw."),
    "mount": (LIST, "", "type=T,...", _FILES, "A mount: bind, volume or tmpfs."),
    "tmpfs": (LIST, "", "DST[:OPTS]", _FILES, "A file system in memory."),
    "read-only": (SWITCH, "", "", _FILES, "No writable layer for the command."),
    "shm-size": (VALUE, "", "SIZE", _FILES, "Size of /dev/shm (default: 64m)."),
    "device": (LIST, "", "DEV[:DST[:rwm]]", _FILES, "A device of the host, or of a CDI specification."),
    "gpus": (VALUE, "", "all|N|device=..", _FILES, "GPUs, by CDI specifications, else the host's driver."),
    "memory": (VALUE, "m", "SIZE", _LIMITS, "Memory."),
    "memory-swap": (VALUE, "", "SIZE", _LIMITS, "Memory and swap together; -1: no limit."),
    "memory-reservation": (VALUE, "", "SIZE", _LIMITS, "Memory that is kept when it gets scarce."),
    "cpus": (VALUE, "", "N", _LIMITS, "Processors, as 1.5."),
    "cpu-shares": (VALUE, "c", "N", _LIMITS, "Weight where processors are scarce (default: 1024)."),
    "cpu-period": (VALUE, "", "US", _LIMITS, "Period of the processor limit."),
    "cpu-quota": (VALUE, "", "US", _LIMITS, "Processor time a period."),
    "cpuset-cpus": (VALUE, "", "LIST", _LIMITS, "Processors to run on, as 0-2,4."),
    "cpuset-mems": (VALUE, "", "LIST", _LIMITS, "Memory nodes to use."),
    "pids-limit": (VALUE, "", "N", _LIMITS, "Processes; -1: no limit."),
    "ulimit": (LIST, "", "NAME=SOFT[:HARD]", _LIMITS, "A resource limit; the others are the caller's."),
    "oom-score-adj": (VALUE, "", "N", _LIMITS, "How readily it is killed without memory."),
    "cgroup-parent": (VALUE, "", "PATH", _LIMITS, "The cgroup in which its own is made (default: /cafs)."),
    "cgroupns": (VALUE, "", "private|host", _SAFETY, "Whose cgroups it sees (default: its own; the host's on cgroup v1)."),
    "cap-add": (LIST, "", "CAP", _SAFETY, "One more capability, or ALL."),
    "cap-drop": (LIST, "", "CAP", _SAFETY, "One less, or ALL."),
    "security-opt": (LIST, "", "OPT", _SAFETY, "seccomp=unconfined|FILE, no-new-privileges, apparmor=PROFILE."),
    "privileged": (SWITCH, "", "", _SAFETY, "All capabilities and devices, nothing masked, no seccomp."),
    "pid": (VALUE, "", "host|container:X", _SAFETY, "Whose processes it sees."),
    "ipc": (VALUE, "", "private|host|..", _SAFETY, "Whose shared memory it uses: host, container:X."),
    "uts": (VALUE, "", "host", _SAFETY, "The host's name and domain."),
    "userns": (VALUE, "", "host|auto", _SAFETY, "auto: its users are ids that nobody else has on the host."),
    "sysctl": (LIST, "", "K=V", _SAFETY, "A kernel parameter of its namespaces."),
    "network": (VALUE, "", "MODE", _NET, "bridge, none, host, container:X, or a network (default: bridge)."),
    "publish": (LIST, "p", "[[IP:]PORT:]PORT", _NET, "A port of the host for one of the container; also ranges, /udp."),
    "publish-all": (SWITCH, "P", "", _NET, "A port of the host for each that is exposed."),
    "expose": (LIST, "", "PORT", _NET, "One more port for -P; to neighbours all are open."),
    "hostname": (VALUE, "h", "NAME", _NET, "Host name (default: the container's id)."),
    "add-host": (LIST, "", "NAME:IP", _NET, "A line for /etc/hosts; IP may be host-gateway."),
    "dns": (LIST, "", "IP", _NET, "A name server for /etc/resolv.conf."),
    "dns-search": (LIST, "", "DOMAIN", _NET, "A search domain."),
    "dns-option": (LIST, "", "OPT", _NET, "An option of the resolver."),
    "name": (VALUE, "", "NAME", _LIFE, "Name of the container."),
    "detach": (SWITCH, "d", "", _LIFE, "Run it in the background and print its id."),
    "rm": (SWITCH, "", "", _LIFE, "Remove it when it ends."),
    "restart": (VALUE, "", "POLICY", _LIFE, "no, on-failure[:N], always or unless-stopped; needs -d."),
    "stop-signal": (VALUE, "", "SIGNAL", _LIFE, "What `stop` sends (default: the image's, or TERM)."),
    "stop-timeout": (VALUE, "", "S", _LIFE, "How long `stop` waits before KILL (default: 10)."),
    "timeout": (VALUE, "", "S", _LIFE, "Kill it after so many seconds."),
    "cidfile": (VALUE, "", "FILE", _LIFE, "Write the id to FILE, which must not be there."),
    "outcome": (VALUE, "", "FILE", _LIFE, "Write what it used, and oom_kills, to FILE when it ends (JSON)."),
    "label": (LIST, "l", "K[=V]", _LIFE, "A label."),
    "label-file": (LIST, "", "FILE", _LIFE, "Labels, one a line."),
    "annotation": (LIST, "", "K=V", _LIFE, "An annotation of the runtime's configuration."),
    "log-driver": (VALUE, "", "DRIVER", _LIFE, "json-file or none."),
    "log-opt": (LIST, "", "K=V", _LIFE, "max-size=SIZE, max-file=N."),
    "health-cmd": (VALUE, "", "CMD", _LIFE, "A command that fails if the container is not well."),
    "health-interval": (VALUE, "", "TIME", _LIFE, "How often it runs (default: 30s)."),
    "health-timeout": (VALUE, "", "TIME", _LIFE, "How long it may take (default: 30s)."),
    "health-retries": (VALUE, "", "N", _LIFE, "Failures in a row that count (default: 3)."),
    "health-start-period": (VALUE, "", "TIME", _LIFE, "How long failures do not count at first."),
    "no-healthcheck": (SWITCH, "", "", _LIFE, "Not even the image's."),
    "pull": (VALUE, "", "WHEN", _OURS, "missing, never or always: for docker:// images."),
    "platform": (VALUE, "", "OS/ARCH", _OURS, "Only the host's own is there."),
    "record": (VALUE, "", "FILE", _OURS, "Write what is read of the image to FILE."),
    "store": (VALUE, "", "URL", _OURS, "Store to use."),
    "scope": (VALUE, "", "SECRETFILE", _OURS, "Only that part of the store."),
}
DEFAULT_IF_EMPTY = {
    "author", "cgroup-parent", "cgroupns", "cidfile", "cpuset-cpus", "cpuset-mems", "detach-keys", "driver", "format",
    "health-cmd", "hostname", "ipc", "log-driver", "message", "name", "network", "pid", "platform", "pull", "restart", "signal",
    "since", "stop-signal", "tail", "until", "user", "userns", "uts", "workdir",
}  # fmt: skip
"""Flags of docker for which '' means the default, as scripts write --platform "$PLATFORM"."""

MAY_BE_EMPTY = {"entrypoint"}
ALIASES = {"net": "network", "dns-opt": "dns-option"}

_WHAT = "Flags"


def _as_what(name: str) -> Flag:
    """A flag of `run` in a table without groups."""
    return (*RUN[name][:3], _WHAT, RUN[name][4])


_DETACH_KEYS = _as_what("detach-keys")
_TIME = (VALUE, "t", "S", _WHAT, "Seconds to wait before KILL (default: the container's, or 10).")
_FORMAT = (VALUE, "", "json|table", _WHAT, "json: a line each.")
_SIGNAL = (VALUE, "s", "SIGNAL", _WHAT, "Signal to send.")

_NAMES_ONLY = (SWITCH, "q", "", _WHAT, "Names only.")
_NO_QUESTION = (SWITCH, "f", "", _WHAT, "Nothing is ever asked.")

GROUPS = {"volume": "Named volumes.", "network": "Networks."}
"""Commands that have commands."""

VERBS: dict[str, tuple[str, str, Flags]] = {
    "run": ("[FLAG]... IMAGE [COMMAND [ARGUMENT]...]", "Run a command in an image, in a container of its own.", RUN),
    "create": (
        "[FLAG]... IMAGE [COMMAND [ARGUMENT]...]",
        "Make a container, to be started later.",
        {name: flag for name, flag in RUN.items() if name not in ("detach", "detach-keys")},
    ),
    "start": (
        "[FLAG]... CONTAINER...",
        "Start containers that do not run.",
        {
            "attach": (SWITCH, "a", "", _WHAT, "Stay, and pass on what it prints."),
            "interactive": (SWITCH, "i", "", _WHAT, "Pass standard input too."),
            "detach-keys": _DETACH_KEYS,
        },
    ),
    "stop": ("[FLAG]... CONTAINER...", "Ask containers to end; kill them after a while.", {"time": _TIME, "signal": _SIGNAL}),
    "restart": ("[FLAG]... CONTAINER...", "Stop containers and start them again.", {"time": _TIME, "signal": _SIGNAL}),
    "kill": ("[FLAG]... CONTAINER...", "Send a signal (KILL).", {"signal": _SIGNAL}),
    "rm": (
        "[FLAG]... CONTAINER...",
        "Remove containers that do not run.",
        {
            "force": (SWITCH, "f", "", _WHAT, "Kill those that run; ignore those that are not there."),
            "volumes": (SWITCH, "v", "", _WHAT, "Remove their anonymous volumes too."),
        },
    ),
    "ps": (
        "[FLAG]...",
        "List containers.",
        {
            "all": (SWITCH, "a", "", _WHAT, "Also those that do not run."),
            "quiet": (SWITCH, "q", "", _WHAT, "Ids only."),
            "no-trunc": (SWITCH, "", "", _WHAT, "Whole ids and commands."),
            "filter": (LIST, "f", "K=V", _WHAT, "name, id, label, status, health, ancestor, volume, network ..."),
            "format": _FORMAT,
            "last": (VALUE, "n", "N", _WHAT, "The N that were made last."),
        },
    ),
    "logs": (
        "[FLAG]... CONTAINER",
        "Print what a container has printed.",
        {
            "follow": (SWITCH, "f", "", _WHAT, "Go on until it ends."),
            "tail": (VALUE, "n", "N", _WHAT, "The last N lines only."),
            "since": (VALUE, "", "TIME", _WHAT, "From then on: 10m, 2026-01-31T12:00:00Z, or seconds."),
            "until": (VALUE, "", "TIME", _WHAT, "Up to then."),
            "timestamps": (SWITCH, "t", "", _WHAT, "When, before each line."),
        },
    ),
    "exec": (
        "[FLAG]... CONTAINER COMMAND [ARGUMENT]...",
        "Run one more command in a container.",
        {
            **{name: _as_what(name) for name in ("env", "env-file", "workdir", "user", "interactive", "tty")},
            "detach": (SWITCH, "d", "", _WHAT, "Do not wait for it."),
            "privileged": (SWITCH, "", "", _WHAT, "With all capabilities."),
            "detach-keys": _DETACH_KEYS,
        },
    ),
    "attach": (
        "[FLAG]... CONTAINER",
        "Take part in a container's input and output.",
        {
            "no-stdin": (SWITCH, "", "", _WHAT, "Do not pass standard input."),
            "detach-keys": _DETACH_KEYS,
        },
    ),
    "wait": ("CONTAINER...", "Wait until containers end; print their exit codes.", {}),
    "inspect": (
        "[FLAG]... CONTAINER...",
        "All that is known of containers, as JSON.",
        {"format": (VALUE, "f", "json", _WHAT, "A line each.")},
    ),
    "pause": ("CONTAINER...", "Let containers stand still.", {}),
    "unpause": ("CONTAINER...", "Let them go on.", {}),
    "rename": ("CONTAINER NAME", "Give a container another name.", {}),
    "port": ("CONTAINER [PORT]", "Which ports are published.", {}),
    "top": ("CONTAINER [ARGUMENT]...", "The processes of a container; with arguments, as ps of the host shows them.", {}),
    "stats": (
        "[FLAG]... [CONTAINER]...",
        "What containers use.",
        {
            "no-stream": (SWITCH, "", "", _WHAT, "Once."),
            "format": _FORMAT,
            "all": (SWITCH, "a", "", _WHAT, "Also those that do not run."),
        },
    ),
    "commit": (
        "[FLAG]... CONTAINER [REF]",
        "Make an image of a container and what it has changed; print its digest.",
        {
            "author": (VALUE, "a", "NAME", _WHAT, "Who made it."),
            "change": (LIST, "c", "INSTRUCTION", _WHAT, "An instruction of a Dockerfile for its configuration."),
            "message": (VALUE, "m", "TEXT", _WHAT, "A comment for its history."),
            "pause": (SWITCH, "p", "", _WHAT, "The container stands still meanwhile (default; --pause=false)."),
        },
    ),
    "diff": ("CONTAINER", "What a container has changed in its files.", {}),
    "cp": (
        "[FLAG]... CONTAINER:PATH PATH | PATH CONTAINER:PATH",
        "Copy files; - is a tar archive.",
        {
            "archive": (
                SWITCH,
                "a",
                "",
                _WHAT,
                "Keep owners and, out of a container, set-user-id bits, capabilities and devices.",
            ),
            "follow-link": (SWITCH, "L", "", _WHAT, "Follow a link that PATH is."),
            "quiet": (SWITCH, "q", "", _WHAT, "Accepted."),
        },
    ),
    "events": (
        "[FLAG]...",
        "What has happened to containers.",
        {
            "since": (VALUE, "", "TIME", _WHAT, "From then on."),
            "until": (VALUE, "", "TIME", _WHAT, "Up to then, and end."),
            "follow": (SWITCH, "", "", _WHAT, "Go on."),
            "filter": (LIST, "f", "K=V", _WHAT, "container, event, image or type."),
        },
    ),
    "volume ls": (
        "[FLAG]...",
        "List volumes.",
        {"quiet": _NAMES_ONLY, "filter": (LIST, "f", "K=V", _WHAT, "name, label, dangling or driver.")},
    ),
    "volume create": (
        "[FLAG]... [VOLUME]",
        "Make a volume; print its name.",
        {"label": (LIST, "", "K[=V]", _WHAT, "A label."), "driver": (VALUE, "d", "local", _WHAT, "There is no other.")},
    ),
    "volume inspect": ("VOLUME...", "All that is known of volumes, as JSON.", {}),
    "volume rm": (
        "[FLAG]... VOLUME...",
        "Remove volumes that no container uses.",
        {"force": (SWITCH, "f", "", _WHAT, "Ignore those that are not there.")},
    ),
    "volume prune": (
        "[FLAG]...",
        "Remove anonymous volumes that no container uses.",
        {
            "all": (SWITCH, "a", "", _WHAT, "Named ones too."),
            "filter": (LIST, "", "K=V", _WHAT, "label, or label! for those without."),
            "force": _NO_QUESTION,
        },
    ),
    "network ls": (
        "[FLAG]...",
        "List networks.",
        {"quiet": _NAMES_ONLY, "filter": (LIST, "f", "K=V", _WHAT, "name, label, driver, type or dangling.")},
    ),
    "network create": (
        "[FLAG]... NETWORK",
        "Make a network; print its name.",
        {
            "subnet": (VALUE, "", "CIDR", _WHAT, "Its addresses."),
            "label": (LIST, "", "K[=V]", _WHAT, "A label."),
            "driver": (VALUE, "d", "bridge", _WHAT, "There is no other."),
        },
    ),
    "network inspect": ("NETWORK...", "All that is known of networks, as JSON.", {}),
    "network rm": (
        "[FLAG]... NETWORK...",
        "Remove networks that no container is on.",
        {"force": (SWITCH, "f", "", _WHAT, "Ignore those that are not there.")},
    ),
    "network prune": (
        "[FLAG]...",
        "Remove networks that no container is on.",
        {"filter": (LIST, "", "K=V", _WHAT, "label, or label! for those without."), "force": _NO_QUESTION},
    ),
    "gc": ("", "Tidy up after what was killed.", {}),
    "completion": ("bash|zsh|fish", "Print what makes a shell complete crun's words.", {}),
}


def taken(verb: str) -> tuple[int, int | None]:
    """How many words a command takes, least and most, None: any number; its line in --help says so."""
    names = [one for one in VERBS[verb][0].partition(" | ")[0].split() if one != "[FLAG]..."]
    return sum(not one.startswith("[") for one in names), None if any("..." in one for one in names) else len(names)


def check_words(verb: str, words: list[str]) -> None:
    """Raises UsageError for too few words or too many."""
    least, most = taken(verb)
    if len(words) < least:
        names = [one for one in VERBS[verb][0].split() if one != "[FLAG]..."]
        raise UsageError(f"{names[len(words)].removesuffix('...')} is missing", hint=f"crun {verb} --help")
    if most is not None and len(words) > most:
        raise UsageError(f"unexpected argument {quote(words[most])}", hint=f"crun {verb} --help")
