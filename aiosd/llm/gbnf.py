"""Grammars that come with a call, in llama.cpp's notation (GBNF): read and checked here before llama.cpp gets them.

llama.cpp reads a grammar recursively, writes a repetition out as copies, and keeps every way in which the grammar can
produce the text so far. A grammar of a few characters could therefore stop all calls for minutes. So this file reads
the grammar first. It refuses parts that llama.cpp does not accept or that would grow too fast, and names their place:
deep nesting, repetitions inside repetitions, and repetitions of something that can be empty (the number of ways to read
a text then grows with each repetition).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from aiosd.errors import Bug, refuse
from aiosd.llm import llama
from aiosd.llm.structured import WholeText

MOST_RULES = 1024
DEEPEST = 32  # how deep groups may be nested; also how many rounds `_until_known` may take
MOST_TIMES = 1000  # how often something may be repeated; numbers of nested repetitions are multiplied

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9-]+")
_ESCAPE = r'\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[tnr\\"\[\]-])'
_LITERAL = re.compile(rf'"(?:[^"\\]|{_ESCAPE})*"')
_CLASS = re.compile(rf"\[\^?(?:[^\]\\]|{_ESCAPE})*\]")
_TIMES = re.compile(r"\{[ \t]*(\d+)[ \t]*(?:(,)[ \t]*(\d*)[ \t]*)?\}")
_SIGNS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(slots=True)
class _Item:
    """One part of a sequence, repeated `least` to `most` times (None: without limit)."""

    what: str | _Choices  # a group, the name of a rule, or "" for a text or characters
    at: int  # its place in the grammar
    empty: bool = False  # it is the empty text
    least: int = 1
    most: int | None = 1

    @property
    def repeated(self) -> bool:
        return self.most is None or self.most > 1


@dataclass(slots=True)
class _Choices:
    """Alternatives: one of these sequences."""

    sequences: list[list[_Item]] = field(default_factory=list)


def check(text: str) -> None:
    """Raises OSError EINVAL with a sentence that names the error and its place."""
    rules = _GrammarParser(text).rules()
    if "root" not in rules:
        raise refuse("grammar: it has no rule named root")
    _Judge(text, rules).judge()


class _GrammarParser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> dict[str, _Choices]:
        rules: dict[str, _Choices] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            name = self._match(_NAME, "the name of a rule")
            self._skip(lines=False)
            if not self._text.startswith("::=", self._at):
                raise self._wrong("::= is missing")
            self._at += 3
            self._skip(lines=True)
            rules[name] = self._choices(depth=0)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._wrong(f"{self._text[self._at]!r} has no place here")
            self._skip(lines=True)
            if len(rules) > MOST_RULES:
                raise refuse(f"grammar: more than {MOST_RULES} rules")
        return rules

    def _choices(self, depth: int) -> _Choices:
        if depth > DEEPEST:
            raise self._wrong(f"groups are nested more than {DEEPEST} deep")
        choices = _Choices([self._sequence(depth)])
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(lines=True)
            choices.sequences.append(self._sequence(depth))
        return choices

    def _sequence(self, depth: int) -> list[_Item]:
        items: list[_Item] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)\r\n":
            sign = self._text[self._at]
            if sign in "*+?{":
                self._repeat(items, sign)
            else:
                items.append(self._item(sign, depth))
            self._skip(lines=depth > 0)
        return items

    def _item(self, sign: str, depth: int) -> _Item:
        at = self._at
        if sign == '"':
            return _Item("", at, empty=len(self._match(_LITERAL, "a text that ends with a quote")) == 2)
        if sign == "[":
            self._match(_CLASS, "characters that end with ]")
            return _Item("", at)
        if sign == ".":
            self._at += 1
            return _Item("", at)
        if sign == "(":
            self._at += 1
            self._skip(lines=True)
            choices = self._choices(depth + 1)
            if not self._text.startswith(")", self._at):
                raise self._wrong("a ) is missing")
            self._at += 1
            return _Item(choices, at)
        return _Item(self._match(_NAME, "a text, characters, a group or the name of a rule"), at)

    def _repeat(self, items: list[_Item], sign: str) -> None:
        if not items:
            raise self._wrong(f"{sign} has nothing to repeat")
        if sign == "{":
            found = _TIMES.match(self._text, self._at)
            if not found:
                raise self._wrong("{ wants a number, or two with a comma, and a }")
            least = int(found[1][:9])
            most = least if not found[2] else int(found[3][:9]) if found[3] else None
            if least > MOST_TIMES or (most is not None and (most > MOST_TIMES or most < least)):
                raise self._wrong(f"{found[0]}: from 0 to {MOST_TIMES}, the smaller one first")
            self._at = found.end()
        else:
            least, most = _SIGNS[sign]
            self._at += 1
        last = items[-1]
        if (last.least, last.most) != (1, 1):  # it is repeated already: make it a group, and repeat that
            items[-1] = last = _Item(_Choices([[last]]), last.at)
        last.least, last.most = least, most

    def _match(self, pattern: re.Pattern[str], wanted: str) -> str:
        found = pattern.match(self._text, self._at)
        if not found:
            raise self._wrong(f"here must be {wanted}")
        self._at = found.end()
        return found[0]

    def _skip(self, lines: bool) -> None:
        found = (_SPACE_AND_LINES if lines else _SPACE).match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _wrong(self, why: str) -> OSError:
        return _wrong(self._text, self._at, why)


class _Judge:
    """The checks that need all rules: names, what can be empty, how nested repetitions multiply."""

    def __init__(self, text: str, rules: dict[str, _Choices]) -> None:
        self._text = text
        self._rules = rules
        self._empty: set[str] = set()
        self._times = dict.fromkeys(rules, 1)
        self._above: dict[str, set[str]] = {}  # for each rule, the rules that refer to it

    def judge(self) -> None:
        for name, choices in self._rules.items():
            for item in _items(choices):
                if isinstance(item.what, str) and item.what and item.what not in self._rules:
                    raise _wrong(self._text, item.at, f"there is no rule named {item.what}")
                if isinstance(item.what, str) and item.what:
                    self._above.setdefault(item.what, set()).add(name)
        self._until_known(self._find_empty)
        for choices in self._rules.values():
            for item in _items(choices):
                if item.repeated and self._can_be_empty(item, once=True):
                    raise _wrong(self._text, item.at, "what can be empty cannot be repeated")
        self._circular = {name for name in self._rules if self._in_circle(name)}
        self._until_known(self._find_times)

    def _until_known(self, improve: Callable[[str], bool]) -> None:
        """Call `improve` for all rules until none changes any more. The order is reversed after each round, so that few
        rounds are enough in whatever order the rules stand."""
        names = list(self._rules)
        for _ in range(DEEPEST):
            changed = [name for name in names if improve(name)]
            if not changed:
                return
            names.reverse()
        raise refuse("grammar: its rules refer to each other too deeply")

    def _find_empty(self, name: str) -> bool:
        if name in self._empty or not self._choices_empty(self._rules[name]):
            return False
        self._empty.add(name)
        return True

    def _choices_empty(self, choices: _Choices) -> bool:
        return any(all(map(self._can_be_empty, sequence)) for sequence in choices.sequences)

    def _can_be_empty(self, item: _Item, once: bool = False) -> bool:
        if item.least == 0 and not once:
            return True
        if isinstance(item.what, _Choices):
            return self._choices_empty(item.what)
        return item.what in self._empty if item.what else item.empty

    def _in_circle(self, name: str) -> bool:
        """Does the rule lead back to itself? Such a recursion reads characters each time, so it does not count as a
        repetition."""
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for above in self._above.get(waiting.pop(), ()):
                if above == name:
                    return True
                if above not in seen:
                    seen.add(above)
                    waiting.append(above)
        return False

    def _find_times(self, name: str) -> bool:
        if name in self._circular:
            return False
        times = self._choices_times(self._rules[name])
        changed, self._times[name] = times != self._times[name], times
        return changed

    def _choices_times(self, choices: _Choices) -> int:
        return max((self._item_times(item) for sequence in choices.sequences for item in sequence), default=1)

    def _item_times(self, item: _Item) -> int:
        inner = self._choices_times(item.what) if isinstance(item.what, _Choices) else self._times.get(item.what, 1)
        times = inner * max(item.least, item.most or 1, 1)
        if times > MOST_TIMES:
            raise _wrong(self._text, item.at, f"repeated {times} times in all; the limit is {MOST_TIMES}")
        return times


def _items(choices: _Choices) -> list[_Item]:
    found: list[_Item] = []
    waiting = [choices]
    while waiting:
        for sequence in waiting.pop().sequences:
            found += sequence
            waiting += [item.what for item in sequence if isinstance(item.what, _Choices)]
    return found


def _wrong(text: str, at: int, why: str) -> OSError:
    line = text.count("\n", 0, at) + 1
    return refuse(f"grammar: line {line}, character {at - text.rfind(chr(10), 0, at)}: {why}")


class GrammarConstraint(WholeText):
    """Keeps the whole text inside a grammar. `check` must have accepted that."""

    def __init__(self, model: llama.Model, text: str) -> None:
        try:
            super().__init__(model, text, "grammar")
        except Bug as error:  # accepted here but not by llama.cpp, mostly because of left recursion
            raise refuse(f"grammar: {error}") from None
