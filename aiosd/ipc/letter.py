"""Letters: data of one agent alone, on their way from the kernel to the process that becomes the agent.

Every agent is forked from the supervisor, and so begins with a copy of the supervisor's memory. Every later agent can
find all data that the supervisor has read: for example an API key in the environment of another agent. So the
supervisor never reads data of single agents. It only passes the descriptor on:

    kernel ──writes, seals──▶ memfd ──▶ supervisor ──▶ forked child ──reads──▶ the agent
    kernel ◀──reads── memfd ◀── supervisor ◀── forked child: why the agent cannot start

    invariant: the supervisor calls neither `read` nor `read_text`, and maps no letter

A letter cannot be changed after it was written. One letter may be read many times: each process of an agent that is
started again reads the same one.
"""

from __future__ import annotations

import fcntl
import os

from msgspec import Struct, msgpack

from aiosd.sandbox.box import Box
from libaios.wire import os_shown

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
TEXT_BYTES = 8192  # of a text that `read_text` reads


class Letter(Struct, array_like=True, frozen=True):
    """How an agent is run, as in `wire.Spawn`; all texts are `wire.os_text`."""

    kind: str
    target: str
    args: list[str]
    env: dict[str, str]
    cwd: str
    box: Box | None = None  # how its process confines itself
    sha256: bytes = b""  # the hash that its script must have; b"": any


_decode = msgpack.Decoder(Letter).decode


def write(letter: Letter) -> int:
    """A sealed memfd with the letter; the caller closes it."""
    return _sealed("aios-letter", msgpack.encode(letter))


def read(fd: int) -> Letter:
    """Read the letter in `fd`, which stays open."""
    return _decode(_content(fd, os.fstat(fd).st_size))


def write_text(text: str) -> int:
    """The same for a sentence about an agent, which may name its files."""
    return _sealed("aios-text", text.encode("utf-8", "backslashreplace"))


def read_text(fd: int) -> str:
    return _content(fd, TEXT_BYTES).decode("utf-8", "replace")


def command(letter: Letter) -> str:
    """The command of an agent, for people."""
    return " ".join(map(os_shown, [letter.target, *letter.args]))


def _sealed(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _content(fd: int, size: int) -> bytes:
    return os.pread(fd, size, 0)
