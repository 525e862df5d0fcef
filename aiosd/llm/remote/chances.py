"""Log probabilities in the chunks of an answer, in the forms of chats (`content`) and of completions (`tokens`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from libaios.wire import Alternative, Logprob

LEAST = -1e4  # some endpoints have their own way to write -inf
UNKNOWN = -1  # the number of a token if the endpoint does not send it
MOST_PIECE = 1024  # bytes of a token

_Text = Annotated[str, Meta(max_length=MOST_PIECE)]


class _Token(Struct):
    token: _Text
    logprob: float
    bytes: Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(max_length=MOST_PIECE)] | None = None
    id: int | None = None
    top_logprobs: list[_Token] | None = None


class _Found(Struct):
    content: list[_Token] | None = None
    tokens: list[_Text] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[_Text, float] | None] | None = None


_decode = msgspec.json.Decoder(_Found | None).decode


def of_chunk(given: Raw, num_top: int) -> list[Logprob]:
    """The log probabilities of a choice, each with no more alternatives than requested; [] if there are none. Raises
    ValueError for other data."""
    if not bytes(given):
        return []
    try:
        found = _decode(given)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"log probabilities that are none: {error}") from None
    if found is None:
        return []
    return list(_of_completion(found, num_top) if found.tokens is not None else _of_chat(found, num_top))


def _of_chat(found: _Found, num_top: int) -> Iterator[Logprob]:
    for one in found.content or ():
        top = [Alternative(_number(each), _log(each.logprob), _piece(each)) for each in (one.top_logprobs or ())]
        yield Logprob(_number(one), _log(one.logprob), _piece(one), top[:num_top])


def _of_completion(found: _Found, num_top: int) -> Iterator[Logprob]:
    tokens, logs = found.tokens or [], found.token_logprobs or []
    tops = found.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(logs) == len(tops):
        raise ValueError("log probabilities that do not fit their tokens")
    for token, log, top in zip(tokens, logs, tops, strict=True):
        if log is None:
            raise ValueError("a generated token without a log probability")
        others = [Alternative(UNKNOWN, _log(value), text.encode()) for text, value in (top or {}).items()]
        yield Logprob(UNKNOWN, _log(log), token.encode(), others[:num_top])


def _log(value: float) -> float:
    if value > 1e-3:  # slightly above 0 is a rounding error
        raise ValueError(f"a log probability of {value:g}")
    return min(max(value, LEAST), 0.0)


def _number(one: _Token) -> int:
    return one.id if one.id is not None and 0 <= one.id < 1 << 31 else UNKNOWN


def _piece(one: _Token) -> bytes:
    return bytes(one.bytes) if one.bytes is not None else one.token.encode()


def size(found: Sequence[Logprob]) -> int:
    """About as many bytes as they take in a message."""
    return sum(24 + len(one.piece) + sum(24 + len(other.piece) for other in one.top) for one in found)
