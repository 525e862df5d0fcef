"""The byte-level BPE of nano: trained here, written into the GGUF, and the same in llama.cpp.

A tiny model copies text well only when the text looks the same everywhere. So merges never leave a word of
ASCII letters: a digit, a mark of punctuation or a byte of UTF-8 is always a token of its own. The space before a
word is merged last, with the first piece that the word has without it: `milk` is `mil|k` and ` milk` is ` mil|k`,
whatever stands before. llama.cpp's pre-tokenizer `deepseek-coder` splits at least where such words end and never
inside one, so both tokenise alike; a test compares them.

Special tokens come first and are cut out of the text before anything else, the longest first, as llama.cpp
does it. The pieces of JSON around the arguments of a call are such tokens too: a call is half as
long with them.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = [END_OF_TEXT, IM_START, IM_END]  # never part of a text shown to anybody
USER_DEFINED = [  # shown as they are
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    '{"name": "', '", "arguments": {"', '": "', '", "', '"}}',
]  # fmt: skip
SPECIAL = CONTROL + USER_DEFINED
PRE_TOKENIZER = "deepseek-coder"

RARE = 8  # occurrences

_PIECES = re.compile(rb" ?[A-Za-z]+|[^A-Za-z]", re.DOTALL)
_LETTERS = [bytes([b]) for b in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, which GGUF vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    rest = (b for b in range(256) if b not in table)
    table.update({b: chr(256 + i) for i, b in enumerate(rest)})
    return table


class Tokenizer:
    """Ids: the special tokens, the 256 bytes, then one token for every merge."""

    def __init__(self, merges: list[tuple[bytes, bytes]]) -> None:
        self.merges = merges
        self.tokens = [s.encode() for s in SPECIAL]
        self.tokens += [bytes([b]) for b in range(256)]
        self.tokens += [a + b for a, b in merges]
        self.special = {s: i for i, s in enumerate(SPECIAL)}
        self._ids = {t: i for i, t in enumerate(self.tokens) if i >= len(SPECIAL)}
        self._rank = {pair: i for i, pair in enumerate(merges)}
        self._words: dict[bytes, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        parts: list[str | int] = [text]
        for special in sorted(SPECIAL, key=len, reverse=True):
            if special in text:
                parts = [p for part in parts for p in self._cut(part, special)]
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                for piece in _PIECES.findall(part.encode()):
                    ids += self._word(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    def _cut(self, part: str | int, special: str) -> list[str | int]:
        if isinstance(part, int) or special not in part:
            return [part]
        cut: list[str | int] = []
        for i, between in enumerate(part.split(special)):
            cut += [self.special[special]] * (i > 0)
            cut += [between] * (between != "")
        return cut

    def _word(self, word: bytes) -> list[int]:
        known = self._words.get(word)
        if known is None:
            known = self._words[word] = [self._ids[p] for p in self.split(word)]
        return known

    def split(self, word: bytes) -> list[bytes]:
        """Applies merges, the earliest learned first."""
        parts = [bytes([b]) for b in word]
        while len(parts) > 1:
            ranks = [self._rank.get(p, len(self._rank)) for p in pairwise(parts)]
            best = min(ranks)
            if best == len(self._rank):
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


def load() -> Tokenizer:
    """nano's own: the merges of `merges.txt`, which stay as they are, because every model depends on them."""
    lines = Path(__file__).with_name("merges.txt").read_text("ascii").splitlines()
    return _with_spaces([(a.encode(), b.encode()) for a, b in (line.split() for line in lines)])


def learn(texts: Iterable[str], size: int) -> list[tuple[bytes, bytes]]:
    """Learns `size` merges of letters; this is how `merges.txt` was made. Ties go to the first pair in byte order.
    Rare words are left out: most are made up, and their syllables are of no use."""
    counts = Counter(w for text in texts for w in re.findall(rb"[A-Za-z]{2,}", text.encode()))
    words = [([bytes([b]) for b in word], n) for word, n in sorted(counts.items()) if n >= RARE]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def _with_spaces(merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    """Gives every letter and every merge a twin with a space before it."""
    return Tokenizer(merges + [(b" ", piece) for piece in [*_LETTERS, *(a + b for a, b in merges)]])
