"""Machines that a pool launches: real controllers, real sshd machines, a cloud that goes wrong in every way we know of."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

from cafs.errors import CafsError, RemoteError, UnsupportedError
from pool import boot, cloud, clouds, ec2, launched, pricing, state
from pool.settings import Settings
from tests.clouds import EC2, GCE
from tests.conftest import BIN, wait_until
from tests.functioning import routers
from tests.pooling import DYING, PLAIN, agents, cp, is_served, job, kill_all, ok
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "sshd")

CPUS = str(min(2, len(os.sched_getaffinity(0))))
"""Of a machine, and of a job that needs all of it: they are really there."""

POOL_TOML = """
[cloud]
provider = "ec2"
region = "us-east-1"
zones = ["us-east-1a", "us-east-1b"]
image = "ami-12c6146b"
user = "root"
address = "private"
port = {port}
endpoint = "{url}"
poll_s = 0.2
boot_s = {boot_s}

[[machines]]
name = "large"
type = "m5.large"
cpus = {cpus}
price = 0.1

[scaling]
idle_s = {idle_s}
machines = {machines}
{more}
"""


class Aws:
    """A pool at a cloud."""

    def __init__(self, cloud: EC2, pool: Path) -> None:
        self.cloud, self.pool = cloud, pool
        self._ec2 = boto3.client("ec2", endpoint_url=f"http://127.0.0.1:{cloud._moto_port}", region_name="us-east-1")

    def configure(self, *, idle_s: float = 1, machines: int = 2, boot_s: float = 60, more: str = "") -> None:
        values = {"port": self.cloud.port, "url": self.cloud.url, "idle_s": idle_s, "machines": machines}
        (self.pool / "pool.toml").write_text(POOL_TOML.format(**values, cpus=CPUS, boot_s=boot_s, more=more))

    def instances(self, *states: str) -> list[dict[str, object]]:
        """All that were ever launched, or those in some states."""
        found = self._ec2.describe_instances()["Reservations"]
        every = [one for group in found for one in group["Instances"]]
        return [one for one in every if not states or one["State"]["Name"] in states]

    def launch_stranger(self, mark: str) -> str:
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "cpool", "Value": mark}]}]
        return str(
            self._ec2.run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1, TagSpecifications=tags)["Instances"][0][
                "InstanceId"
            ]
        )


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name, value in (("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    monkeypatch.chdir(tmp_path)
    ok("init")
    (tmp_path / "machines").mkdir()
    with EC2(tmp_path / "machines") as cloud:
        found = Aws(cloud, tmp_path / "pool")
        found.configure()
        yield found
    kill_all([*agents(tmp_path), *routers(tmp_path)])


def machines() -> list[dict[str, object]]:
    return [json.loads(line) for line in ok("cloud", "ls", "--all", "--json").splitlines()]


def test_machines_come_when_there_is_work_and_go_when_there_is_none(aws: Aws) -> None:
    aws.cloud.pending_s = aws.cloud.hidden_s = 0.5
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(is_served)
        ids = [
            ok(
                "submit", *PLAIN, "--cpus", CPUS, "--workdir", "/", "--", "sh", "-c", "sleep 0.5; echo $CPOOL_WORKER $HOME"
            ).strip()
            for _ in range(3)
        ]
        wait_until(lambda: "launching, about" in str(job(ids[0]).get("waits", "launching, about")))
        assert cp("wait", *ids, timeout=60).returncode == 0
        said = {cp("logs", "-f", one).stdout for one in ids}
        homes = {line.split()[1] for line in said}
        assert homes <= {str(one) for one in (aws.cloud.place).iterdir()} and len(aws.instances()) == 2, said
        wait_until(lambda: not aws.instances("running", "pending"), 20)
        wait_until(lambda: all(one["state"] == "ended" for one in machines()))
        assert [one["reason"] for one in machines()] == ["it was not needed"] * 2 and ok("nodes", "-q") == ""
        assert (aws.pool / "known_hosts").read_text() == "", "and their keys are forgotten"
        controller.terminate()
    sent = aws.instances()
    assert {tag["Value"] for one in sent for tag in one["Tags"] if tag["Key"] == "cpool-name"} == {
        one["name"] for one in machines()
    }  # type: ignore[attr-defined]
    assert all(one["MetadataOptions"]["HttpTokens"] == "required" for one in sent)  # type: ignore[index]


@pytest.mark.needs("fuse", "runc", "busybox")
def test_a_call_brings_a_machine_and_it_goes_when_the_function_is_idle(image: Path, aws: Aws) -> None:
    """Slow, since what runs images is brought to each machine first."""
    aws.configure(idle_s=1, machines=1)
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        try:
            wait_until(is_served)
            words = ("--image", "b:1", "--handler", "jsonl:cat", "--cpus", CPUS, "--idle", "0.5", "--no-try")
            ok("fn", "deploy", "cat", *words)
            assert aws.instances() == [], "it costs nothing before it is called"
            assert ok("fn", "call", "cat", input='{"a": 1}', timeout=120) == '{"a":1}\n'
            assert len(aws.instances()) == 1
            wait_until(lambda: not aws.instances("running", "pending"), 60)
            assert json.loads(ok("fn", "ls", "--json"))["instances"] == 0 and ok("nodes", "-q") == ""
            ok("down")
        finally:
            controller.terminate()


def test_a_controller_that_is_killed_with_sigkill_while_it_launches_launches_nothing_twice(aws: Aws, tmp_path: Path) -> None:
    """Really killed, four durable steps of it; test_faults.py has all steps by a clock that is not real."""
    aws.configure(machines=1, idle_s=0.5)
    number = ok("submit", *PLAIN, "--cpus", CPUS, "--workdir", "/", "--", "sh", "-c", f"echo ran >>{tmp_path}/ran").strip()
    killed = 0
    for step, when in ((2, "before"), (1, "after"), (2, "after"), (3, "before")):
        with subprocess.Popen([sys.executable, "-c", DYING, str(step), when]) as dying:
            killed += dying.wait(60 * SLOW) == -signal.SIGKILL
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(lambda: cp("wait", number).returncode == 0, 40)
        wait_until(lambda: not aws.instances("running", "pending"), 20)
        controller.terminate()
    assert (tmp_path / "ran").read_text() == "ran\n" and killed == 4
    assert len({one["name"] for one in machines()}) == len(aws.instances()), "no instance but those that it knows"


def test_answers_that_go_wrong_on_the_wire_are_understood(aws: Aws) -> None:
    """Throttled, lost after it was done, an empty list; as boto3 raises them."""
    faults = {"RunInstances": ["throttle", "lost"], "DescribeInstances": [None, "throttle", "empty", "lost"]}
    faults["TerminateInstances"] = ["throttle", "lost"]
    is_seen = threading.Event()  # until then nothing is launched: what is wrong is said for as long as it is

    def fault(action: str, number: int) -> str | None:
        if action == "RunInstances" and not is_seen.is_set():
            return "throttle"
        left = faults.get(action, [])
        return left.pop(0) if left else None

    aws.cloud.fault = fault
    aws.configure(machines=1, idle_s=0.5)
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(is_served)
        number = ok("submit", *PLAIN, "--workdir", "/", "--", "true").strip()
        wait_until(lambda: "RequestLimitExceeded" in cp("cloud", "ls").stderr)
        is_seen.set()
        wait_until(lambda: cp("wait", number).returncode == 0, 60)
        wait_until(lambda: not aws.instances("running", "pending"), 30)
        controller.terminate()
    asked = aws.cloud.counts
    assert asked["RunInstances"] >= 2 and asked["TerminateInstances"] >= 2 and len(aws.instances()) == 1


def test_down_ends_machines_and_strangers_of_other_pools_are_left_alone(aws: Aws) -> None:
    aws.configure(idle_s=1000, more=f"least_cpus = {CPUS}")
    other = aws.launch_stranger("another-pool")
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
        assert ok("cloud", "ls", "-q").strip() == ok("nodes", "-q").strip() and "0.1000 an hour" in ok("cloud", "ls")
        ok("down", "--grace", "0")
        assert controller.wait(30 * SLOW) == 0
    assert [one["InstanceId"] for one in aws.instances("running", "pending")] == [other]


def test_the_pools_own_policy_is_enough_and_lets_it_touch_nothing_else(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto's enforcement, which knows actions, but neither resources nor conditions; those are checked as text."""
    policy = ok("cloud", "policy", "aws")
    statements = [{**one, "Resource": "*", "Condition": {}} for one in json.loads(policy)["Statement"]]
    with mock_aws():
        iam = boto3.client("iam", region_name="us-east-1")
        iam.create_user(UserName="pool")
        iam.put_user_policy(
            UserName="pool", PolicyName="p", PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": statements})
        )
        key = iam.create_access_key(UserName="pool")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        there = clouds.connect({"region": "us-east-1", "image": "ami-12c6146b", "provider": "ec2"}, "abc")

        @set_initial_no_auth_action_count(0)
        def enforced() -> None:
            with pytest.raises(ClientError, match="not authorized to perform: ec2:DescribeVolumes"):
                boto3.session.Session().client("ec2", region_name="us-east-1").describe_volumes()
            made = there.launch(cloud.Order("m-1", "m5.large", "us-east-1a", False, "#cloud-config\n{}", ""))
            assert [one.name for one in there.instances()] == ["m-1"] and there.look(made) is not None
            there.end([made])
            assert there.instances()[0].state == cloud.ENDED

        enforced()
    ended = next(one for one in json.loads(policy)["Statement"] if one["Action"] == "ec2:TerminateInstances")
    pool = ended["Condition"]["StringEquals"]["ec2:ResourceTag/cpool"]
    assert pool == state.State(str(aws.pool)).meta("pool")
    launch = [one for one in json.loads(policy)["Statement"] if one["Action"] == "ec2:RunInstances" and "Condition" in one]
    assert launch[0]["Condition"]["StringEquals"] == {"aws:RequestTag/cpool": pool}


@pytest.fixture
def gce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GCE]:
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    monkeypatch.chdir(tmp_path)
    ok("init")
    (tmp_path / "machines").mkdir()
    with GCE(tmp_path / "machines") as found:
        values = {"port": found.port, "url": found.url, "idle_s": 0.5, "machines": 2, "boot_s": 60, "more": ""}
        text = (
            POOL_TOML.format(**values, cpus=CPUS)
            .replace('"ec2"', '"gce"')
            .replace("ami-12c6146b", "projects/debian-cloud/global/images/family/debian-12")
        )
        (tmp_path / "pool" / "pool.toml").write_text(
            text.replace("region =", "project =").replace("price = 0.1", "price = 0.1\nspot = true")
        )
        yield found
    kill_all(agents(tmp_path))


def test_machines_of_gce_come_and_go_too_whatever_goes_wrong_on_the_wire(gce: GCE) -> None:
    """By Google's own client, against a server that forgets answers, has none left in one zone, and takes a machine away."""
    gce.pending_s = gce.hidden_s = 0.5
    faults = {
        "insert": ["lost", "refuse-capacity"],
        "list": [None] * 20 + ["throttle", "lost", "empty"],
        "delete": ["throttle"],
    }
    gce.fault = lambda action, number: (faults.get(action, [])[number - 1 : number] or [None])[0]
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(is_served)
        work = ("submit", *PLAIN, "--cpus", CPUS, "--workdir", "/", "--", "sh", "-c")
        number = ok(*work, f"until test -f {gce.place}/go; do sleep 0.05; done; echo $CPOOL_ATTEMPT").strip()
        wait_until(lambda: job(number)["state"] == "running", 40)
        gce.take_away(str(job(number)["worker"]))
        wait_until(lambda: '"notice": true' in ok("nodes", "--json"), 20)
        second = ok(*work, "true").strip()
        assert cp("wait", second, timeout=60).returncode == 0 and job(second)["worker"] != job(number)["worker"], "a successor"
        (gce.place / "go").touch()
        assert cp("wait", number).returncode == 0 and ok("logs", "-f", number) == "1\n"
        wait_until(lambda: not gce.known, 40)
        wait_until(lambda: all(one["state"] == "ended" for one in machines()))
        controller.terminate()
    (sent,) = gce.sent[:1]
    assert sent["scheduling"]["provisioningModel"] == "SPOT" and sent["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert sent["disks"][0]["autoDelete"] and sent["scheduling"]["maxRunDuration"]["seconds"] == "604800"
    assert len({one["name"] for one in gce.sent}) == len(machines()) and "ZONE_RESOURCE_POOL_EXHAUSTED" in str(machines())


def test_a_machine_that_nobody_is_connected_to_powers_itself_off_and_no_other_does(tmp_path: Path) -> None:
    """The loop of its user data, really run, with a shutdown that only notes that it was called."""
    config = json.loads(boot.cloud_config(b"x" * 32, "m-1", "joe", is_spot=False).partition("\n")[2])
    (script,) = [one["content"] for one in config["write_files"] if "deadman" in one["path"]]
    assert (
        subprocess.run(
            ["sh", "-n"], input=boot.startup_script(b"x" * 32, "m", "joe", is_spot=True), text=True, check=False
        ).returncode
        == 0
    )
    (begin,) = [one["content"] for one in config["write_files"] if "per-boot" in one["path"]]
    assert "chown joe" in begin and subprocess.run(["sh", "-n"], input=begin, text=True, check=False).returncode == 0
    (tmp_path / "deadman").write_text(script)
    (tmp_path / "shutdown").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    (tmp_path / "shutdown").chmod(0o755)
    alive = tmp_path / "alive"
    alive.touch()
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    limit = str(max(round(4 * SLOW), 4))  # it looks once a second, and may see nothing new for so many
    with subprocess.Popen(["sh", tmp_path / "deadman", alive, limit, "1"], env=path) as loop:
        for second in range(1, 7):
            with pytest.raises(subprocess.TimeoutExpired):
                loop.wait(1)
            os.utime(alive, (second * 100, second * 100))
        assert loop.wait(10 * SLOW) == 0
    assert (tmp_path / "called").read_text() == "-h now\n"


def test_what_is_too_new_to_be_shown_is_not_taken_for_gone_at_ec2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with mock_aws():
        there = clouds.connect({"region": "us-east-1", "image": "ami-12c6146b", "provider": "ec2", "disk_gb": 9}, "abc")
        new = cloud.Instance("i-0123456789abcdef0", "m-1", "", "", "us-east-1a", time.time())
        for ask in (lambda: there.look(new), lambda: there.end([new])):
            with pytest.raises(RemoteError, match="does not show m-1 yet"):
                ask()
        old = dataclasses.replace(new, launched_s=time.time() - 100)
        assert there.look(old) is None
        there.end([old])
        made = there.launch(cloud.Order("m-2", "m5.large", "us-east-1a", True, "#cloud-config\n{}", ""))
        ec2 = boto3.client("ec2", region_name="us-east-1")
        device = ec2.describe_images(ImageIds=["ami-12c6146b"])["Images"][0]["RootDeviceName"]
        shown = ec2.describe_instances(InstanceIds=[made.id])["Reservations"][0]["Instances"][0]
        assert [one["DeviceName"] for one in shown["BlockDeviceMappings"]] == [device], "no second disk"
        assert shown["InstanceLifecycle"] == "spot"


def test_what_google_refuses_is_said_and_what_it_has_taken_is_not_forgotten(gce: GCE) -> None:
    values = {"provider": "gce", "project": "us-east-1", "image": "projects/x/global/images/y", "user": "root", "zones": ["z"]}
    there = clouds.connect({**values, "endpoint": gce.url}, "abc")
    text = boot.startup_script(b"x" * 32, "m-1", "root", is_spot=False)
    order = cloud.Order("m-1", "e2-small", "z", False, text, "ssh-ed25519 AAAA cpool")
    gce.fault = lambda action, number: "absent" if action == "insert" else None
    with pytest.raises(cloud.RefusedError, match=r"404: .*no such image"):
        there.launch(order)
    gce.fault = lambda action, number: "forbidden" if action == "get" else None
    with pytest.raises(RemoteError, match="what has become of m-1"):
        there.launch(order)
    gce.fault = lambda action, number: None
    made = there.launch(order)
    assert made == there.look(made) and len(gce.sent) == 1 and "onHostMaintenance" not in gce.sent[0]["scheduling"]  # type: ignore[operator]
    there.end([made])
    there.end([made])
    assert there.look(made) is None and there.instances() == []


PRICED = """# kept
[[machines]]  # the first
name = "m5.large"  # and this
cpus = 2
  price = 9.5 # old
[scaling]
price = 5.0
[[machines]]
type = "c5.large"
name = 'plain'
[[machines]]
name = "s"
type = "m5.large"
spot = true
"""


def test_prices_are_written_into_pool_toml_and_nothing_else_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pricing.filled(PRICED, {"m5.large": 0.096, "s": 0.0312, "other": 1.0})
    changes = [line for line in difflib.ndiff(PRICED.splitlines(), found.splitlines()) if line[0] in "+-"]
    assert changes == ["-   price = 9.5 # old", "+   price = 0.096 # old", "+ price = 0.0312"]
    path = tmp_path / "pool.toml"
    path.write_text('[[machines]]\nname = "a"\ncpus = 1\n')
    pricing.fill(str(path), {"a": 0.5})
    assert path.read_text() == '[[machines]]\nname = "a"\nprice = 0.5\ncpus = 1\n'
    before = path.read_text()
    with pytest.raises(CafsError, match="cannot find the machines"):
        pricing.fill(str(path), {"elsewhere": 1.0})
    assert path.read_text() == before and os.listdir(tmp_path) == ["pool.toml"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with mock_aws():
        cloud_table = {"provider": "ec2", "region": "us-east-1", "zones": ["us-east-1a"]}
        one = Settings(machines=({"name": "s", "type": "m5.large", "spot": True},), cloud=cloud_table)
        assert pricing.ask(one)["s"] > 0
    with pytest.raises(UnsupportedError):
        pricing.ask(Settings(cloud={"provider": "gce"}))


def test_a_price_on_demand_is_read_out_of_what_amazon_answers() -> None:
    """The form of GetProducts' answer, from the AWS Price List user guide; moto has none."""
    good = {"terms": {"OnDemand": {"T": {"priceDimensions": {"D": {"unit": "Hrs", "pricePerUnit": {"USD": "0.0960000000"}}}}}}}
    free = {"terms": {"OnDemand": {"T": {"priceDimensions": {"D": {"unit": "Hrs", "pricePerUnit": {"USD": "0.0"}}}}}}}
    assert ec2.dollars(["[]", "x", json.dumps({"terms": {}}), json.dumps(free), json.dumps(good)]) == 0.096
    assert ec2.dollars([]) is None


def test_only_what_root_wrote_is_believed_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about, alive = tmp_path / "machine.json", tmp_path / "alive"
    about.write_text(json.dumps({"alive": str(alive)}))
    monkeypatch.setenv("CPOOL_MACHINE", str(about))
    alive.touch()
    for mode, owner, is_touched in ((0o644, 0, True), (0o666, 0, False), (0o644, 1, False)):
        os.utime(alive, (1, 1))
        about.chmod(mode)
        os.chown(about, owner, owner)
        launched.Launched().is_needed()
        assert (alive.stat().st_mtime > 1) is is_touched


def test_a_state_of_the_version_before_is_kept_and_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    ok("init")
    ok("submit", *PLAIN, "--", "true")
    db = sqlite3.connect(tmp_path / "pool" / "state.db")
    db.executescript("DROP TABLE machines; PRAGMA user_version=1")
    db.close()
    assert job(1)["state"] == "queued" and ok("cloud", "ls", "-q") == ""
    db = sqlite3.connect(tmp_path / "pool" / "state.db.1")
    assert db.execute("PRAGMA user_version").fetchone() == (1,) and db.execute("SELECT COUNT(*) FROM jobs").fetchone() == (1,)
    db.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[cloud]\nprovider = "azure"', "pool.toml:1: provider is ec2 or gce"),
        ('[cloud]\nprovider = "gce"\nzones = ["a"]\nimage = "i"\nuser = "u"', "pool.toml:1: [cloud] needs project"),
        ('[cloud]\nprovider = "ec2"\nzones = "a"', "pool.toml:3: zones is not a list of texts"),
        ('[[machines]]\nname = "x"\ncpus = 1\nspot = 1', "pool.toml:4: spot is not a true or false"),
    ],
)
def test_what_is_wrong_with_a_cloud_in_pool_toml_is_said_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    ok("init")
    (tmp_path / "pool" / "pool.toml").write_text(text)
    done = cp("tick")
    assert done.returncode == 5 and message in done.stderr, done.stderr
