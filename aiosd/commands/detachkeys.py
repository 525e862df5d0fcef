"""Finds the keys that detach from an agent's terminal among the typed keys.

    DetachKeys(parse("ctrl-p,ctrl-q")).feed(b"ls\\r") → (b"ls\\r", False)

A key that may be the first of them is not passed on until the next key is typed. If that is another key than the
second of them, both are passed on.
"""

from __future__ import annotations

DEFAULT = "ctrl-p,ctrl-q"
CONTROL = "abcdefghijklmnopqrstuvwxyz[\\]^_"  # Ctrl with the n-th of them is the byte n


def parse(text: str) -> bytes:
    """Read a list of single characters and `ctrl-X`, with commas between them; "" for no keys. Raises ValueError with a
    sentence."""
    return b"".join(_key(word) for word in text.split(",")) if text else b""


def _key(word: str) -> bytes:
    if len(word) == 1 and word.isascii() and word.isprintable():
        return word.encode()
    prefix, letter = word[:5].lower(), word[5:].lower()
    if prefix == "ctrl-" and letter == "@":
        return b"\0"
    if prefix == "ctrl-" and len(letter) == 1 and letter in CONTROL:
        return bytes([CONTROL.index(letter) + 1])
    raise ValueError(f"{word!r} is no key: give a character, or ctrl-X with one of a-z @ [ \\ ] ^ _")


class DetachKeys:
    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""  # the beginning of the keys that has been typed so far

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """What to send to the agent, and whether the keys have been typed. What follows the keys is dropped."""
        if not self._keys:
            return typed, False
        data = self._held + typed
        before, keys, _ = data.partition(self._keys)
        self._held = b"" if keys else self._start_of_keys(data)
        return (before if keys else data[: len(data) - len(self._held)]), bool(keys)

    def _start_of_keys(self, data: bytes) -> bytes:
        for length in range(min(len(self._keys) - 1, len(data)), 0, -1):
            if data.endswith(self._keys[:length]):
                return self._keys[:length]
        return b""
