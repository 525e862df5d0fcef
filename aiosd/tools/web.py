"""Fetching from the web for an agent: only http and https, only public addresses, and with limits on size and time.

A name is resolved here, each of its addresses is checked, and the connection goes to the checked address; so a name
that is resolved to another address a moment later (DNS rebinding) leads nowhere. Every redirect is checked in the same
way. For an agent that reaches single hosts its proxy does all that.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import socket
import ssl
from urllib.parse import SplitResult, urljoin, urlsplit

from aiosd.access.patterns import host_of
from aiosd.sandbox.hosts import PROXY_HOST, PROXY_PORT
from aiosd.tools import held

MAX_BYTES = 1 << 20
MAX_REDIRECTS = 5
TIMEOUT_S = 15.0


def fetch(url: str) -> str:
    """The text at a URL. Raises ValueError, PermissionError for an address that is not public, OSError."""
    for _ in range(MAX_REDIRECTS + 1):
        parts = _checked(url)
        response, connection = _get(parts)
        try:
            if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
                url = urljoin(url, target)
                continue
            data = response.read(MAX_BYTES + 1)
            if response.status >= 400:
                raise ValueError(f"HTTP {response.status} {response.reason}: {_text(data[:500], response)}")
            if len(data) > MAX_BYTES:
                return _text(data[:MAX_BYTES], response) + "\n[the rest is left out]"
            return _text(data, response)
        except http.client.HTTPException as err:
            raise OSError(errno.EPROTO, f"{parts.hostname} sent no proper answer: {err!r}") from err
        finally:
            connection.close()
    raise ValueError(f"more than {MAX_REDIRECTS} redirects")


def public_address(host: str, port: int) -> str:
    """An address of a host, all of whose addresses are public. Raises PermissionError, OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as err:
        raise OSError(errno.EHOSTUNREACH, f"{host} is not known: {err}") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
        if not ip.is_global or not inner.is_global or ip.is_multicast:
            raise PermissionError(errno.EACCES, f"{host} is {address}, which is no public address")
    return addresses[0]


def _checked(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url[:200]} is no http or https URL")
    if any(ord(character) <= 32 for character in url):
        raise ValueError("a URL has no blanks and no control characters")
    held.require_host(host_of(parts.hostname))
    return parts


def _get(parts: SplitResult) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if held.proxied:
        sock = _tunnel(parts.hostname, port)
    else:
        sock = socket.create_connection((public_address(parts.hostname, port), port), TIMEOUT_S)
    if parts.scheme == "https":
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT_S)
    connection.sock = sock
    path = parts.path or "/"
    headers = {
        "Host": parts.netloc.rpartition("@")[2],
        "User-Agent": "aiosd",
        "Accept": "text/*, application/json, */*",
    }
    try:
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers=headers)
        return connection.getresponse(), connection
    except http.client.HTTPException as err:
        connection.close()
        raise OSError(errno.EPROTO, f"{parts.hostname} sent no proper answer: {err!r}") from err


def _tunnel(host: str, port: int) -> socket.socket:
    """A connection through the proxy of the agent's own network. Raises PermissionError if the proxy refuses,
    OSError."""
    name = host_of(host)
    shown = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    request = f"CONNECT {shown} HTTP/1.1\r\nHost: {shown}\r\n\r\n".encode("ascii")
    tunnel = socket.create_connection((PROXY_HOST, PROXY_PORT), TIMEOUT_S)
    tunnel.sendall(request)
    answer = http.client.HTTPResponse(tunnel, method="CONNECT")
    try:
        answer.begin()
    except (http.client.HTTPException, OSError) as err:
        tunnel.close()
        raise OSError(errno.EPROTO, f"the proxy sent no proper answer: {err!r}") from err
    if answer.status == 200:
        return tunnel
    words = answer.read(2000).decode("utf-8", "replace").strip() or answer.reason
    tunnel.close()
    raise PermissionError(errno.EACCES, words) if answer.status == 403 else OSError(errno.EHOSTUNREACH, words)


def _text(data: bytes, response: http.client.HTTPResponse) -> str:
    charset = response.headers.get_content_charset() or "utf-8"
    try:
        return data.decode(charset, "replace")
    except LookupError:
        return data.decode("utf-8", "replace")
