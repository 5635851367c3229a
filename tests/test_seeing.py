"""What a pool shows of itself: events, numbers for Prometheus, reports, and what another policy would do."""

from __future__ import annotations

import json
import re
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pool import drawing, report, scaling, simulation, state, sweep
from pool.settings import Settings
from tests.conftest import BIN
from tests.pooling import PLAIN, cp, ok
from tests.test_pool import poisson


def test_what_happens_is_a_line_of_json_and_a_number_for_prometheus(pool: Path, controller: object) -> None:
    with subprocess.Popen([BIN / "cpool", "events", "-f"], stdout=subprocess.PIPE, text=True) as following:
        good, bad = (ok("submit", *PLAIN, "--", word).strip() for word in ("true", "false"))
        assert cp("wait", good, bad).returncode == 1
        lines = [json.loads(line) for line in ok("events").splitlines()]
        assert following.stdout
        assert [json.loads(following.stdout.readline()) for _ in lines] == lines
        following.kill()
    mine = [(one["state"], one.get("code")) for one in lines if one["id"] == int(bad)]
    assert mine == [("queued", None), ("starting", None), ("running", None), ("finished", 1)] and lines == sorted(
        lines, key=lambda one: one["time_s"]
    )
    text = ok("metrics")
    assert (
        re.search(r'^cpool_job_changes_total{state="done"} 1$', text, re.M)
        and 'cpool_job_changes_total{state="failed"} 1' in text
    )
    assert 'cpool_workers{state="ready"} 1' in text and re.search(r'cpool_worker_cpus{worker="local"} [0-9]+', text)
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) cpool_[a-z_]+ .+|cpool_[a-z_]+({[a-z]+=\"[^\"]*\"})? [-0-9.e+]+", line), line
    done = subprocess.run(
        ["curl", "-s", "--unix-socket", pool / "socket", "http://pool/metrics"], capture_output=True, text=True, check=True
    )
    assert {line.partition(" ")[0] for line in done.stdout.splitlines()} == {
        line.partition(" ")[0] for line in text.splitlines()
    }


def test_events_go_on_in_another_file_when_one_is_large(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pool import events

    monkeypatch.setattr(events, "SIZE_MAX", 200)
    there = events.Events(str(pool))
    for number in range(4):
        there.write([{"what": "machine", "id": f"m-{number}", "state": "ready", "reason": "x" * 60}])
    there.write([])
    assert [json.loads(line)["id"] for line in ok("events").splitlines()] == ["m-2", "m-3"]


def test_a_report_counts_what_was_done_and_what_it_cost(pool: Path) -> None:
    now = time.time()
    held = state.State(str(pool))
    for number, (waited, ran, code) in enumerate(((10, 3600, 0), (30, 1800, 1), (20, 1800, 0))):
        one = held.job(held.submit({"cpus": 2, "command": ["x"]}))
        began = now - 7200 + number
        held._do("UPDATE jobs SET submitted_s = ? WHERE id = ?", [began - waited, one.id])
        held.change(one, state=state.FINISHED, code=code, started_s=began, finished_s=began + ran, worker="m-1")
    row = {
        "name": "m-1",
        "kind": "big",
        "zone": "a",
        "price": 0.5,
        "state": "ended",
        "intended_s": now - 7300,
        "launched_s": now - 7200,
        "ended_s": now - 3600,
    }
    held.put_machine(row)
    held.commit()
    held.close()
    (pool / "pool.toml").write_text('[[machines]]\nname = "big"\ncpus = 8\n')
    found = json.loads(ok("report", "--json", "--days", "1"))
    assert (found["jobs"], found["failed"], found["p50_wait_s"], found["p95_wait_s"]) == (3, 1, 20, 30)
    assert found["cpu_hours"] == pytest.approx(4, abs=0.01) and found["cost"] == pytest.approx(0.5, abs=0.001)
    assert found["utilisation"] == pytest.approx(0.5, abs=0.01) and sum(one["jobs"] for one in found["pieces"]) == 3
    assert sum(one["cost"] for one in found["pieces"]) == pytest.approx(0.5, abs=0.001)
    ok("report", "--html", "out.html", "--days", "1")
    page = Path("out.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<svg") == 4 and "NaN" not in page
    assert json.loads(ok("report", "--json", "--days", "0.001"))["jobs"] == 0
    ended = state.State(str(pool))
    assert report.make(ended, Settings(), 1, now + 3 * 86400)["jobs"] == 0


def test_policies_are_compared_and_the_cheapest_that_is_good_enough_is_chosen(pool: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,duration_s\n" + "".join(f"{one.time_s},{one.duration_s}\n" for one in poisson(1000, 0.2)))
    (pool / "pool.toml").write_text('[[machines]]\nname = "m"\ncpus = 2\nprice = 0.1\n[scaling]\nmachines = 60\n')
    words = ("simulate", "-q", "--trace", trace)
    rows = [json.loads(line) for line in ok(*words, "--sweep", "--json").splitlines()]
    most = sorted(one["p99_wait_s"] for one in rows)[len(rows) // 2]
    best = json.loads(ok(*words, "--goal", f"p99={most}s", "--json", "--svg", "out.svg"))
    good = [one for one in rows if one["p99_wait_s"] <= most]
    assert 0 < len(good) < len(rows) and best == min(good, key=lambda one: one["cost"])
    drawn = ET.parse("out.svg").getroot()
    assert len(drawn.findall(".//{*}circle")) == len(rows) + 1
    first = Path("out.svg").read_bytes()
    ok(*words, "--svg", "out.svg")
    assert Path("out.svg").read_bytes() == first, "the same bytes again"
    refused = cp(*words, "--goal", "p99=1ms")
    assert refused.returncode == 1 and "no policy keeps p99=1ms" in refused.stderr
    assert cp(*words, "--goal", "p98=1s").returncode == 2


def test_a_chart_of_nothing_or_of_strange_names_is_sound() -> None:
    for points in ([], [(1.0, 0.0, "<&>")], [(0.0, 0.0, ""), (0.0, 0.0, "")]):
        for is_line in (True, False):
            ET.fromstring(drawing.chart("<t>", "a & b", "u", [drawing.Series("<n>", points)], is_line=is_line))


def test_a_policy_of_the_sweep_is_what_it_says() -> None:
    policy = scaling.Policy((scaling.Kind("a", 4.0), scaling.Kind("b", 2.0)), least_cpus=9.0)
    found = dict(sweep.candidates(policy))
    assert (
        found["least_cpus = 4"].least_cpus == 4 and found["share = 0.5"].share == 0.5 and found["share = 0.5"].least_cpus == 0
    )
    result = simulation.Simulation(found["quantile = 0"]).run(poisson(50, 1.0)).shown()
    assert sweep.run(policy, poisson(50, 1.0))[0] == {"policy": "quantile = 0", **result}
