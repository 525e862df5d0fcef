"""The byte-level BPE of nano: trained here, written into the GGUF, and used by llama.cpp with the same result.

A tiny model copies text well only if a word has the same tokens everywhere. So merges never cross the end of a word of
ASCII letters: a digit, a punctuation mark or another byte is always a token of its own. The space before a word is
merged last, with the first token that the word has without it: `milk` is `mil|k`, and ` milk` is ` mil|k`, whatever
comes before. llama.cpp's pre-tokenizer `deepseek-coder` splits at the end of each such word and never inside one, so
both give the same tokens; a test compares them.

Special tokens are cut out of the text first, the longest first, as in llama.cpp. The pieces of JSON around the
arguments of a call are special tokens, too, which makes a call half as long.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = [END_OF_TEXT, IM_START, IM_END]  # never part of a text that is shown
USER_DEFINED = [  # part of the text
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    '{"name": "', '", "arguments": {"', '": "', '", "', '"}}',
]  # fmt: skip
SPECIAL = CONTROL + USER_DEFINED
PRE_TOKENIZER = "deepseek-coder"

RARE = 8  # words with fewer occurrences are left out by `learn`

_PIECES = re.compile(rb" ?[A-Za-z]+|[^A-Za-z]", re.DOTALL)
_LETTERS = [bytes([b]) for b in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for every byte, in which GGUF vocabularies are written."""
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
        """Apply merges, those learned first before others."""
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
    """nano's tokenizer. The merges of `merges.txt` must not change, because every trained model depends on them."""
    lines = Path(__file__).with_name("merges.txt").read_text("ascii").splitlines()
    return _with_spaces([(a.encode(), b.encode()) for a, b in (line.split() for line in lines)])


def learn(texts: Iterable[str], size: int) -> list[tuple[bytes, bytes]]:
    """Learn `size` merges of letters; `merges.txt` was made by this. Of equally frequent pairs the first in byte order
    is taken. Rare words are left out: most of them are made up, and their syllables are of no use."""
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
    """Add, for every letter and every merge, the same with a space before it."""
    return Tokenizer(merges + [(b" ", piece) for piece in [*_LETTERS, *(a + b for a, b in merges)]])
