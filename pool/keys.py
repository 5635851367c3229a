"""The pool's keys, all made of one secret in its directory: its own, by which it logs in, and one for each launched machine.

So nothing secret has to be kept of a machine that is being launched, and a launch that is tried again is the same to the byte.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import struct

from cafs import atomic
from cafs.extras import extra

with extra("ec2"):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

_SIZE = 32
IDENTITY = "id_ed25519"


def secret(directory: str) -> bytes:
    """Of a pool, made when it is first wanted.  Raises OSError."""
    path = os.path.join(directory, "secret")
    try:
        found = atomic.read_file(path, _SIZE)
    except FileNotFoundError:
        found = os.urandom(_SIZE)
        atomic.replace_file(path, found, 0o600)
    atomic.replace_file(os.path.join(directory, IDENTITY), _private(_derived(found, "client")).encode(), 0o600)
    return found


def client_public(secret: bytes) -> str:
    """The line for authorized_keys."""
    return _public(_derived(secret, "client"), "cpool")


def host_key(secret: bytes, name: str) -> tuple[str, str]:
    """(private, as OpenSSH writes it; public, a line) of a machine."""
    key = _derived(secret, f"host {name}")
    return _private(key), _public(key, name)


def _derived(secret: bytes, purpose: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, purpose.encode(), hashlib.sha256))


def _private(key: Ed25519PrivateKey) -> str:
    """OpenSSH's PROTOCOL.key, with check numbers that are not random: the same key is the same text."""
    public, check = _raw(key), b"cafs" * 2
    seed = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    private = check + _strings(b"ssh-ed25519", public, seed + public, b"")
    private += bytes(range(1, -len(private) % 8 + 1))
    blob = _strings(b"ssh-ed25519", public)
    body = b"openssh-key-v1\0" + _strings(b"none", b"none", b"") + struct.pack(">I", 1) + _strings(blob, private)
    text = base64.b64encode(body).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join(["-----BEGIN OPENSSH PRIVATE KEY-----", *lines, "-----END OPENSSH PRIVATE KEY-----", ""])


def _public(key: Ed25519PrivateKey, comment: str) -> str:
    return f"ssh-ed25519 {base64.b64encode(_strings(b'ssh-ed25519', _raw(key))).decode()} {comment}"


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _strings(*values: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(value)) + value for value in values)
