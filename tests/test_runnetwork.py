"""Bridges, published ports, names and resolvers; in a network namespace of the test's own, which is its host."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import BIN
from tests.crunning import until
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox", "nft", "ip", "curl")
Crun = Callable[..., "subprocess.CompletedProcess[str]"]
HOST = f"cafstest{os.getpid()}"
ADDRESS = "192.0.2.77"
HOST_PROGRAMS = [
    word for name in ("usr", "lib", "lib64") if os.path.isdir(f"/{name}") for word in ("-v", f"/{name}:/{name}:ro")
]


@pytest.fixture
def inside() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run a command on a host of its own, with one more address; its mount namespace is ours."""
    subprocess.run(["ip", "netns", "add", HOST], check=True)

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = ["nsenter", f"--net=/run/netns/{HOST}", *map(str, words)]
        options["timeout"] = options.get("timeout", 60) * SLOW
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    try:
        for words in (
            "ip link set lo up",
            "ip link add outer type bridge",
            f"ip addr add {ADDRESS}/24 dev outer",
            "ip link set outer up",
        ):
            assert run(*words.split()).returncode == 0
        yield run
    finally:
        subprocess.run(["ip", "netns", "del", HOST], check=True)


@pytest.fixture
def cr(image: Path, inside: Crun) -> Iterator[Crun]:
    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        return inside(BIN / "crun", *words, **options)

    yield run
    left = run("ps", "-aq").stdout.split()
    if left:
        run("rm", "-f", *left)
    assert not list((image / "run" / "ports").glob("*")) and not list((image / "run" / "networks").glob("*/*"))


def serve(cr: Crun, name: str, *words: object) -> None:
    done = cr("run", "-d", "--name", name, *words, "b:1", "httpd", "-f", "-h", "/etc")
    assert done.returncode == 0, done.stderr
    await_server(cr, name)


def await_server(cr: Crun, name: str) -> None:
    """Until something in a container listens at port 80."""
    look = "cat /proc/net/tcp /proc/net/tcp6 | grep -q ':0050 [0:]* 0A '"
    assert until(lambda: cr("exec", name, "sh", "-c", look).returncode == 0)


def fetch(run: Crun, url: str) -> str:
    return run("curl", "-s", "-m", 3 * SLOW, url).stdout


def test_a_published_port_answers_everywhere_and_goes_with_its_container(cr: Crun, inside: Crun) -> None:
    serve(cr, "web", "-p", "18080:80", "-p", "127.0.0.1:18081:80", "-p", "80")
    for address in ("127.0.0.1", ADDRESS, "10.87.0.1"):
        assert "joe:x:1001" in fetch(inside, f"http://{address}:18080/group"), address
    assert "joe" in fetch(inside, "http://127.0.0.1:18081/group") and fetch(inside, f"http://{ADDRESS}:18081/group") == ""
    random = cr("port", "web", "80").stdout.split()[-1].partition(":")[2]
    assert "joe" in fetch(inside, f"http://127.0.0.1:{random}/group")
    done = cr("run", "--rm", "b:1", "wget", "-q", "-O", "-", f"http://{ADDRESS}:18080/group")
    assert "joe" in done.stdout, done.stderr
    assert "joe" in cr("exec", "web", "wget", "-q", "-O", "-", f"http://{ADDRESS}:18080/group").stdout, "also from itself"
    assert "0.0.0.0:18080->80/tcp" in cr("ps").stdout
    ports = json.loads(cr("inspect", "web").stdout)["NetworkSettings"]["Ports"]["80/tcp"]
    assert {"HostIp": "127.0.0.1", "HostPort": "18081"} in ports
    done = cr("run", "--rm", "-p", "18080:80", "b:1", "true")
    assert done.returncode == 125 and "port 18080/tcp of the host is in use" in done.stderr
    assert cr("rm", "-f", "web").returncode == 0
    assert fetch(inside, "http://127.0.0.1:18080/group") == ""
    assert "18080" not in inside("nft", "list", "table", "ip", "cafs").stdout
    serve(cr, "again", "-p", "18080:80")
    assert "joe" in fetch(inside, "http://127.0.0.1:18080/group")


@pytest.fixture
def neighbour(inside: Crun) -> Iterator[Crun]:
    """Run a command on another host of the same link, which sends what is for 127.0.0.1 and for containers to the first."""
    subprocess.run(["ip", "netns", "add", f"{HOST}2"], check=True)
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False, timeout=60)

    def there(*words: object) -> subprocess.CompletedProcess[str]:
        return run(["nsenter", f"--net=/run/netns/{HOST}2", *map(str, words)])

    try:
        assert inside(*f"ip link add port master outer up type veth peer name wire netns {HOST}2".split()).returncode == 0
        for words in (
            "ip addr add 192.0.2.9/24 dev wire",
            "ip link set wire up",
            "sysctl -qw net.ipv4.conf.all.route_localnet=1",
            f"ip route add 10.87.0.0/16 via {ADDRESS}",
            f"ip route add 127.0.0.1/32 via {ADDRESS} src 192.0.2.9",
        ):
            assert there(*words.split()).returncode == 0, words
        yield there
    finally:
        subprocess.run(["ip", "netns", "del", f"{HOST}2"], check=True)


def test_neighbours_of_the_host_reach_what_is_published_to_them_alone(cr: Crun, inside: Crun, neighbour: Crun) -> None:
    """moby 41872, 45610, 48724: by a packet for 127.0.0.1 on the wire, and by a route to the bridge's network."""
    serve(cr, "web", "-p", "18080:80", "-p", "127.0.0.1:18081:80")
    address = json.loads(cr("inspect", "web").stdout)["NetworkSettings"]["IPAddress"]
    assert "joe" in fetch(neighbour, f"http://{ADDRESS}:18080/group")
    for open_only_here in ("127.0.0.1:18081", f"{address}:80"):
        assert "joe" in fetch(inside, f"http://{open_only_here}/group")
        assert fetch(neighbour, f"http://{open_only_here}/group") == "", open_only_here
    inside("nft", "flush", "ruleset")
    serve(cr, "next")
    assert "joe" in fetch(neighbour, f"http://{ADDRESS}:18080/group"), "the rules are made anew, with all ports"
    assert fetch(neighbour, "http://127.0.0.1:18081/group") == fetch(neighbour, f"http://{address}:80/group") == ""


def test_a_flow_of_udp_goes_to_who_has_the_port_now(cr: Crun, inside: Crun) -> None:
    """moby 8795: the client goes on sending while the container is replaced, and another gets a container before it."""
    receive = [
        *HOST_PROGRAMS,
        "b:1",
        "/usr/bin/python3",
        "-uc",
        "import socket\ns = socket.socket(2, 2)\ns.bind(('', 90))\nwhile 1: print(s.recv(9))",
    ]
    code = "import socket, time\ns = socket.socket(2, 2)\ns.bind(('', 5555))\nwhile 1:\n s.sendto(b'x', ('%s', 19000)); time.sleep(0.02)"
    with subprocess.Popen(["nsenter", f"--net=/run/netns/{HOST}", sys.executable, "-c", code % ADDRESS]) as client:
        try:
            assert cr("run", "-d", "--name", "old", "-p", "19000:90/udp", *receive).returncode == 0
            assert until(lambda: "x" in cr("logs", "old").stdout)
            before = json.loads(cr("inspect", "old").stdout)["NetworkSettings"]["IPAddress"]
            assert cr("rm", "-f", "old").returncode == 0
            assert cr("run", "-d", "--name", "other", *receive).returncode == 0
            assert cr("run", "-d", "--name", "new", "-p", "19000:90/udp", *receive).returncode == 0
            assert until(lambda: "x" in cr("logs", "new").stdout)
        finally:
            client.kill()
    assert cr("logs", "other").stdout == ""
    assert json.loads(cr("inspect", "other").stdout)["NetworkSettings"]["IPAddress"] != before, "not at once another's"


def test_a_port_that_a_process_of_the_host_has_is_refused(cr: Crun, inside: Crun) -> None:
    code = "import socket, sys; s = socket.create_server(('', 18099)); print('listens', flush=True); sys.stdin.read()"
    command = ["nsenter", f"--net=/run/netns/{HOST}", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taken:
        assert taken.stdout and taken.stdout.readline() == b"listens\n"
        assert cr("run", "--rm", "-p", "18099:80", "b:1", "true").returncode == 125
        taken.kill()


def test_neighbours_know_each_other_by_name_and_other_networks_not(cr: Crun, inside: Crun) -> None:
    assert (
        cr("network", "create", "one").stdout == "one\n"
        and cr("network", "create", "two", "--subnet", "10.99.7.0/24").returncode == 0
    )
    serve(cr, "first", "--network", "one")
    serve(cr, "second", "--network", "one")
    serve(cr, "other", "--network", "two")
    other = json.loads(cr("inspect", "other").stdout)["NetworkSettings"]["IPAddress"]
    assert other == "10.99.7.2"
    for source, target in (("first", "second"), ("second", "first")):
        assert "joe" in cr("exec", source, "wget", "-q", "-O", "-", f"http://{target}/group").stdout
    assert cr("exec", "first", "ping", "-c", "1", "-W", "1", other).returncode == 1
    assert "other" not in cr("exec", "first", "cat", "/etc/hosts").stdout
    assert cr("rm", "-f", "second").returncode == 0
    assert "second" not in cr("exec", "first", "cat", "/etc/hosts").stdout
    assert cr("network", "rm", "one").returncode == 6
    assert cr("network", "create", "three", "--subnet", "10.99.0.0/16").returncode == 6, "it overlaps"
    assert cr("rm", "-f", "first", "other").returncode == 0
    assert cr("network", "prune").stdout == "one\ntwo\n" and cr("network", "ls", "-q").stdout == "bridge\n"
    assert "cafs-" not in inside("ip", "link").stdout


def test_a_network_can_be_shared_and_so_can_processes(cr: Crun) -> None:
    serve(cr, "web", "-p", "18082:80")
    assert (
        "joe"
        in cr("run", "--rm", "--network", "container:web", "b:1", "wget", "-q", "-O", "-", "http://127.0.0.1/group").stdout
    )
    assert "httpd" in cr("run", "--rm", "--pid", "container:web", "--network", "none", "b:1", "cat", "/proc/1/cmdline").stdout
    done = cr("run", "--rm", "--network", "host", "b:1", "ip", "addr")
    assert ADDRESS in done.stdout


def test_addresses_are_leased_once_and_given_back(cr: Crun, image: Path) -> None:
    """Eight at once; none twice; after crashes of all kinds they are free again."""
    commands = [
        subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{HOST}", BIN / "crun", "run", "-d", "b:1", "sleep", "60"], stdout=subprocess.PIPE
        )
        for _ in range(8)
    ]
    assert all(command.wait(60 * SLOW) == 0 for command in commands)
    found = [json.loads(cr("inspect", name).stdout)["NetworkSettings"]["IPAddress"] for name in cr("ps", "-q").stdout.split()]
    assert len(set(found)) == 8 and len(list((image / "run" / "networks" / "bridge").iterdir())) == 8
    assert cr("rm", "-f", *cr("ps", "-q").stdout.split()).returncode == 0
    assert list((image / "run" / "networks" / "bridge").iterdir()) == []
    child = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{HOST}", BIN / "crun", "run", "--rm", "-p", "18083:80", "b:1", "sleep", "60"]
    )
    assert until(lambda: list((image / "run" / "ports").iterdir()) and cr("ps", "-q").stdout != "")
    child.kill()
    child.wait()
    assert until(
        lambda: not list((image / "run" / "ports").iterdir()) and not list((image / "run" / "networks" / "bridge").iterdir())
    )


def test_hosts_resolvers_and_dns_flags(cr: Crun, tmp_path: Path) -> None:
    done = cr(
        "run",
        "--rm",
        "--hostname",
        "box",
        "--add-host",
        "db:10.1.2.3",
        "--add-host",
        "up:host-gateway",
        "b:1",
        "cat",
        "/etc/hosts",
    )
    lines = done.stdout.splitlines()
    assert (
        "10.1.2.3\tdb" in lines
        and "10.87.0.1\tup" in lines
        and any(line.startswith("10.87.0.") and "\tbox " in line for line in lines)
    )
    done = cr(
        "run",
        "--rm",
        "--dns",
        "9.9.9.9",
        "--dns-search",
        "example.org",
        "--dns-option",
        "ndots:2",
        "b:1",
        "cat",
        "/etc/resolv.conf",
    )
    assert done.stdout == "nameserver 9.9.9.9\nsearch example.org\noptions ndots:2\n"
    assert cr("run", "--rm", "--dns", "nine", "b:1", "true").returncode == 125
    (tmp_path / "own").write_text("nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch here\noptions rotate\n")
    for words, wanted in (
        ("--dns-search there", "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch there\noptions rotate\n"),
        ("--dns-opt ndots:2", "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch here\noptions ndots:2\n"),
        ("--dns 9.9.9.9 --dns-search .", "nameserver 9.9.9.9\noptions rotate\n"),
    ):
        script = f"mount --bind {tmp_path}/own /etc/resolv.conf && exec {BIN}/crun run --rm {words} b:1 cat /etc/resolv.conf"
        command = ["nsenter", f"--net=/run/netns/{HOST}", "unshare", "-m", "sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * SLOW)
        assert done.stdout == wanted, done.stderr
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\nnameserver 192.0.2.53\nsearch here\n")
    script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {BIN}/crun run --rm b:1 cat /etc/resolv.conf"
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{HOST}", "unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * SLOW,
    )
    assert done.stdout == "nameserver 192.0.2.53\nsearch here\n", done.stderr


@pytest.mark.needs("iptables")
def test_without_nft_iptables_does_it_and_without_both_it_says_so(cr: Crun, inside: Crun) -> None:
    hide = f"mount --bind /dev/null {os.path.realpath(str(shutil.which('nft')))}"

    def hidden(*words: str, more: str = "true") -> subprocess.CompletedProcess[str]:
        return inside("unshare", "-m", "sh", "-c", f'{hide} && {more} && exec "$@"', "sh", BIN / "crun", *words)

    done = hidden("run", "-d", "--name", "web", "-p", "18084:80", "b:1", "httpd", "-f", "-h", "/etc")
    assert done.returncode == 0, done.stderr
    await_server(cr, "web")
    for address in ("127.0.0.1", ADDRESS):
        assert "joe" in fetch(inside, f"http://{address}:18084/group")
    assert hidden("rm", "-f", "web").returncode == 0
    assert "18084" not in inside("iptables", "-t", "nat", "-S").stdout
    inside("ip", "link", "del", "cafs0")
    done = hidden(
        "run", "--rm", "b:1", "true", more=f"mount --bind /dev/null {os.path.realpath(str(shutil.which('iptables')))}"
    )
    assert done.returncode == 8 and "neither nft nor iptables" in done.stderr and "--network host" in done.stderr
    done = hidden(
        "run", "-d", "--rm", "b:1", "true", more=f"mount --bind /dev/null {os.path.realpath(str(shutil.which('iptables')))}"
    )
    assert done.returncode == 8 and "--network host" in done.stderr, "the same in the background"


def test_an_ordinary_shell_may_ping_and_use_low_ports(cr: Crun) -> None:
    done = cr("run", "--rm", "-u", "joe", "b:1", "sh", "-c", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip route")
    assert done.stdout.splitlines()[0] == "0" and "default via 10.87.0.1" in done.stdout


def test_a_container_can_be_started_again_while_another_is_in_its_network(cr: Crun) -> None:
    assert cr("run", "-d", "--name", "first", "--restart", "always", "b:1", "sleep", "90").returncode == 0
    assert cr("run", "-d", "--name", "side", "--network", "container:first", "b:1", "sleep", "90").returncode == 0
    name = cr("exec", "first", "hostname").stdout
    script = "hostname; cat /etc/hostname; echo $HOSTNAME; ping -c 1 -W 2 $(hostname) >&2"
    done = cr("exec", "side", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, 3 * name), done.stderr
    assert cr("restart", "-t", "0", "first").returncode == 0
    assert "eth0" not in cr("exec", "side", "ip", "addr").stdout, "the address may be another's by now"
    os.kill(json.loads(cr("inspect", "first").stdout)["State"]["Pid"], signal.SIGKILL)
    assert until(lambda: json.loads(cr("inspect", "first").stdout)["RestartCount"] == 1)
    assert until(lambda: json.loads(cr("inspect", "first").stdout)["State"]["Running"])
    cr("rename", "first", "other")
    assert cr("restart", "-t", "0", "side").returncode == 0, "whatever the other is called by now"
    assert cr("rm", "-f", "side", "other").returncode == 0


BIND = """
import socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for reuse in (0, 1):
        with socket.socket(socket.AF_INET, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            try:
                one.bind(("", 18088))
                print("bound")
            except OSError as error:
                print(error.errno)
"""


def test_no_program_of_the_host_gets_a_port_that_is_published(cr: Crun, inside: Crun, image: Path) -> None:
    taken, free = ["98"] * 4, ["bound"] * 4
    for words in (["-d"], []):
        command = ["run", *words, "--name", "web", "-p", "18088:80", "-p", "18088:80/udp", "b:1", "sleep", "90"]
        child = subprocess.Popen(["nsenter", f"--net=/run/netns/{HOST}", BIN / "crun", *command], stdout=subprocess.PIPE)
        assert until(lambda: cr("ps", "-q").stdout)
        for _ in range(2):
            assert inside(sys.executable, "-c", BIND).stdout.split() == taken
            if words:
                subprocess.run(
                    ["pkill", "-KILL", "-f", f"runner.monitor {cr('ps', '-q', '--no-trunc').stdout.strip()}"], check=True
                )
        assert cr("restart", "-t", "0", "web").returncode == 0 if words else True
        assert cr("rm", "-f", "web").returncode == 0
        child.communicate(timeout=30 * SLOW)
        assert inside(sys.executable, "-c", BIND).stdout.split() == free


def test_what_is_exposed_is_published_with_p(cr: Crun) -> None:
    words = ("-P", "--expose", "80", "--expose", "90-91/udp", "-p", "18090:90/udp")
    assert cr("run", "-d", "--name", "all", *words, "b:1", "sleep", "60").returncode == 0
    lines = sorted(line.split(" -> ")[0] for line in cr("port", "all").stdout.splitlines())
    assert lines == ["80/tcp", "90/udp", "91/udp"]
    done = cr("run", "--rm", "--network", "host", "-p", "1:1", "b:1", "true")
    assert done.returncode == 0 and "without effect" in done.stderr
    assert cr("rm", "-f", "all").returncode == 0


def test_of_a_range_for_one_port_the_first_that_is_free_is_taken(cr: Crun) -> None:
    for name in ("one", "two"):
        assert cr("run", "-d", "--name", name, "-p", "18100-18101:80", "b:1", "sleep", "60").returncode == 0
    assert [cr("port", name, "80").stdout for name in ("one", "two")] == ["0.0.0.0:18100\n", "0.0.0.0:18101\n"]
    assert "18100 to 18101" in cr("run", "--rm", "-p", "18100-18101:80", "b:1", "true").stderr
    assert cr("rm", "-f", "one", "two").returncode == 0
