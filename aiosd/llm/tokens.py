"""Text to token ids, with the segments of recent prompts remembered.

An agent sends its whole conversation with every turn, and llama.cpp's tokenizer takes as long for a few dozen tokens
as a small model for a decode step. Control tokens cut a prompt into segments that are tokenised independently of each
other: so known segments are looked up, and only new ones are tokenised.

Only for BPE and SPM vocabularies, and not where a control token swallows the blanks beside it.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import OrderedDict

from aiosd.llm import llama
from aiosd.llm.document import Later

#: Put in the middle of text that looks like a control token but is only quoted. It is a noncharacter of Unicode, which
#: no meaningful text contains.
QUOTED = "\U0010fffe"

_MOST_BYTES = 16 << 20  # remembered
_LONGEST = 1 << 14  # characters; longer ones are not worth their memory


QUICK_CHARACTERS = 1 << 15  # become tokens between two steps of decoding


class CachingTokenizer:
    def __init__(self, model: llama.Model) -> None:
        self._model = model
        #: Control tokens by their text.
        self.controls = {model.token_text(token): token for token in model.control_tokens()}
        self.controls.pop("", None)
        longest_first = sorted(self.controls, key=len, reverse=True)
        #: Finds control tokens in text; None when there are none.
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._cut = re.compile(f"({self.pattern.pattern})") if self.pattern and model.cuts_at_controls else None
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self.num_bytes = 0  # of the remembered segments

    def of(self, text: str, *, quoted: bool = False, quick: bool = False) -> list[int]:
        """Token ids of a text with control tokens; no BOS is added. `quoted`: control tokens with QUOTED in them are
        text. `quick`: raises `Later` where much of the text is new."""
        if quick and self._new_in(text) > QUICK_CHARACTERS:
            raise Later
        if self._cut is None:
            first, *rest = text.split(QUOTED) if quoted else [text]
            tokens = self._model.tokenize(first, bos=False, special=True)
            for part in rest:
                tokens += self._model.tokenize(part, bos=False, special=True)
            return tokens
        tokens = []
        for i, part in enumerate(self._cut.split(text)):
            if i % 2:
                tokens.append(self.controls[part])
            elif part:
                tokens += self._segment(part, quoted)
        return tokens

    def _new_in(self, text: str) -> int:
        """How many characters lie in segments that are not remembered."""
        if self._cut is None or len(text) <= QUICK_CHARACTERS:
            return len(text)
        return sum(len(part) for part in self._cut.split(text)[::2] if part not in self._known)

    def _segment(self, part: str, quoted: bool) -> array[int] | list[int]:
        known = self._known
        tokens = known.get(part)
        if tokens is not None:
            known.move_to_end(part)
            return tokens
        if quoted and QUOTED in part:  # tokenised in one piece: a tokenizer may put a blank before each text it gets
            made = self._model.tokenize(part.replace(QUOTED, ""), bos=False, special=False)
        else:
            made = self._model.tokenize(part, bos=False, special=True)
        if len(part) <= _LONGEST:
            known[part] = kept = array("i", made)
            self.num_bytes += _bytes_of(part, kept)
            while self.num_bytes > _MOST_BYTES:
                self.num_bytes -= _bytes_of(*known.popitem(last=False))
        return made


def _bytes_of(part: str, tokens: array[int]) -> int:
    return sys.getsizeof(part) + sys.getsizeof(tokens) + 120  # and its place in the dict
