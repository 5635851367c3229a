"""One more command beside a job: in its container, or, of a plain one, where it runs and with its environment.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import os
import sys

from pool import machine


def container_of(pool: str, number: int, attempt: int) -> str:
    """What the container of a job is called."""
    return f"cpool-{pool}-{number}.{attempt}"


def enter(directory: str, which: str, flags: str, words: list[str]) -> int:
    """Become the command.  directory: of the agent; which: ID.ATTEMPT; flags: of i and t.  Returns only if it cannot be."""
    try:
        with open(os.path.join(directory, "jobs", which, "job.json"), encoding="utf-8") as file:
            asked = json.load(file)
        pid = int(asked["pid"])
        if machine.start_time(pid) != asked["pid_start"]:
            raise FileNotFoundError
        if asked["image"]:
            number, _, attempt = which.partition(".")
            name = container_of(os.path.basename(directory).partition(".")[0], int(number), int(attempt))
            runner = machine.runner() or "cafs-run"
            os.execvp(runner, [runner, "exec", *(f"-{flag}" for flag in flags if flag in "it"), name, *words])
        with open(f"/proc/{pid}/environ", "rb") as environ:
            pairs = [one.partition(b"=") for one in environ.read().split(b"\0") if one]
        os.chdir(f"/proc/{pid}/cwd")
        os.execvpe(words[0], words, {name: value for name, _, value in pairs})
    except FileNotFoundError as error:
        print(
            f"cpool: {f'no program {words[0]!r}' if error.filename == words[0] else 'the job does not run there'}",
            file=sys.stderr,
        )
        return 127
    except (OSError, ValueError, KeyError) as error:
        print(f"cpool: cannot run it beside the job: {error}", file=sys.stderr)
    return 126
