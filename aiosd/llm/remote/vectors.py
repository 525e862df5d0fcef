"""Texts for which an endpoint makes vectors (`/embeddings`): some in each request, and the vectors so far. Data from
the endpoint is not trusted: `BadAnswer` names the fault. Pure."""

from __future__ import annotations

import base64
import binascii
import math
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from aiosd.llm.line import MAX_ANSWER
from aiosd.llm.remote.answer import BadAnswer, loosely, sentence
from libaios.wire import Embedded

MOST_TEXTS = 64  # in a request: the answer is read whole,
MOST_CHARACTERS = 200_000  # … and endpoints limit what they compute at once
MOST_WIDTH = 1 << 16


class _Vector(Struct):
    embedding: str | list[float]  # base64 of float32, or numbers
    index: Annotated[int, Meta(ge=0)] | None = None


class _Usage(Struct):
    prompt_tokens: Any = 0


class _EmbeddingsBody(Struct):
    data: list[_Vector]
    usage: _Usage | None = None


class Vectors:
    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._rows: list[bytes] = []  # of the first texts
        self._width = 0
        self._come: list[bytes] | None = None  # those of the request under way
        self.prompt_tokens = 0  # of the finished texts, as the endpoint reports or by an estimate

    @property
    def complete(self) -> bool:
        return len(self._rows) == len(self._texts)

    def batch(self) -> list[str]:
        """The texts of the next request."""
        begin = len(self._rows)
        count, characters = 0, 0
        for text in self._texts[begin : begin + MOST_TEXTS]:
            characters += len(text)
            if count and characters > MOST_CHARACTERS:
                break
            count += 1
        return list(self._texts[begin : begin + count])

    def body(self, model: str) -> bytes:
        return msgspec.json.encode({"model": model, "input": self.batch()})

    def begin(self) -> None:
        self._come = None

    def take(self, data: bytes) -> int:
        """Take the answer to a request; returns its tokens as the endpoint reports them, 0: it does not. Raises
        BadAnswer."""
        try:
            answer = msgspec.json.decode(data, type=_EmbeddingsBody)
        except (msgspec.DecodeError, RecursionError):
            raise BadAnswer(f"an answer without vectors: {sentence(loosely(data))}") from None
        count = len(self.batch())
        places = [one.index if one.index is not None else at for at, one in enumerate(answer.data)]
        if len(places) != count:
            raise BadAnswer(f"{len(places)} vectors for {count} texts")
        if sorted(places) != list(range(count)):
            raise BadAnswer("vectors of other texts")
        rows = [_unit(_floats(one.embedding)) for _, one in sorted(zip(places, answer.data, strict=True), key=_place)]
        width = self._width or len(rows[0])
        if any(len(row) != width for row in rows):
            raise BadAnswer("vectors of different lengths")
        self._width = width
        self._come = [row.tobytes() for row in rows]
        count = answer.usage.prompt_tokens if answer.usage is not None else 0
        return count if isinstance(count, int) and not isinstance(count, bool) and 0 < count < 1 << 40 else 0

    def keep(self, tokens: int) -> bool:
        """Keep the answer that was taken; it was computed from `tokens` tokens. False: there is none."""
        if self._come is None:
            return False
        self._rows += self._come
        self._come = None
        self.prompt_tokens += tokens
        return True

    @property
    def too_many(self) -> bool:
        """Are there too many vectors for one reply?"""
        return 4 * self._width * len(self._texts) + 64 > MAX_ANSWER

    def embedded(self) -> Embedded:
        return Embedded(len(self._rows), self._width, b"".join(self._rows), self.prompt_tokens)


def _place(pair: tuple[int, _Vector]) -> int:
    return pair[0]


def _floats(found: str | list[float]) -> Sequence[float]:
    if isinstance(found, list):
        return found
    try:
        values = array("f")
        values.frombytes(base64.b64decode(found, validate=True))
        return values
    except (ValueError, binascii.Error):
        raise BadAnswer("a vector that is no base64 of float32") from None


def _unit(values: Sequence[float]) -> array[float]:
    """The vector scaled to length 1."""
    length = math.hypot(*values) if 0 < len(values) <= MOST_WIDTH else 0.0
    if not 0.0 < length < math.inf:
        raise BadAnswer("a vector without a direction")
    return array("f", [value / length for value in values])
