"""Keeps a generation inside a grammar: check the token that was drawn first, constrain only on refusal.

Checking one token against the grammar takes microseconds, masking the whole vocabulary milliseconds. So the token is
first drawn as if there were no grammar. If the grammar refuses it, another is drawn from the likeliest tokens that fit,
and from the whole vocabulary only if none of these fits. If the grammar can end here and the drawn token does not fit,
the generation ends.

Only `settle` and `replay` change the state of a constraint, one call per token.
"""

from __future__ import annotations

import codecs
import errno
import re
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aiosd.errors import refuse
from aiosd.llm import llama
from aiosd.llm.arrays import LogitRow
from aiosd.llm.dialects import ToolDialect, ToolDict, call_rules
from aiosd.llm.schema import Converter, Schema, grammar_of, literal
from aiosd.llm.text import TextStream

#: What `settle` returns when the generation ends without another token.
END = -1

#: How many of the likeliest tokens are tried before the whole vocabulary is.
_LIKELIEST = 256

Draw = Callable[[LogitRow], int]  # takes the logits of candidates, returns the index of one


class Constraint(Protocol):
    def settle(self, text: TextStream, row: LogitRow, token: int, draw: Draw) -> int:
        """The next token: `token` if it fits, else another one, or END."""
        ...

    def replay(self, text: TextStream, token: int) -> None:
        """Take a token that was generated before; OSError if the grammar does not allow it."""
        ...

    @property
    def can_end(self) -> bool:
        """Whether the text so far is whole."""
        ...

    def close(self) -> None: ...


class Guide:
    """A grammar, plus two checks that llama.cpp's grammar lacks: control tokens, and bytes that are no UTF-8.
    `controls`: the texts of control tokens that the grammar may contain."""

    def __init__(self, model: llama.Model, gbnf: str, controls: Iterable[str] = ()) -> None:
        self._model = model
        self._refused = model.control
        wanted = set(controls)
        if wanted:
            self._refused = model.control.copy()
            self._refused[[token for token in model.control_tokens() if model.token_text(token) in wanted]] = False
        self._grammar = llama.Grammar(model, gbnf)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def allows(self, token: int) -> bool:
        if token in self._model.end_tokens:
            return self._grammar.allows(token)
        return not self._refused[token] and self._is_utf8(token) and self._grammar.allows(token)

    def follow(self, tokens: list[int]) -> bool:
        """Accept all of these. False: one does not fit."""
        for token in tokens:
            if not self.allows(token):
                return False
            self.accept(token)
        return True

    @property
    def can_end(self) -> bool:
        """Whether the text so far is whole. (A model without end tokens has no way to show it.)"""
        return any(self._grammar.allows(token) for token in list(self._model.end_tokens)[:1])

    def accept(self, token: int) -> None:
        if token not in self._model.end_tokens:
            self._utf8.decode(self._model.pieces[token])
            self._grammar.accept(token)

    def _is_utf8(self, token: int) -> bool:
        state = self._utf8.getstate()
        try:
            self._utf8.decode(self._model.pieces[token])
        except UnicodeDecodeError:
            return False
        finally:
            self._utf8.setstate(state)
        return True

    def choose(self, row: LogitRow, token: int, draw: Draw) -> int:
        """`token` if it fits, else END if the text may end here, else the draw among those that fit."""
        if self.allows(token):
            self.accept(token)
            return token
        if self.can_end:
            return END
        chosen = self._constrained(row, draw)
        if chosen != END:
            self.accept(chosen)
        return chosen

    def _constrained(self, row: LogitRow, draw: Draw) -> int:
        for count in (_LIKELIEST, len(row)):
            if count < len(row):
                ids = np.argpartition(row, -count)[-count:]
                ids.sort()
            else:
                ids = np.arange(len(row))
            ids = self.fitting(ids)
            while len(ids):
                place = draw(row[ids])
                if self._is_utf8(int(ids[place])):
                    return int(ids[place])
                ids = np.delete(ids, place)
        if not self._model.end_tokens:  # nothing can follow, and the model has no token to end with
            return END
        raise OSError(errno.EIO, "no token of the model's vocabulary fits the grammar at this place")

    def fitting(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the tokens that the grammar allows; `allows` may still refuse some as no UTF-8."""
        ids = ids[~self._refused[ids]]
        return ids[self._grammar.mask(ids)]

    def close(self) -> None:
        self._grammar.close()


def schema_grammar(schema: Schema, quick: bool = False) -> str:
    try:
        return grammar_of(schema, quick)
    except OSError as error:
        raise refuse(f"schema: {error.strerror}") from None


def tools_grammar(
    model: llama.Model,
    dialect: ToolDialect,
    tools: list[ToolDict],
    choice: str = "auto",
    several: bool = True,
    quick: bool = False,
    loose: frozenset[str] = frozenset(),
) -> str:
    """The grammar of calls of these tools. `choice` "required": it includes the trigger of the first call. `loose`:
    names of tools whose arguments are checked before the call is made (see `schema`)."""
    converter = Converter(quick)
    calls = call_rules(dialect, tools, converter, loose)
    root = dialect.rules(begun=choice != "required", several=several)
    return f"{converter.text()}{_by_token(model, f'{calls}{chr(10)}{root}', dialect)}\n"


class WholeText:
    """Keeps the whole text inside one grammar. `what`: it is made of a schema, or given as such."""

    def __init__(self, model: llama.Model, gbnf: str, what: str) -> None:
        self._guide = Guide(model, gbnf)
        self._what = what

    def settle(self, text: TextStream, row: LogitRow, token: int, draw: Draw) -> int:
        return self._guide.choose(row, token, draw)

    def replay(self, text: TextStream, token: int) -> None:
        if not self._guide.allows(token):
            raise refuse(f"given: these tokens do not fit the {self._what}")
        self._guide.accept(token)

    @property
    def can_end(self) -> bool:
        return self._guide.can_end

    def close(self) -> None:
        self._guide.close()


class ToolConstraint:
    """Free text until a tool call begins, from there on calls that are valid for one of the tools.

    `choice` "none": no call may begin; "required": the answer is a call.
    """

    def __init__(self, model: llama.Model, gbnf: str, dialect: ToolDialect, *, choice: str = "auto") -> None:
        self._model = model
        self._gbnf = gbnf
        self._dialect = dialect
        self._forbidden = choice == "none"
        self._guide: Guide | None = None
        self._since: list[int] = []  # tokens of the answer so far, while they may still become a call without a trigger
        if choice == "required":
            self._enter()

    def settle(self, text: TextStream, row: LogitRow, token: int, draw: Draw) -> int:
        if self._guide is not None:
            return self._guide.choose(row, token, draw)
        refused: list[int] = []
        while not self._step(text, token):
            # A call begins that is not allowed, or that the grammar cannot continue from here.
            refused.append(token)
            token = _other(row, refused, draw)
        return token

    def replay(self, text: TextStream, token: int) -> None:
        if self._guide is None:
            fits = self._step(text, token)
        else:
            fits = self._guide.allows(token)
            if fits:
                self._guide.accept(token)
        if not fits:
            raise refuse("given: these tokens do not fit the tools")

    def _step(self, text: TextStream, token: int) -> bool:
        """Look at a token of free text; enter the grammar if it begins a call. False: refused."""
        if token in self._model.end_tokens:
            return True
        piece = self._model.pieces[token].decode(errors="replace")
        end, kept = text.triggers(piece)
        if text.inside:
            self._since = []
        self._since = [*self._since, token] if len(self._since) < _LONGEST_HEAD else self._since
        if not end:
            return True
        if self._forbidden or (not kept and piece[end:].strip()):
            self._since = self._since[:-1]
            return False
        self._enter()
        assert self._guide is not None
        if kept and not self._guide.follow(self._since):
            self._guide.close()
            self._guide = None
            self._since = self._since[:-1]
            return False
        return True

    @property
    def can_end(self) -> bool:
        return self._guide is None or self._guide.can_end

    def _enter(self) -> None:
        self._guide = Guide(self._model, self._gbnf, self._dialect.controls)

    def close(self) -> None:
        if self._guide is not None:
            self._guide.close()


class AfterThoughts:
    """A constraint that holds only after the model's thoughts. `open_`: the thoughts may still begin."""

    def __init__(self, model: llama.Model, inner: Constraint, open_: bool) -> None:
        self._model = model
        self._inner = inner
        self._open = open_

    def settle(self, text: TextStream, row: LogitRow, token: int, draw: Draw) -> int:
        refused: list[int] = []
        while self._thinks(text, token):
            if self._fits(text, token):
                return token
            refused.append(token)
            token = _other(row, refused, draw)
        return self._inner.settle(text, row, token, draw)

    def replay(self, text: TextStream, token: int) -> None:
        if not self._thinks(text, token):
            self._inner.replay(text, token)

    @property
    def can_end(self) -> bool:
        return self._inner.can_end

    def _thinks(self, text: TextStream, token: int) -> bool:
        """Is this token part of the thoughts, of their marks or of the blanks after them?"""
        if text.inside:
            return True
        piece = self._model.pieces[token].decode(errors="replace")
        if text.thought and text.blank and not piece.strip() and piece:
            return True
        self._open = self._open and text.blank and not text.thought and text.begins_thoughts(piece)
        return self._open

    def _fits(self, text: TextStream, token: int) -> bool:
        """Does the token keep two rules: thoughts do not end the generation, and the answer begins with a new token?"""
        if token in self._model.end_tokens:
            return False
        piece = self._model.pieces[token].decode(errors="replace")
        end = text.ends_thoughts(piece)
        return not end or not piece[end:].strip()

    def close(self) -> None:
        self._inner.close()


def _by_token(model: llama.Model, rules: str, dialect: ToolDialect) -> str:
    """Replace the text of control tokens by the tokens themselves: letter by letter they would be plain text."""
    for token in model.control_tokens():
        text = model.token_text(token)
        if text and text in dialect.controls:
            rules = _LITERAL.sub(lambda match: match[0].replace(literal(text)[1:-1], f'" <[{token}]> "'), rules)  # noqa: B023
    return re.sub(r'(?<![\\"])"" (?=<\[)|(?<=\]>) ""(?!")', "", rules)


_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')


#: Most tokens of the beginning of a call without a trigger.
_LONGEST_HEAD = 256


def _other(row: LogitRow, refused: list[int], draw: Draw) -> int:
    rest = row.copy()
    rest[refused] = -np.inf
    return draw(rest)
