"""Messages about readiness and stopping, to the starter of aiosd: a waiting `aiosd -d`, or systemd (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiosd.config import Settings


def ready(settings: Settings, line: str, notes: Sequence[str] = ()) -> None:
    _notify_starter(settings, f"ready {line}\n" + "".join(f"{note}\n" for note in notes))
    _sd_notify(f"READY=1\nSTATUS={line}\n")


def failed(settings: Settings, error: str) -> None:
    _notify_starter(settings, f"error {error}\n")
    _sd_notify(f"STATUS={error}\n")


def stopping(settings: Settings) -> None:
    _sd_notify("STOPPING=1\n")


def _notify_starter(settings: Settings, lines: str) -> None:
    """Write lines to the descriptor that `aiosd -d` reads, then close it."""
    if settings.ready_fd is None:
        return
    with contextlib.suppress(OSError):  # it has ended, or already has the message
        os.write(settings.ready_fd, lines.encode())
        os.close(settings.ready_fd)


def _sd_notify(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message.encode(), address)
