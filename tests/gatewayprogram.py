"""A program that sends HTTP requests for a test: it runs as an agent, and reads the test's orders from stdin.

An order is one line with a JSON object: {"method", "path", "headers", "body"}, or {"raw": text} for bytes that are no
valid request, or {"start": …} for a stream that stays open under a number, {"next": number} for its next line, {"drop":
number} to close it. It answers each with one line.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

URL = urlsplit(os.environ["OPENAI_BASE_URL"])
TOKEN = os.environ["OPENAI_API_KEY"]


def connect() -> http.client.HTTPConnection:
    assert URL.hostname is not None
    return http.client.HTTPConnection(URL.hostname, URL.port, timeout=60)


def send(asked: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **asked.get("headers", {})}
    body = asked.get("body")
    text = asked["text"].encode("utf-8", "surrogatepass") if "text" in asked else body and json.dumps(body).encode()
    connection = connect()
    given = {name: value for name, value in headers.items() if value is not None}
    connection.request(asked.get("method", "POST"), asked["path"], text, given)
    return connection, connection.getresponse()


def plain(asked: dict[str, Any]) -> dict[str, Any]:
    connection, response = send(asked)
    body = response.read().decode("utf-8", "replace")
    connection.close()
    return {"status": response.status, "headers": dict(response.getheaders()), "body": body}


def raw(text: str) -> dict[str, Any]:
    with socket.create_connection((URL.hostname or "", URL.port or 0), 20) as sock:
        sock.sendall(text.replace("TOKEN", TOKEN).encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return {"answer": answer.decode("utf-8", "replace")}


streams: list[tuple[http.client.HTTPConnection, http.client.HTTPResponse]] = []


def obey(asked: dict[str, Any]) -> dict[str, Any]:
    if "raw" in asked:
        return raw(asked["raw"])
    if "start" in asked:
        streams.append(send(asked["start"]))
        return {"status": streams[-1][1].status, "stream": len(streams) - 1}
    if "next" in asked:
        try:
            return {"line": streams[asked["next"]][1].readline().decode()}
        except (OSError, http.client.HTTPException) as err:
            return {"broken": repr(err)}
    if "drop" in asked:
        for one in streams[asked["drop"]]:
            one.close()
        return {}
    if "env" in asked:
        return {"env": dict(os.environ)}
    if "basic" in asked:
        return {"basic": base64.b64encode(f"agent:{TOKEN}".encode()).decode()}
    return plain(asked)


for line in sys.stdin:
    try:
        answer = obey(json.loads(line))
    except (OSError, http.client.HTTPException) as err:
        answer = {"error": repr(err)}
    print(json.dumps(answer), flush=True)
