"""SHA-256 and BLAKE2b without OpenSSL, which `hashlib` would load: a command starts faster, and an agent's memory stays
shared."""

from __future__ import annotations

import os
import stat
import sys
from importlib import import_module

_sha256 = import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256
_blake2b = import_module("_blake2").blake2b

MOST_BYTES = 16 << 20  # of a file whose content is looked at


def of(content: bytes) -> bytes:
    """The SHA-256 of these bytes: 32 bytes."""
    digest: bytes = _sha256(content).digest()
    return digest


def short(content: bytes, size: int, purpose: bytes = b"") -> bytes:
    """BLAKE2b of `size` bytes, different for each `purpose`."""
    digest: bytes = _blake2b(content, digest_size=size, person=purpose).digest()
    return digest


def of_file(path: str) -> bytes:
    """The SHA-256 of a file's content now. b"" if the file cannot be read, is larger than MOST_BYTES, or can be read
    only once (a pipe)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # checked before opening: a pipe's writer would notice
            return b""
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        try:
            content = file.read(MOST_BYTES + 1)
        except OSError:
            return b""
    return of(content) if content is not None and len(content) <= MOST_BYTES else b""
