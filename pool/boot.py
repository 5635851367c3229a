"""What a launched machine does when it boots: it takes the host key that we know, lets our key in, and arms its own end.

A machine that no controller is connected to for DEADMAN_S powers itself off, which at EC2 is its end: a pool whose controller
is gone for good costs nothing.  The agent only shows that it is needed, by changing a file's times; what powers off is a
process of root's that this text has started, so no machine that was not launched by a pool ever does.
"""

from __future__ import annotations

import json
import shlex

from pool import keys

DEADMAN_S = 600
ALIVE = "/run/cpool/alive"
MACHINE = "/etc/cpool/machine.json"
"""What the agent may know of the machine; it is believed if root wrote it.  alive: the file to touch; notice: the cloud, if it
may take the machine away."""

_LOOP = """\
#!/bin/sh
# Powers this machine off when nobody has touched ALIVE for LIMIT seconds; by counting, as clocks may jump.
ALIVE=$1 LIMIT=$2 STEP=${3:-15}
silent=0 last=
while sleep "$STEP"; do
	now=$(stat -c %Y.%Z "$ALIVE" 2>/dev/null)
	if [ "$now" = "$last" ]; then silent=$((silent + STEP)); else silent=0; fi
	last=$now
	[ "$silent" -lt "$LIMIT" ] || exec shutdown -h now
done
"""
_PLACE = "/usr/local/lib/cpool-deadman"
_EACH_BOOT = "/var/lib/cloud/scripts/per-boot/cpool"


def _begin(user: str) -> str:
    """The shell commands that make ALIVE and start the loop, at each boot; the user may be made by others a little later."""
    place, name = ALIVE.rpartition("/")[0], shlex.quote(user)
    make = f"mkdir -p {place}; : >{ALIVE}; chmod 755 {place}"
    own = f"(until id {name} >/dev/null 2>&1; do sleep 1; done; chown {name} {ALIVE}) </dev/null >/dev/null 2>&1 &"
    return f"{make}\n{own}\nsetsid {_PLACE} {ALIVE} {DEADMAN_S} </dev/null >/dev/null 2>&1 &"


def _machine(provider: str, *, is_spot: bool) -> str:
    return json.dumps({"alive": ALIVE, "notice": provider if is_spot else ""})


def cloud_config(secret: bytes, name: str, user: str, *, is_spot: bool) -> str:
    """For cloud-init (modules ssh, write_files, scripts_per_boot), as at EC2.  JSON is YAML.  The same for the same name."""
    private, public = keys.host_key(secret, name)
    files = [
        {"path": _PLACE, "permissions": "0755", "content": _LOOP},
        {"path": MACHINE, "permissions": "0644", "content": _machine("ec2", is_spot=is_spot)},
        {"path": _EACH_BOOT, "permissions": "0755", "content": f"#!/bin/sh\n{_begin(user)}\n"},
    ]
    config = {
        "ssh_deletekeys": True,
        "ssh_genkeytypes": [],
        "ssh_keys": {"ed25519_private": private, "ed25519_public": public},
        "ssh_authorized_keys": [keys.client_public(secret)],
        "write_files": files,
    }
    return "#cloud-config\n" + json.dumps(config, sort_keys=True) + "\n"


def startup_script(secret: bytes, name: str, user: str, *, is_spot: bool) -> str:
    """For Google's guest agent, which runs it at each boot.  The same for the same name."""
    private, public = keys.host_key(secret, name)
    files = {_PLACE: _LOOP, MACHINE: _machine("gce", is_spot=is_spot), "/etc/ssh/ssh_host_ed25519_key": private}
    files["/etc/ssh/ssh_host_ed25519_key.pub"] = public + "\n"
    lines = ["#!/bin/sh", "umask 077", "mkdir -p /etc/cpool", "rm -f /etc/ssh/ssh_host_*"]
    lines += [f"printf %s {shlex.quote(text)} >{path}" for path, text in files.items()]
    lines += [f"chmod 755 {_PLACE} /etc/cpool; chmod 644 {MACHINE}", "systemctl restart ssh || systemctl restart sshd"]
    return "\n".join([*lines, _begin(user), ""])
