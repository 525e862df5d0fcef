"""Parses the head of a request from a client of the proxy. Pure.

Two kinds of requests are served: `CONNECT HOST:PORT`, after which bytes go both ways unchanged, and requests of plain
HTTP with a whole URL (`GET http://HOST/…`), one for each connection. For the second kind the head is made anew: the
Host that a server reads is the host that was checked, and the length of the body has only one meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiosd.sandbox import hosts

HEAD_BYTES = 32 << 10
HEADERS = 256

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_NOT_IN_HEAD = re.compile(rb"[\r\n\0]")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n\0]*)?")
#: Headers that concern the connection to the proxy, not the request itself.
_OURS = {
    b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization", b"host",
    b"proxy-authenticate",
}  # fmt: skip
CHUNKED = -1


class Bad(Exception):
    """The request is refused with this status; the message has the reason."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    host: str  # in the form of `hosts.address`
    port: int
    head: bytes = b""  # for the server; b"": it was CONNECT
    body: int = 0  # bytes that follow, or CHUNKED


def parse(data: bytes) -> ProxyRequest:
    """Parse a head. `data`: the head with the empty line after it. Raises Bad."""
    first, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    words = first.split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise Bad("this is no request of HTTP/1.1")
    method, target, version = words
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise Bad("this is no request of HTTP/1.1")
    headers = _headers(lines)
    if method == b"CONNECT":
        return ProxyRequest(*_authority(target.decode("ascii"), 0))
    scheme, colon, rest = target.partition(b"://")
    if not colon:
        raise Bad("this is a proxy: it serves CONNECT, and requests with a whole URL")
    if scheme.lower() != b"http":
        raise Bad(f"{scheme[:20].decode('ascii')}: a proxy serves http, and CONNECT for everything else")
    parts = re.split(rb"([/?#])", rest, maxsplit=1)
    host, port = _authority(parts[0].decode("ascii"), 80)
    path = b"".join(parts[1:]).partition(b"#")[0]
    if not path.startswith(b"/"):
        path = b"/" + path
    body = _body(headers, version)
    own = f"[{host}]" if ":" in host else host
    made = [b"%b %b %b" % (method, path, version), f"Host: {own if port == 80 else f'{own}:{port}'}".encode()]
    dropped = _OURS | {
        word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")
    }
    dropped -= {b"content-length", b"transfer-encoding"}
    made += [b"%b: %b" % (name, value) for name, value in headers if name not in dropped]
    return ProxyRequest(host, port, b"\r\n".join([*made, b"Connection: close", b"\r\n"]), body)


def chunk(line: bytes) -> int:
    """How many bytes a chunk has, from the line before it (without its end). Raises Bad."""
    found = _CHUNK.fullmatch(line)
    if found is None:
        raise Bad("a part of the body has no length")
    return int(found[1], 16)


def _authority(text: str, port: int) -> tuple[str, int]:
    try:
        host, given = hosts.address(text)
    except ValueError as err:
        raise Bad(str(err)) from None
    if not (given or port):
        raise Bad(f"{text[:80]!r}: CONNECT needs a port")
    return host, given or port


def _headers(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The headers, with names in small letters."""
    if len(lines) > HEADERS:
        raise Bad(f"more than {HEADERS} headers", 431)
    found = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or _NOT_IN_HEAD.search(value):
            raise Bad("a header is broken")
        found.append((name.lower(), value.strip(b" \t")))
    return found


def _body(headers: list[tuple[bytes, bytes]], version: bytes) -> int:
    """The length of the body. It must be unambiguous, or the server might see another request than this proxy."""
    encodings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    lengths = {value for name, value in headers if name == b"content-length"}
    if encodings:
        if encodings != [b"chunked"] or lengths or version == b"HTTP/1.0":
            raise Bad("the length of the body is ambiguous")
        return CHUNKED
    if not lengths:
        return 0
    (length, *others) = lengths
    if others or not _LENGTH.fullmatch(length):
        raise Bad("the length of the body is ambiguous")
    return int(length)
