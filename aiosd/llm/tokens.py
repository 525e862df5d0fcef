"""Text to token ids, with the segments of recent prompts remembered.

An agent sends its whole conversation with every turn, and llama.cpp's tokenizer takes as long for some dozen
tokens as a small model for a step of decoding. Control tokens cut a prompt into segments that are tokenised
independently of each other: so segments are looked up, and only what is new is computed.

Not for vocabularies of other kinds than BPE and SPM, nor where a control token swallows the blanks beside it.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from aiosd.llm import llama

_SEGMENTS = 4096  # remembered
_LONGEST = 1 << 14  # characters; longer ones are not worth their memory


class Tokens:
    def __init__(self, model: llama.Model) -> None:
        self._model = model
        self._controls = {model.token_text(token): token for token in model.control_tokens()}
        self._controls.pop("", None)
        longest_first = sorted(self._controls, key=len, reverse=True)
        #: Finds control tokens as they are written; None when there are none.
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._cut = re.compile(f"({self.pattern.pattern})") if self.pattern and model.cuts_at_controls else None
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    def of(self, text: str) -> list[int]:
        """Control tokens are read as such; no BOS is added."""
        if self._cut is None:
            return self._model.tokenize(text, bos=False, special=True)
        tokens: list[int] = []
        for i, part in enumerate(self._cut.split(text)):
            if i % 2:
                tokens.append(self._controls[part])
            elif part:
                tokens += self._segment(part)
        return tokens

    def _segment(self, part: str) -> list[int]:
        known = self._known
        tokens = known.get(part)
        if tokens is not None:
            known.move_to_end(part)
            return tokens
        tokens = self._model.tokenize(part, bos=False, special=True)
        if len(part) <= _LONGEST:
            known[part] = tokens
            if len(known) > _SEGMENTS:
                known.popitem(last=False)
        return tokens
