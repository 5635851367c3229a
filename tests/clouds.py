"""Clouds on loopback for tests: what they launch are real sshd servers, with the host key and files of their user data.

EC2 is moto's server behind a layer that does what moto does not: client tokens that find the machine again, machines that are
pending or not yet shown, no capacity, throttling, answers that are lost.  GCE is a small server of our own with the same faults.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moto.server import ThreadedMotoServer

from tests.faultproxy import free_port
from tests.waiting import SLOW

Fault = Callable[[str, int], str | None]


class Machine:
    """An sshd at an address of its own, as its user data wants it; it ends with all that runs there."""

    def __init__(self, place: Path, address: str, port: int, files: dict[str, str], private: str, authorized: str) -> None:
        place.mkdir(mode=0o700)
        self.place, self.address = place, address
        (place / "alive").touch()
        about = json.loads(files["/etc/cpool/machine.json"]) | {"alive": str(place / "alive")}
        (place / "machine.json").write_text(json.dumps(about))
        (place / "machine.json").chmod(0o644)
        (place / "host").write_text(private)
        (place / "host").chmod(0o600)
        (place / "keys").write_text(authorized + "\n")
        kept = "".join(f" CAFS_{name}={place}/{name.lower()}" for name in ("CACHE", "RUN", "STATE"))
        (place / "config").write_text(
            f"Port {port}\nListenAddress {address}\nHostKey {place}/host\nAuthorizedKeysFile {place}/keys\nStrictModes no\n"
            f"PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nSetEnv HOME={place} CPOOL_MACHINE={place}/machine.json{kept}\n"
        )
        os.makedirs("/run/sshd", exist_ok=True)
        self._server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "config"], stderr=subprocess.DEVNULL)

    def end(self) -> None:
        """At once, as when the power goes."""
        self._server.kill()
        self._server.wait()
        for pid in self._processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _processes(self) -> list[int]:
        mark = f"HOME={self.place}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
            except OSError:
                continue
        return found


class Cloud:
    """A server with faults.  fault: of an action and its number, counted from 1, a word or None.

    refuse-capacity, throttle: an error; lost: done, but the answer never comes; empty: a list of nothing.
    hidden_s, pending_s: how long a new machine is not shown, and is not running.  boots: whether machines come up.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.port = free_port()
        self.fault: Fault = lambda action, number: None
        self.hidden_s = self.pending_s = 0.0
        self.boots = True
        self.counts: dict[str, int] = {}
        self.machines: dict[str, Machine] = {}
        self.since: dict[str, float] = {}
        self.lock = threading.RLock()
        outer = self

        class Handler(_Handler):
            cloud = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Cloud:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for one in list(self.machines):
            self.end(one)

    def fault_of(self, action: str) -> str | None:
        with self.lock:
            self.counts[action] = self.counts.get(action, 0) + 1
            return self.fault(action, self.counts[action])

    def address_of(self, number: int) -> str:
        return f"127.77.{number >> 8}.{number & 255 or 250}"

    def end(self, identity: str) -> None:
        machine = self.machines.pop(identity, None)
        if machine:
            machine.end()

    def age_s(self, identity: str) -> float:
        return time.monotonic() - self.since.get(identity, 0.0)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        """None: the answer is lost."""
        raise NotImplementedError


class _Handler(BaseHTTPRequestHandler):
    cloud: Cloud
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = self.cloud.answer(self.command, self.path, dict(self.headers), body)
        if found is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, data = found
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if data[:1] in b"{[" else "text/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = do_PUT = _serve

    def log_message(self, *_: object) -> None:
        pass


class EC2(Cloud):
    """moto's, with what it lacks."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._moto_port = free_port()
        self._moto = ThreadedMotoServer("127.0.0.1", self._moto_port, verbose=False)
        self._tokens: dict[str, bytes] = {}

    def __enter__(self) -> EC2:
        self._moto.start()
        super().__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        super().__exit__(*failure)
        self._forward("POST", "/moto-api/reset", {}, b"")
        self._moto.stop()

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._moto_port, timeout=30 * SLOW)
        try:
            connection.request(method, path, body, {**headers, "Host": f"127.0.0.1:{self._moto_port}"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        asked = {name: values[0] for name, values in urllib.parse.parse_qs(body.decode()).items()}
        action = asked.get("Action", "")
        fault = self.fault_of(action)
        if fault == "throttle":
            return 503, _error("RequestLimitExceeded", "Request limit exceeded.")
        if fault == "refuse-capacity":
            return 500, _error("InsufficientInstanceCapacity", "We currently do not have sufficient capacity.")
        if fault == "refuse":
            return 403, _error("UnauthorizedOperation", "You are not authorized to perform this operation.")
        if action == "RunInstances":
            status, data = self._run(asked, method, path, headers, body)
        elif action == "DescribeInstances":
            with self.lock:  # a machine is shown when it is made, and has its address
                status, data = self._forward(method, path, headers, body)
                if status == 200:
                    data = self._shown(data, is_empty=fault == "empty", is_list="InstanceId.1" not in asked)
        else:
            status, data = self._forward(method, path, headers, body)
            if action == "TerminateInstances" and status == 200:
                self.end(asked["InstanceId.1"])
        return None if fault == "lost" else (status, data)

    def _run(self, asked: dict[str, str], *request: object) -> tuple[int, bytes]:
        with self.lock:
            token = asked["ClientToken"]
            if token in self._tokens:
                return 200, self._tokens[token]
            status, data = self._forward(*request)  # type: ignore[arg-type]
            if status == 200:
                (identity,) = re.findall("<instanceId>(i-[0-9a-f]+)</instanceId>", data.decode())
                data = self._tokens[token] = data.replace(b"<name>running</name>", b"<name>pending</name>")
                self.since[identity] = time.monotonic()
                if self.boots:
                    config = json.loads(base64.b64decode(asked["UserData"]).split(b"\n", 1)[1])
                    files = {one["path"]: one["content"] for one in config["write_files"]}
                    address = self.address_of(len(self.since))
                    private, (key,) = config["ssh_keys"]["ed25519_private"], config["ssh_authorized_keys"]
                    self.machines[identity] = Machine(self.place / identity, address, self.port, files, private, key)
            return status, data

    def _shown(self, data: bytes, *, is_empty: bool, is_list: bool) -> bytes:
        root = ET.fromstring(data)
        space = root.tag.partition("}")[0] + "}"
        ET.register_namespace("", space[1:-1])
        groups = root.find(f"{space}reservationSet")
        assert groups is not None
        for group in list(groups):
            items = group.find(f"{space}instancesSet")
            assert items is not None
            for item in list(items):
                identity = item.findtext(f"{space}instanceId", "")
                if is_list and (is_empty or self.age_s(identity) < self.hidden_s):
                    items.remove(item)
                    continue
                machine = self.machines.get(identity)
                for name in ("privateIpAddress", "ipAddress"):
                    for one in item.findall(space + name):
                        one.text = machine.address if machine else "127.77.255.1"
                if self.age_s(identity) < self.pending_s:
                    for one in item.findall(f"{space}instanceState/{space}name"):
                        one.text = "pending"
            if not len(items):
                groups.remove(group)
        return ET.tostring(root)


def _error(code: str, text: str) -> bytes:
    return f"<Response><Errors><Error><Code>{code}</Code><Message>{text}</Message></Error></Errors></Response>".encode()


class GCE(Cloud):
    """The six routes that the pool uses, as Google's REST reference has them.  known: by name.  sent: what insert was asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.known: dict[str, dict[str, object]] = {}
        self.sent: list[dict[str, object]] = []
        self._operations: dict[str, dict[str, object]] = {}

    def take_away(self, name: str) -> None:
        """Say to the machine that it is preempted."""
        (self.place / name / "computeMetadata/v1/instance").mkdir(parents=True)
        (self.place / name / "computeMetadata/v1/instance/preempted").write_text("TRUE")

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        metadata = re.fullmatch("/(m-[0-9a-f]+)/(computeMetadata/.*)", path)
        if metadata:  # of a machine
            file = self.place / metadata[1] / metadata[2]
            return (200, file.read_bytes()) if file.exists() and headers.get("Metadata-Flavor") == "Google" else (404, b"")
        place, _, query = path.removeprefix("/compute/v1/projects/us-east-1/").partition("?")
        words = place.split("/")
        action = {"POST": "insert", "DELETE": "delete"}.get(method) or ("list" if words[0] == "aggregated" else "get")
        if words[-1] == "wait":
            return 200, json.dumps(self._operations[words[-2]]).encode()
        fault = self.fault_of(action)
        if fault == "absent":
            return 404, b'{"error": {"code": 404, "message": "no such image"}}'
        if fault == "forbidden":
            return 403, b'{"error": {"code": 403, "message": "forbidden"}}'
        if fault == "throttle":
            return 429, b'{"error": {"code": 429, "message": "rateLimitExceeded"}}'
        status, found = getattr(self, f"_{action}")(words, urllib.parse.parse_qs(query), body, fault)
        return None if fault == "lost" else (status, json.dumps(found).encode())

    def _insert(self, words: list[str], query: object, body: bytes, fault: str | None) -> tuple[int, dict[str, object]]:
        asked, zone = json.loads(body), words[1]
        name = asked["name"]
        operation: dict[str, object] = {"name": f"operation-{len(self.sent)}", "status": "DONE"}
        self._operations[str(operation["name"])] = operation
        if fault == "refuse-capacity":
            operation["error"] = {"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": "none left"}]}
            self.sent.append(asked)
            return 200, operation
        with self.lock:
            if name in self.known:
                return 409, {"error": {"code": 409, "message": "already exists"}}
            self.sent.append(asked)
            self.since[name] = time.monotonic()
            items = {one["key"]: one["value"] for one in asked["metadata"]["items"]}
            words = shlex.split(items["startup-script"].partition("\n")[2])
            files = {words[at + 3][1:]: words[at + 2] for at, word in enumerate(words) if word == "printf"}
            about = json.loads(files["/etc/cpool/machine.json"]) | {"metadata": f"{self.url}/{name}"}
            address, user_key = self.address_of(len(self.since)), items["ssh-keys"].partition(":")[2]
            private = files["/etc/ssh/ssh_host_ed25519_key"]
            files["/etc/cpool/machine.json"] = json.dumps(about)
            self.machines[name] = Machine(self.place / name, address, self.port, files, private, user_key)
            self.known[name] = {
                "id": str(len(self.since)), "name": name, "zone": f"https://x/zones/{zone}", "labels": asked["labels"],
                "networkInterfaces": [{"networkIP": address}], "creationTimestamp": datetime.now(UTC).isoformat(),
            }  # fmt: skip
        return 200, operation

    def _shown(self, name: str) -> dict[str, object]:
        return {**self.known[name], "status": "PROVISIONING" if self.age_s(name) < self.pending_s else "RUNNING"}

    def _get(self, words: list[str], *_: object) -> tuple[int, dict[str, object]]:
        return (200, self._shown(words[-1])) if words[-1] in self.known else (404, {"error": {"code": 404, "message": "none"}})

    def _list(
        self, words: object, query: dict[str, list[str]], body: object, fault: str | None
    ) -> tuple[int, dict[str, object]]:
        _, _, pool = query["filter"][0].partition("labels.cpool=")
        shown = [self._shown(name) for name in self.known if fault != "empty" and self.age_s(name) >= self.hidden_s]
        return 200, {"items": {"zones/x": {"instances": [one for one in shown if one["labels"] == {"cpool": pool}]}}}

    def _delete(self, words: list[str], *_: object) -> tuple[int, dict[str, object]]:
        if self.known.pop(words[-1], None) is None:
            return 404, {"error": {"code": 404, "message": "none"}}
        self.end(words[-1])
        return 200, {"name": "operation-delete", "status": "DONE"}
