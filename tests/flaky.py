"""Run the whole suite several times and list the tests whose outcome was not 'passed' every time.

usage: python -m tests.flaky RUNS [--workers N] [--busy N] [PYTEST ARGUMENT]...

--busy N keeps N processors occupied meanwhile.  Exit code: 0 if every run was green, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

_SPIN = "while True: pass"


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Occupy COUNT processors."""
    spinning = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def _outcomes(report: Path) -> dict[str, str]:
    """Test → passed, failed, error or skipped, from a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = next((word for tag, word in _WORDS.items() if tag in kinds), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


_WORDS = {"error": "error", "failure": "failed", "skipped": "skipped"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make flaky", description="Run the suite again and again; list what differed.")
    parser.add_argument("runs", type=int)
    parser.add_argument("--workers", default="2", help="test processes at once (pytest -n)")
    parser.add_argument("--busy", type=int, default=0, help="processors to occupy beside the tests")
    options, more = parser.parse_known_args()
    seen: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as directory, _busy(options.busy):
        for run in range(1, options.runs + 1):
            report, began = Path(directory, f"{run}.xml"), time.monotonic()
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-n",
                options.workers,
                "--dist",
                "loadfile",
                f"--junitxml={report}",
            ]
            with open(Path(directory, f"{run}.log"), "w+") as log:
                code = subprocess.run([*command, *more], stdout=log, stderr=subprocess.STDOUT, check=False).returncode
                log.seek(0)
                output = log.read()
            outcomes = _outcomes(report) if report.exists() else {}
            bad = {name: outcome for name, outcome in outcomes.items() if outcome != "passed"}
            print(
                f"run {run}: {len(outcomes)} tests, {len(bad)} not passed, exit {code}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
            if code:
                sys.stderr.write(output)
            for name, outcome in bad.items():
                seen.setdefault(name, []).append(f"run {run}: {outcome}")
            if code and not bad:
                seen.setdefault("(pytest itself)", []).append(f"run {run}: exit {code}")
    for name, cases in sorted(seen.items()):
        print(f"{name}: {', '.join(cases)}")
    print(f"{options.runs} runs: {'all green' if not seen else f'{len(seen)} tests differed'}")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())
