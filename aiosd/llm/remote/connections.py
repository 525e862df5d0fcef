"""Where an endpoint is, and the connections to it. A connection that has served a request is kept for the next: a new
one costs a TLS handshake, several round trips."""

from __future__ import annotations

import http.client
import select
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiosd.errors import UsageError
from aiosd.llm.remote import keys

CONNECT_S = 10.0
KEEP_S = 30.0  # an idle connection
MOST_KEPT = 32


@dataclass(frozen=True)
class RemoteEndpoint:
    url: str  # as it is shown: without user, password and query
    https: bool
    host: str
    port: int | None
    path: str
    key_file: str = ""  # or a name in the keyring, see `keys`

    @classmethod
    def of(cls, url: str, key_file: str = "") -> RemoteEndpoint:
        """The endpoint of an address. Raises UsageError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: an address such as https://host/v1 is wanted")
        if parts.username or parts.password or parts.query:
            raise UsageError("url: neither user, password nor query belong there; a key is put into key_file")
        path = parts.path.rstrip("/")
        return cls(
            f"{parts.scheme}://{parts.netloc}{path}", parts.scheme == "https", parts.hostname, port, path, key_file
        )

    def key(self) -> str:
        """Read the key. Raises OSError, ValueError."""
        return keys.read(self.key_file)


class Connections:
    """The connections to one endpoint. Used by the threads of many exchanges."""

    def __init__(self, endpoint: RemoteEndpoint) -> None:
        self.endpoint = endpoint
        self._lock = threading.Lock()
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    def kept(self) -> http.client.HTTPConnection | None:
        """A connection that was used before and is not known to be closed by the endpoint."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                since, connection = self._idle.pop()
            if time.monotonic() - since < KEEP_S and _silent(connection):
                return connection
            connection.close()

    def new(self) -> http.client.HTTPConnection:
        """A new connection, which is not connected yet."""
        endpoint = self.endpoint
        if not endpoint.https:
            return http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=CONNECT_S)
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()  # reads the certificates of the machine: milliseconds
        return http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=CONNECT_S, context=self._tls)

    def keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MOST_KEPT:
                self._idle.append((time.monotonic(), connection))
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()


def _silent(connection: http.client.HTTPConnection) -> bool:
    """Whether nothing has come on an idle connection: neither its end nor data."""
    if connection.sock is None:
        return False
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)
