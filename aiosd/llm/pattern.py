"""Regular expressions as grammar rules: every keyword that restricts a string.

`pattern`, `format`, `minLength` and `maxLength` of one schema are one language: the texts that satisfy all of them. The
language becomes an automaton by derivatives (what may follow after this character?). Derivatives support intersection
and complement, and so also lookahead. Each state becomes one rule, so that llama.cpp never follows two ways at once. A
pattern matches anywhere in a text, as JSON Schema defines it, unless it begins with ^ or ends with $.

An automaton that would have more than MAX_STATES states, or take long (MAX_PARTS), is not built. If there is only one
pattern, with many repetitions ("(a{50}){50}"), it is translated directly; anything else is refused, as are back
references and lookbehind.

Implementations of regular expressions differ in what \\w, \\s, \\d match in full Unicode: only characters on which all
agree are written here, both inside and outside of such a class.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

from aiosd.errors import refuse

Ranges = tuple[tuple[int, int], ...]

MAX_STATES = 800
MAX_LENGTH = 2000  # characters of a pattern
MAX_REPETITIONS = 1_000_000
MAX_WAYS = 64  # ways in which nested repetitions can match one text
MAX_NODES = 40_000
MAX_PARTS = 500_000  # looked at while an automaton is built: one state can be a choice of thousands. About 0.3 s
_TOP = 0x10FFFF
_ANY: Ranges = ((0, _TOP),)


# ── sets of characters ────────────────────────────────────────────────────────────────────────────────────

_SURE: dict[str, Ranges] = {
    "CATEGORY_DIGIT": ((0x30, 0x39),),
    "CATEGORY_SPACE": ((9, 10), (13, 13), (0x20, 0x20)),
    "CATEGORY_WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
#: … and every character that some implementation includes.
_WIDEST: dict[str, Ranges] = {
    "CATEGORY_DIGIT": ((0x30, 0x39), (0x80, _TOP)),
    "CATEGORY_SPACE": (
        (9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
        (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
    ),
    "CATEGORY_WORD": (*_SURE["CATEGORY_WORD"], (0x80, _TOP)),
}  # fmt: skip
_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def inverse(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            out.append((at, low - 1))
        at = max(at, high + 1)
    return (*out, (at, _TOP)) if at <= _TOP else tuple(out)


def _members(members: Iterable[Any]) -> Ranges:
    """The characters of a class in brackets, [...]."""
    ranges: list[tuple[int, int]] = []
    classes: list[tuple[str, bool]] = []
    negate = False
    for member in members:
        op, value = _op(member), member[1]
        if op == "NEGATE":
            negate = True
        elif op == "LITERAL":
            ranges.append((value, value))
        elif op == "RANGE":
            ranges.append((value[0], value[1]))
        else:
            kind = str(value)
            if kind.replace("_NOT_", "_") not in _SURE:
                raise refuse("pattern: a character class that is not supported")
            classes.append((kind.replace("_NOT_", "_"), "_NOT_" in kind))
    # A class has only the members on which all agree; a negated one excludes what any implementation includes.
    for name, without in classes:
        if negate:
            ranges += inverse(_SURE[name]) if without else _WIDEST[name]
        else:
            ranges += inverse(_WIDEST[name]) if without else _SURE[name]
    return inverse(ranges) if negate else _joined(ranges)


_UNWRITABLE: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF))
_ESCAPED = ((10, "n"), (9, "t"), (13, "r"))


def _code(point: int) -> str:
    return f"\\x{point:02X}" if point < 0x100 else f"\\U{point:08X}"


def in_json(ranges: Ranges) -> str:
    """One of these characters, as written in a JSON string; '' when none of them can be."""
    plain = inverse([*inverse(ranges), *_UNWRITABLE])

    def has(point: int) -> bool:
        return any(low <= point <= high for low, high in ranges)

    escapes = [r'"\\\""'] * has(0x22) + [r'"\\\\"'] * has(0x5C)
    escapes += [f'"\\\\{letter}"' for point, letter in _ESCAPED if has(point)]
    if plain:
        escapes.insert(0, _class(plain))
    return escapes[0] if len(escapes) == 1 else f"({' | '.join(escapes)})" if escapes else ""


def as_it_is(ranges: Ranges) -> str:
    """One of these characters in plain text."""
    plain = inverse([*inverse(ranges), (0, 8), (11, 0x1F), (0x7F, 0x7F), (0xD800, 0xDFFF)])
    return _class(plain) if plain else ""


def _class(ranges: Ranges) -> str:
    return "[" + "".join(_code(a) + (f"-{_code(b)}" if b > a else "") for a, b in ranges) + "]"


# ── formats ───────────────────────────────────────────────────────────────────────────────────────────────

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    "(?!0000)(?:[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|"
    f"(?:0[13578]|1[02])-31)|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_HEX = "[0-9a-fA-F]"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$",
    "email": rf"^[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,}}$",
    "ipv4": rf"^(?:{_BYTE}\.){{3}}{_BYTE}$",
    "duration": r"^P(?=.)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=\d)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)$",
}

# ── languages ─────────────────────────────────────────────────────────────────────────────────────────────

NONE, EMPTY, ALL = 0, 1, 2


class _TooMuch(Exception):
    """The automaton takes too long to build."""


class Languages:
    """Regular languages as nodes (a node is a number); equal nodes are the same number. The operations simplify, so
    that a language has few different derivatives."""

    def __init__(self) -> None:
        self._nodes: list[tuple[Any, ...]] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self.nullable: list[bool] = []  # is the empty text in it?
        self._derived: dict[tuple[int, int], int] = {}
        self._edges: dict[int, frozenset[int]] = {}
        self._parts = 0  # looked at so far, of choices and of what is to be satisfied together
        # NONE, EMPTY, ALL, and any one character, from which ALL is built
        for node in (("none",), ("empty",), ("repeat", 3, 0, None), ("set", _ANY)):
            self._make(node, node[0] in ("empty", "repeat"))

    def _make(self, node: tuple[Any, ...], nullable: bool) -> int:
        known = self._known.get(node)
        if known is None:
            if len(self._nodes) >= MAX_NODES:
                raise refuse("pattern: too complex")
            known = self._known[node] = len(self._nodes)
            self._nodes.append(node)
            self.nullable.append(nullable)
        return known

    def chars(self, ranges: Ranges) -> int:
        return self._make(("set", ranges), False) if ranges else NONE

    def cat(self, a: int, b: int) -> int:
        if NONE in (a, b):
            return NONE
        if a == EMPTY or b == EMPTY:
            return b if a == EMPTY else a
        if a == b == ALL:
            return ALL
        kind = self._nodes[a]
        if kind[0] == "cat":
            return self.cat(kind[1], self.cat(kind[2], b))
        return self._make(("cat", a, b), self.nullable[a] and self.nullable[b])

    def either(self, parts: Iterable[int]) -> int:
        flat = self._flat("either", parts) - {NONE}
        if ALL in flat:
            return ALL
        if not flat:
            return NONE
        if len(flat) == 1:
            return next(iter(flat))
        return self._make(("either", frozenset(flat)), any(self.nullable[part] for part in flat))

    def both(self, parts: Iterable[int]) -> int:
        flat = self._flat("both", parts) - {ALL}
        if NONE in flat:
            return NONE
        if not flat:
            return ALL
        if len(flat) == 1:
            return next(iter(flat))
        nullable = all(self.nullable[part] for part in flat)
        if EMPTY in flat:
            return EMPTY if nullable else NONE
        return self._make(("both", frozenset(flat)), nullable)

    def _flat(self, kind: str, parts: Iterable[int]) -> set[int]:
        """Raises _TooMuch."""
        flat: set[int] = set()
        for part in parts:
            node = self._nodes[part]
            inner = node[1] if node[0] == kind else {part}
            self._parts += 1 + len(inner) // 16  # a union is quick
            if self._parts > MAX_PARTS:
                raise _TooMuch
            flat |= inner
        return flat

    def others(self, a: int) -> int:
        """All texts that are not in `a`."""
        if a in (NONE, ALL):
            return ALL if a == NONE else NONE
        if self._nodes[a][0] == "others":
            return int(self._nodes[a][1])
        return self._make(("others", a), not self.nullable[a])

    def repeat(self, a: int, low: int, high: int | None) -> int:
        if a in (NONE, EMPTY) or high == 0:
            return EMPTY if a == EMPTY or low == 0 else NONE
        if (low, high) == (1, 1):
            return a
        if self.nullable[a]:
            low = 0
        node = self._nodes[a]
        if node[0] == "repeat" and node[2:] == (0, None):  # (x*)* is x*
            return a
        if (low, high) == (0, None) and node == ("set", _ANY):
            return ALL
        return self._make(("repeat", a, low, high), low == 0)

    def derived(self, a: int, char: int) -> int:
        """The derivative: the texts that may follow `char` so that the whole is in `a`."""
        key = a, char
        if key not in self._derived:
            self._derived[key] = self._derive(self._nodes[a], char)
        return self._derived[key]

    def _derive(self, node: tuple[Any, ...], char: int) -> int:
        kind = node[0]
        if kind in ("none", "empty"):
            return NONE
        if kind == "set":
            return EMPTY if any(low <= char <= high for low, high in node[1]) else NONE
        if kind == "cat":
            first = self.cat(self.derived(node[1], char), node[2])
            return self.either([first, self.derived(node[2], char)]) if self.nullable[node[1]] else first
        if kind == "either":
            return self.either(self.derived(part, char) for part in node[1])
        if kind == "both":
            return self.both(self.derived(part, char) for part in node[1])
        if kind == "others":
            return self.others(self.derived(node[1], char))
        _, a, low, high = node
        rest = self.repeat(a, max(low - 1, 0), None if high is None else high - 1)
        return self.cat(self.derived(a, char), rest)

    def edges(self, a: int) -> frozenset[int]:
        """The characters at which the derivative may change."""
        found = self._edges.get(a)
        if found is None:
            node = self._nodes[a]
            kind = node[0]
            if kind == "set":
                found = frozenset(edge for low, high in node[1] for edge in (low, high + 1))
            elif kind == "cat":
                found = self.edges(node[1]) | (self.edges(node[2]) if self.nullable[node[1]] else frozenset())
            elif kind in ("either", "both"):
                found = frozenset().union(*map(self.edges, node[1]))
            else:
                found = self.edges(node[1]) if kind in ("others", "repeat") else frozenset()
            self._edges[a] = found
        return found


# ── from Python's reading of a pattern to a language ──────────────────────────────────────────────────────


def _op(item: Any) -> str:
    return str(item[0])


def parsed(pattern: Any) -> list[Any]:
    if not isinstance(pattern, str) or len(pattern) > MAX_LENGTH:
        raise refuse(f"pattern must be a string of at most {MAX_LENGTH} characters")
    source = re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern)  # JavaScript's syntax for a named group
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = importlib.import_module("re._parser").parse(source)
    except (ValueError, OverflowError, RecursionError, re.error) as error:
        raise refuse(f"pattern: {error}") from None
    if tree.state.flags & ~re.UNICODE:
        raise refuse("pattern: flags are not supported")
    return list(tree)


class _PatternCompiler:
    """Builds the language of a parsed pattern from its end: for each item the language of what follows it is known, so
    lookahead is an intersection with that."""

    def __init__(self, languages: Languages) -> None:
        self._l = languages

    def search(self, items: list[Any]) -> int:
        """The language of all texts that contain a match of the pattern."""
        languages = self._l
        at_start = self._sequence(items, ALL, True)
        later = languages.cat(languages.chars(_ANY), languages.cat(ALL, self._sequence(items, ALL, False)))
        return languages.either([at_start, later])

    def _sequence(self, items: Iterable[Any], then: int, start: bool) -> int:
        items = list(items)
        starts = []
        for item in items:
            starts.append(start)
            start = start and _op(item) in ("AT", "ASSERT", "ASSERT_NOT")
        for item, first in zip(reversed(items), reversed(starts), strict=True):
            then = self._item(_op(item), item[1], then, first)
        return then

    def _item(self, op: str, value: Any, then: int, start: bool) -> int:
        languages = self._l
        characters = _characters_of(op, value)
        if characters is not None:
            return languages.cat(languages.chars(characters), then)
        if op == "SUBPATTERN":
            _no_flags(value)
            return self._sequence(value[3], then, start)
        if op == "BRANCH":
            return languages.either([self._sequence(branch, then, start) for branch in value[1]])
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(value, then, start)
        if op == "AT":
            return self._anchor(str(value), then, start)
        if op in ("ASSERT", "ASSERT_NOT") and value[0] > 0:
            ahead = self._sequence(value[1], ALL, start)
            return languages.both([then, ahead if op == "ASSERT" else languages.others(ahead)])
        raise refuse(f"pattern: {op.lower().replace('_', ' ')} cannot be expressed by a grammar")

    def _anchor(self, kind: str, then: int, start: bool) -> int:
        if kind.startswith("AT_BEGINNING"):
            return then if start else NONE
        if kind.startswith("AT_END"):
            return self._l.both([then, EMPTY])
        raise refuse("pattern: word boundaries cannot be expressed by a grammar")

    def _repeated(self, value: Any, then: int, start: bool) -> int:
        low, high = _bounds(value)
        if (low, high) == (0, 1):
            return self._l.either([self._sequence(value[2], then, start), then])
        if _looks_around(value[2]):
            raise refuse("pattern: an anchor or a lookahead that is repeated cannot be expressed by a grammar")
        return self._l.cat(self._l.repeat(self._sequence(value[2], EMPTY, False), low, high), then)


def _characters_of(op: str, value: Any) -> Ranges | None:
    if op == "LITERAL":
        return ((value, value),)
    if op == "NOT_LITERAL":
        return inverse([(value, value)])
    if op == "ANY":
        return inverse(_LINE_ENDS)
    return _members(value) if op == "IN" else None


def _no_flags(group: Any) -> None:
    if group[1] or group[2]:
        raise refuse("pattern: flags are not supported")


def _bounds(value: Any) -> tuple[int, int | None]:
    low, high = int(value[0]), None if "MAXREPEAT" in str(value[1]) else int(value[1])
    if low > MAX_REPETITIONS or (high is not None and high > MAX_REPETITIONS):
        raise refuse(f"pattern: more than {MAX_REPETITIONS} repetitions")
    return low, high


def _looks_around(items: Iterable[Any]) -> bool:
    for item in items:
        op, value = _op(item), item[1]
        if op in ("AT", "ASSERT", "ASSERT_NOT") or any(map(_looks_around, _parts(op, value))):
            return True
    return False


def _parts(op: str, value: Any) -> list[Any]:
    """The sequences inside an item."""
    if op == "BRANCH":
        return list(value[1])
    if op == "SUBPATTERN":
        return [value[3]]
    return [value[2]] if op in ("MAX_REPEAT", "MIN_REPEAT") else []


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────

Spell = Callable[[Ranges], str]
_State = tuple[bool, dict[int, str]]  # may the text end here? What may follow: the next state and how it is reached


@lru_cache(maxsize=64)  # the same formats recur, and an agent sends its schemas with every turn
def automaton(
    patterns: tuple[str, ...], low: int, high: int | None, spell: Spell, without: str
) -> dict[int, _State] | None:
    """All states, the start state first; None when there are too many, or they take too long to find."""
    languages = Languages()
    try:
        wanted = [_PatternCompiler(languages).search(parsed(pattern)) for pattern in patterns]
        if low or high is not None:
            wanted.append(languages.repeat(languages.chars(_ANY), low, high))
        if without:
            end = ALL
            for char in reversed(without):
                end = languages.cat(languages.chars(((ord(char), ord(char)),)), end)
            wanted.append(languages.others(languages.cat(ALL, end)))
        return _explored(languages, languages.both(wanted), spell)
    except _TooMuch:
        return None
    except RecursionError:
        raise refuse("pattern: nested too deep") from None


def _explored(languages: Languages, start: int, spell: Spell) -> dict[int, _State] | None:
    states: dict[int, _State] = {}
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if state in states:
            continue
        if len(states) >= MAX_STATES:
            return None
        found: dict[int, list[tuple[int, int]]] = {}
        for low, after in pairwise(sorted(languages.edges(state) | {0, _TOP + 1})):
            target = languages.derived(state, low)
            if target != NONE:
                found.setdefault(target, []).append((low, after - 1))
        ways = {target: text for target, ranges in found.items() if (text := spell(_joined(ranges)))}
        states[state] = (languages.nullable[state], ways)
        waiting += ways
    return _alive(states, start)


Add = Callable[[str, str], str]  # (name, body) of a rule → the name that it got
Repeat = Callable[[str, int, "int | None", str], str]


class Strings:
    """Makes rules for the inside of strings. `add` and `repeat` are the grammar's (see `schema.Converter`)."""

    def __init__(self, add: Add, repeat: Repeat, spend: Callable[[int], None]) -> None:
        self._add = add
        self._repeat = repeat
        self._spend = spend
        self._made = 0

    def rule(
        self,
        name: str,
        patterns: list[Any],
        low: int = 0,
        high: int | None = None,
        *,
        spell: Spell = in_json,
        without: str = "",
    ) -> str:
        """The rule of all texts that satisfy every pattern, have `low` to `high` characters and do not contain
        `without`. Raises OSError where there are none, or the grammar would be too large."""
        trees = [parsed(pattern) for pattern in patterns]
        hits = automaton.cache_info().hits
        states = automaton(tuple(patterns), low, high, spell, without)
        known = automaton.cache_info().hits > hits
        size = MAX_STATES if states is None else len(states)
        self._spend(1 + size // 8 if known else 4 * size)
        if states is not None:
            return self._written(name, states)
        if len(trees) == 1 and not (low or high is not None or without):
            return self._as_it_stands(name, trees[0], spell)
        raise refuse("pattern, format, minLength, maxLength: together they are too complex for a grammar")

    def _written(self, name: str, states: dict[int, _State]) -> str:
        self._made += 1
        names = {state: f"{name}-{self._made}s{i}" for i, state in enumerate(states)}
        for state, (ends, ways) in states.items():
            parts = [
                text if states[target] == (True, {}) else f"{text} {names[target]}" for target, text in ways.items()
            ]
            if states[state] != (True, {}) or state == next(iter(states)):
                self._add(names[state], " | ".join([*parts, '""'] if ends else parts))
        return names[next(iter(states))]

    # ── a pattern translated directly ──

    def _as_it_stands(self, name: str, items: list[Any], spell: Spell) -> str:
        if _looks_around(items[1:-1]) or _ways(items) > MAX_WAYS:
            raise refuse("pattern: too complex for a grammar: repetitions within repetitions, or lookahead with many")
        filler = f"{spell(_ANY)}*"
        begins, ends = (bool(items) and _op(items[i]) == "AT" for i in (0, -1))
        items = items[1 if begins else 0 : -1 if ends and len(items) > 1 else None]
        body = self._sequence(name, items, spell)
        return self._add(f"{name}-p", " ".join(filter(None, ["" if begins else filler, body, "" if ends else filler])))

    def _sequence(self, name: str, items: Iterable[Any], spell: Spell) -> str:
        return " ".join(filter(None, (self._item(name, _op(item), item[1], spell) for item in items)))

    def _item(self, name: str, op: str, value: Any, spell: Spell) -> str:
        self._spend(1)
        characters = _characters_of(op, value)
        if characters is not None:
            text = spell(characters)
            if not text:
                raise refuse("pattern: a character that JSON cannot write plainly")
            return text
        if op == "SUBPATTERN":
            inner = self._sequence(name, value[3], spell)
            return f"({inner})" if inner else ""
        if op == "BRANCH":
            return "(" + " | ".join(self._sequence(name, branch, spell) or '""' for branch in value[1]) + ")"
        low, high = _bounds(value)
        inner = self._sequence(name, value[2], spell)
        if not inner:
            return ""
        return f"({self._repeat(self._add(f'{name}-x', inner), low, high, name)})"


def _alive(states: dict[int, _State], start: int) -> dict[int, _State]:
    """Without the states from which no end can be reached."""
    before: dict[int, list[int]] = {}
    for state, (_, ways) in states.items():
        for target in ways:
            before.setdefault(target, []).append(state)
    waiting = [state for state, (ends, _) in states.items() if ends]
    alive = set(waiting)
    while waiting:
        for state in before.get(waiting.pop(), ()):
            if state not in alive:
                alive.add(state)
                waiting.append(state)
    if start not in alive:
        raise refuse("pattern, format, minLength, maxLength: no text satisfies them together")
    return {
        state: (ends, {target: text for target, text in ways.items() if target in alive})
        for state, (ends, ways) in states.items()
        if state in alive
    }


def _ways(items: Iterable[Any]) -> int:
    """Most ways in which the items can match one text: repetitions of variable number, multiplied where nested."""
    most = 1
    for item in items:
        op, value = _op(item), item[1]
        if op == "SUBPATTERN":
            most = max(most, _ways(value[3]))
        elif op == "BRANCH":
            most = max(most, sum(map(_ways, value[1])))
        elif op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high = _bounds(value)
            inner = _ways(value[2])
            most = max(most, inner if low == high else inner * (2 if inner == 1 else 32))
    return most
