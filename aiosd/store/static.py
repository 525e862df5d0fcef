"""An embedder that needs no model: a table with a vector for each piece of a word.

`aiosd get-embedder --static` distils the table from a real embedder: its vector for each piece alone, with fewer
dimensions, in 8 bits, and with less weight for pieces that are in every text. The vector of a text is the mean over its
pieces. So the order of words is lost, and a word means the same in every text; paraphrases are found about half as
often as by the embedder itself, and several times as often as by words. It takes some 40 µs for a text.

The file: MAGIC, then the lengths of four parts (32 bits each), then the parts: a name, the pieces (with a newline
between them; `##` before those that go on a word), their weights (float32, with the scale of their row), the rows (8
bits); at the end BLAKE2b (32 bytes) of all before it.
"""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aiosd.errors import WorldError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MAGIC = b"AIOSVEC1"
LONGEST = 100  # letters of a word; longer ones have no meaning
_DIGEST = 32


def pieces(text: str, known: dict[str, int]) -> Iterator[int]:
    """Numbers of the pieces of a text: words and signs, each cut into the longest known pieces (WordPiece). Words that
    cannot be cut into known pieces are left out."""
    for word in _words(text):
        found: list[int] = []
        begin = 0
        while begin < len(word) <= LONGEST:
            mark = "##" if begin else ""
            end = next((end for end in range(len(word), begin, -1) if mark + word[begin:end] in known), 0)
            if not end:
                found = []
                break
            found.append(known[mark + word[begin:end]])
            begin = end
        yield from found


def _words(text: str) -> list[str]:
    """The words of a text, in lower case, without accents; each sign and each ideograph is a word."""
    plain = unicodedata.normalize("NFD", text.lower())
    chars = [f" {char} " if _stands_alone(char) else char for char in plain if unicodedata.category(char) != "Mn"]
    return "".join(chars).split()


def _stands_alone(char: str) -> bool:
    if char.isascii():
        return not char.isalnum() and not char.isspace() and char.isprintable()
    return unicodedata.category(char)[0] == "P" or "\u4e00" <= char <= "\u9fff" or "\u3400" <= char <= "\u4dbf"


class Table:
    """The table as an embedder for `meaning`."""

    def __init__(self, name: str, words: Sequence[str], weights: Floats, rows: NDArray[np.int8], digest: str) -> None:
        self.name, self.shown = f"static {digest}", name
        self._known = {word: number for number, word in enumerate(words)}
        self._weights, self._rows = weights, rows

    @property
    def width(self) -> int:
        return int(self._rows.shape[1])

    def ask(
        self, texts: list[str], done: Callable[[Sequence[Floats | None] | None], None], urgent: bool = False
    ) -> None:
        done([self.embed(text) for text in texts])

    def poll(self) -> None:
        """Nothing to do: `ask` answers at once."""

    def embed(self, text: str) -> Floats | None:
        """The vector of a text; None: it has no known piece."""
        found = list(pieces(text, self._known))
        if not found:
            return None
        vector = self._weights[found] @ self._rows[found].astype(np.float32)
        length = float(np.linalg.norm(vector))
        return (vector / np.float32(length)).astype(np.float32) if length > 1e-6 else None


def write(path: Path, name: str, words: Sequence[str], weights: Floats, rows: NDArray[np.int8]) -> None:
    parts = [name.encode(), "\n".join(words).encode(), weights.astype("<f4").tobytes(), rows.tobytes()]
    content = MAGIC + struct.pack("<4I", *map(len, parts)) + b"".join(parts)
    new = path.with_name(path.name + ".new")
    new.write_bytes(content + hashlib.blake2b(content, digest_size=_DIGEST).digest())
    new.replace(path)


def is_table(path: Path) -> bool:
    """Whether a file is such a table. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> Table:
    """Read a table. Raises WorldError."""
    try:
        content = path.read_bytes()
    except OSError as err:
        raise WorldError(f"{path}: {err.strerror}") from err
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if body[: len(MAGIC)] != MAGIC or hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest:
        raise WorldError(f"{path}: damaged, or no table of vectors; aiosd get-embedder --static makes one")
    sizes = struct.unpack_from("<4I", body, len(MAGIC))
    parts, at = [], len(MAGIC) + 16
    for size in sizes:
        parts.append(body[at : at + size])
        at += size
    words = parts[1].decode().split("\n")
    rows = np.frombuffer(parts[3], np.int8).reshape(len(words), -1)
    return Table(parts[0].decode(), words, np.frombuffer(parts[2], "<f4"), rows, digest.hex()[:16])
