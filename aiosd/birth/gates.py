"""Gates: listening sockets in the network of an agent that has one of its own.

No route leads out of that network. An agent's process makes sockets that listen on its loopback, before its program
runs, and passes them to the supervisor; the kernel passes them on to the proxy (`aiosd.net`), which accepts connections
there and serves them outside. Only processes of this network can connect, so the socket shows which agent a connection
belongs to.

    the first     the proxy for HTTP, see `sandbox.hosts`
    the others    the gateway, at the address where it listens on the machine; and at fixed addresses of other model
                  servers, so that programs which know only these find it, too
"""

from __future__ import annotations

import contextlib
import socket

from aiosd.ipc.endpoint import Endpoint
from aiosd.sandbox import hosts

HostPort = tuple[str, int]

#: The ports of vLLM, llama.cpp's server, Ollama and LM Studio.
FIXED = (8000, 8080, 11434, 1234)
BACKLOG = 64


def of(gateway: Endpoint | None) -> list[HostPort]:
    """The addresses of the gates."""
    found: list[HostPort] = [(hosts.PROXY_HOST, hosts.PROXY_PORT)]
    if gateway is not None:
        found += [*((one.host, one.port) for one in gateway.all), *(("127.0.0.1", port) for port in FIXED)]
    return list(dict.fromkeys(found))


def made(addresses: list[HostPort]) -> list[int]:
    """In the agent's process: make sockets that listen at these addresses; returns their descriptors. Raises OSError if
    the first cannot be made; other addresses may be refused (ports below 1024)."""
    found = [_listening(addresses[0])]
    for address in addresses[1:]:
        with contextlib.suppress(OSError):
            found.append(_listening(address))
    return found


def _listening(address: HostPort) -> int:
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as err:
        sock.close()
        raise OSError(err.errno, f"sandbox: nothing can listen on {address[0]}:{address[1]} ({err.strerror})") from None
    return sock.detach()
