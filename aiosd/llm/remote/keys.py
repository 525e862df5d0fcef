"""The key to an endpoint: from a file, or from the user's keyring in Linux (`keyring:NAME`, where `keyctl add user NAME
KEY @u` puts it). It is read anew for each request, so that it can be exchanged while the system runs, and it is in no
setting, message or log."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

PREFIX = "keyring:"
_MOST = 65536
#: Numbers of the system calls request_key and keyctl (the C library has no functions for them).
_NUMBERS = {"x86_64": (249, 250), "aarch64": (218, 219), "riscv64": (218, 219)}
_SEARCH, _READ, _USER_KEYRING = 10, 11, -4  # of keyctl


def read(source: str) -> str:
    """The key; "": there is none. Raises OSError, ValueError."""
    if not source:
        return ""
    if source.startswith(PREFIX):
        text = _from_keyring(source.removeprefix(PREFIX))
    else:
        with open(source, encoding="utf-8") as file:
            text = file.read(_MOST)
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable():  # http.client would put it into its error message
        raise ValueError("it holds no key: one line of printable characters")
    return key


def _from_keyring(name: str) -> str:
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, "the keyring of this machine cannot be read")
    request_key, keyctl = numbers
    try:
        key = _call(keyctl, _SEARCH, _USER_KEYRING, b"user", name.encode(), 0)
    except OSError:
        key = _call(request_key, b"user", name.encode(), None, 0)
    buffer = ctypes.create_string_buffer(_MOST)
    size = _call(keyctl, _READ, key, buffer, _MOST)
    return buffer.raw[: min(size, _MOST)].decode()


def _call(number: int, *arguments: object) -> int:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    found: int = syscall(*(ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *arguments)))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found
