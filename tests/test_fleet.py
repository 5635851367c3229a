"""Machines that a pool launches: real controllers, real sshd machines, a cloud that goes wrong in every way we know of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.clouds import EC2
from tests.conftest import BIN, wait_until
from tests.test_pool import PLAIN, agents, cp, job, ok

pytestmark = pytest.mark.needs("root", "sshd")

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
cpus = 2
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
        (self.pool / "pool.toml").write_text(POOL_TOML.format(**values, boot_s=boot_s, more=more))

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
    for pid in agents(tmp_path):
        os.kill(pid, signal.SIGKILL)


def machines() -> list[dict[str, object]]:
    return [json.loads(line) for line in ok("cloud", "ls", "--all", "--json").splitlines()]


def test_machines_come_when_there_is_work_and_go_when_there_is_none(aws: Aws) -> None:
    aws.cloud.pending_s = aws.cloud.hidden_s = 0.5
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(lambda: cp("nodes").returncode == 0)
        ids = [
            ok(
                "submit", *PLAIN, "--cpus", "2", "--workdir", "/", "--", "sh", "-c", "sleep 0.5; echo $CPOOL_WORKER $HOME"
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
    sent = [one for one in aws.instances()]
    assert all({"Key": "cpool-name", "Value": row["name"]} in one["Tags"] for one, row in zip(sent, machines(), strict=True))  # type: ignore[operator]
    assert all(one["MetadataOptions"]["HttpTokens"] == "required" for one in sent)  # type: ignore[index]
