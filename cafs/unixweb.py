"""A store that is read by HTTP over a socket of unix(7): http+unix:///PATH/OF/DIRECTORY, in which 'socket' is."""

from __future__ import annotations

import os
import socket

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool


class _Connection(HTTPConnection):
    directory = ""

    def _new_conn(self) -> socket.socket:
        """By a short path, however long the real one is (sun_path has 108 bytes)."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(self.timeout if isinstance(self.timeout, int | float) else None)
            here = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{here}/socket")
            finally:
                os.close(here)
            return connection
        except OSError as error:
            connection.close()
            raise urllib3.exceptions.NewConnectionError(self, f"cannot reach the lent store: {error.strerror}") from error


def pool(directory: str, timeout: urllib3.Timeout) -> HTTPConnectionPool:
    """Connections to the socket in a directory."""
    kind = type("_Connection", (_Connection,), {"directory": directory})
    found = HTTPConnectionPool("store", timeout=timeout, maxsize=16)
    found.ConnectionCls = kind
    return found
