"""The parts of what a model writes: its answer, its thoughts, its tool calls.

They come in one stream of characters (`wire.Piece.text`, `wire.Generated.text`). A mark shows which part follows;
without one it is the answer. The marks are no characters (Unicode keeps these code points free of any), and where a
model writes one it is replaced, so no text can pretend to be another part.

    REASONING        thoughts follow
    TEXT             the answer follows, or goes on
    CALL             a tool call follows: [index, id, name] as JSON, then ARGUMENTS and the arguments as JSON text

A control token of the model that matters for this is kept in the stream between CONTROL and CONTROL_END; it is not
shown.
"""

from __future__ import annotations

import json
import re

from msgspec import Struct

TEXT, REASONING, CALL, ARGUMENTS = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
CONTROL, CONTROL_END = "\ufdee", "\ufdef"

_MARKS = re.compile(f"([{TEXT}{REASONING}{CALL}{ARGUMENTS}])")
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_CONTROLS = re.compile(f"{CONTROL}[^{CONTROL}{CONTROL_END}]*{CONTROL_END}")


class CallPiece(Struct, frozen=True):
    """Part of a tool call in a stream: `id` and `name` come once, with the first piece, then arguments as JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def control(text: str) -> str:
    """A control token, written `text`, in its form in a stream."""
    return f"{CONTROL}{text}{CONTROL_END}"


def cleaned(text: str) -> str:
    """The text of a model without control tokens and marks."""
    if not _RESERVED.search(text):
        return text
    return _RESERVED.sub("\ufffd", _CONTROLS.sub("", text))


def call(index: int, id_: str, name: str) -> str:
    return f"{CALL}{json.dumps([index, id_, name])}{ARGUMENTS}"


class Splitter:
    """Sorts a stream into its parts, piece by piece."""

    __slots__ = ("_head", "_index", "_mark")

    def __init__(self) -> None:
        self._mark = TEXT
        self._head = ""
        self._index = 0

    def split(self, text: str) -> tuple[str, str, list[CallPiece]]:
        """Answer, reasoning and parts of tool calls in a piece."""
        if self._mark == TEXT and not _MARKS.search(text):
            return text, "", []
        shown: dict[str, str] = {TEXT: "", REASONING: ""}
        calls: list[CallPiece] = []
        for part in _MARKS.split(text):
            if _MARKS.fullmatch(part):
                if part == ARGUMENTS:
                    self._index, id_, name = json.loads(self._head)
                    calls.append(CallPiece(self._index, id_, name))
                    self._head = ""
                self._mark = part
            elif self._mark == CALL:
                self._head += part
            elif self._mark == ARGUMENTS and part:
                calls.append(CallPiece(self._index, arguments=part))
            elif part:
                shown[self._mark] += part
        return shown[TEXT], shown[REASONING], calls
