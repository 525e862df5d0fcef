"""From the bytes of tokens to the characters that the caller gets ("shown" characters).

Some bytes cannot be shown at once: an incomplete character, or the beginning of what may become a stop string, a tool
call, or a mark around the model's thoughts. `TextStream` holds such a tail back. What it has shown after n tokens
depends on those tokens alone, not on how they were grouped into pieces: so a generation that is resumed from its tokens
continues exactly where its reader stopped.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from libaios import parts

_utf8 = codecs.getincrementaldecoder("utf-8")


class Matcher:
    """Finds one string in a stream, character by character (Knuth-Morris-Pratt): constant memory, and a long stop
    string with many repetitions costs no more than any other."""

    __slots__ = ("_fail", "matched", "needle")

    def __init__(self, needle: str) -> None:
        self.needle = needle
        self.matched = 0  # length of the longest beginning of the needle with which the stream ends
        self._fail = [0] * len(needle)
        k = 0
        for i in range(1, len(needle)):
            while k and needle[i] != needle[k]:
                k = self._fail[k - 1]
            k += needle[i] == needle[k]
            self._fail[i] = k

    def feed(self, char: str) -> bool:
        """Does the stream end with the needle now?"""
        needle, k = self.needle, self.matched
        if k == len(needle):  # it matched with the last character, but another needle was chosen
            k = self._fail[k - 1]
        while k and char != needle[k]:
            k = self._fail[k - 1]
        self.matched = k = k + 1 if char == needle[k] else k
        return k == len(needle)

    def restart(self) -> None:
        """Start again, as if nothing had been fed."""
        self.matched = 0

    @property
    def length(self) -> int:
        return len(self.needle)


class CallWriter(Protocol):
    def feed(self, text: str) -> str:
        """The part of the calls in this text that a reader of the stream gets."""
        ...


TEXT, REASONING, HIDDEN = range(3)


class TextStream:
    """The text of one generation: `feed` takes bytes, `take` returns the characters that may be shown since.

    After a stop string (`stopped`) or the trigger of a tool call (`triggered`) nothing more is shown; what follows the
    trigger is collected in `rest`. Of several needles (strings to find) the first complete one counts; of two that are
    complete with the same character, the longer one.

    `aside`: the marks of a thinking model before and after its thoughts. Thoughts are shown as reasoning (see
    `libaios.parts`), and no tool call begins in them, whatever they quote; they come before the answer, never in the
    middle of it. `inside`: the generation begins inside the thoughts. `switches`: marks after which another part of the
    answer comes (TEXT, REASONING, or a part that is not shown), where a family of models has more than one. `head`: a
    call without a trigger, recognised by the beginning of the answer. `calls`: shows calls while they are written.
    `trim`: no blanks at the beginning.
    """

    __slots__ = (
        "_begins", "_calls", "_channel", "_control", "_decoder", "_fresh", "_head", "_held", "_parts", "_shown_as",
        "_solid", "_stops", "_switches", "_taken", "_thought", "_white", "num_inside", "rest", "stopped", "trigger",
        "triggered",
    )  # fmt: skip

    def __init__(
        self,
        stops: Iterable[str] = (),
        trigger: str | None = None,
        aside: tuple[str, str] | None = None,
        inside: bool = False,
        *,
        head: Head | None = None,
        switches: dict[str, int] | None = None,
        calls: CallWriter | None = None,
        trim: bool = False,
    ) -> None:
        self._decoder = _utf8("replace")
        self.trigger = Matcher(trigger) if trigger else None
        self._head = head
        self._stops = [Matcher(stop) for stop in set(stops)]
        self._switches = [_Switch(Matcher(mark), None, to) for mark, to in (switches or {}).items()]
        if aside:
            self._switches += [
                _Switch(Matcher(aside[0]), TEXT, REASONING),
                _Switch(Matcher(aside[1]), REASONING, TEXT),
            ]
        self._channel = HIDDEN if switches else REASONING if inside and aside else TEXT
        self._calls = calls
        self._thought = False
        self.num_inside = 0  # pieces of which a part belongs to the thoughts, or to a mark around them
        self._control = False  # inside a control token, where stop strings do not match
        needles = (trigger, *stops, *(switch.matcher.needle for switch in self._switches))
        begins = {needle[0] for needle in needles if needle}
        marks = "".join({*begins, *("{" if head else ""), parts.CONTROL, parts.CONTROL_END})
        self._begins = re.compile(f"[{re.escape(marks)}]")
        self._solid = 0  # characters of the answer so far, blanks not counted
        self._fresh = bool(switches or aside or trim)  # blanks at the beginning of a part are not shown
        self._white = ""  # blanks of the thoughts that are shown only if something follows
        self._shown_as = TEXT  # the part of the answer that the last shown text belongs to
        self._held = ""  # decoded, not shown: the characters that some needle has matched so far
        self._parts: list[str] = []  # shown
        self._taken = 0  # parts that `take` has returned
        self.rest = ""
        self.stopped = False
        self.triggered = False

    @property
    def inside(self) -> bool:
        """Is the stream inside the model's thoughts?"""
        return self._channel == REASONING

    @property
    def can_think(self) -> bool:
        """Must thoughts be separated from the answer? Then `feed` wants tokens one by one, to count them."""
        return self.inside or any(switch.to == REASONING for switch in self._switches)

    @property
    def thought(self) -> bool:
        """Have thoughts ended?"""
        return self._thought

    @property
    def blank(self) -> bool:
        """Has nothing of the answer come yet?"""
        return not self._solid

    def feed(self, piece: bytes) -> None:
        inside = self.inside
        self._add(self._decoder.decode(piece))
        self.num_inside += inside or self.inside

    def finish(self) -> None:
        """The end: half a character becomes U+FFFD, and what was held back for a needle is shown."""
        self._add(self._decoder.decode(b"", True))
        if self._held and not self.stopped and not self.triggered:
            self._show(self._held)
            self._held = ""

    def triggers(self, text: str) -> tuple[int, bool]:
        """Would a call begin in `text`, if it were fed now? Returns the number of characters up to the end of the
        call's beginning (0: no call), and whether this beginning is part of the call itself. Changes nothing."""
        end = self._would(text, lambda needle: needle is self.trigger or needle is self._head)
        return end, bool(end) and self._would(text, lambda needle: needle is self._head) == end

    def ends_thoughts(self, text: str) -> int:
        """The same for the end of the thoughts, where the answer begins."""
        return self._would(text, lambda needle: isinstance(needle, _Switch) and needle.to == TEXT)

    def begins_thoughts(self, text: str) -> bool:
        """After this text, would thoughts have begun, or could a mark of their beginning be incomplete?"""
        before = self._state()
        for char in text:
            needle = self._hit(char)
            if isinstance(needle, _Switch):
                self._switch(needle)
        thinks = self.inside or any(s.to == REASONING and s.matcher.matched for s in self._active_switches())
        self._restore(before)
        return thinks

    def _would(self, text: str, wanted: Callable[[object], bool]) -> int:
        before, found = self._state(), 0
        for i, char in enumerate(text, 1):
            needle = self._hit(char)
            if needle is None:
                continue
            if wanted(needle):
                found = i
                break
            if not isinstance(needle, _Switch):
                break
            self._switch(needle)
        self._restore(before)
        return found

    def _state(self) -> list[object]:
        head = self._head.state() if self._head else None
        return [self._channel, self._thought, self._solid, head, [matcher.matched for matcher in self._matchers()]]

    def _restore(self, state: list[Any]) -> None:
        self._channel, self._thought, self._solid, head, matched = state
        if self._head:
            self._head.restore(head)
        for matcher, length in zip(self._matchers(), matched, strict=True):
            matcher.matched = length

    def _matchers(self) -> list[Matcher]:
        switches = [switch.matcher for switch in self._switches]
        return [*self._stops, *switches, *([self.trigger] if self.trigger else [])]

    def take(self) -> str:
        """What may be shown and was not yet taken."""
        new = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return new

    def skip(self, characters: int) -> None:
        """The reader already has the first `characters` of the text: the next `take` begins after them."""
        text = "".join(self._parts)
        self._parts = [text[:characters], text[characters:]]
        self._taken = 1

    @property
    def shown(self) -> int:
        """How many characters may be shown so far, taken or not."""
        return sum(map(len, self._parts))

    def _add(self, text: str) -> None:
        if not text or self.stopped:
            return
        if self.triggered:
            self._call(text)
        elif self._stops or self._switches or self.trigger or self._head:
            self._search(text)
        else:
            self._show(text)

    def _search(self, text: str) -> None:
        held, i = self._held, 0
        live = bool(held)  # does the text so far end with the beginning of some needle?
        while i < len(text):
            if not live:
                end = self._skipped(text, i)
                held, i = held + text[i:end], end
                if i == len(text):
                    break
            char, i = text[i], i + 1
            held += char
            needle = self._hit(char)
            if needle is None:
                live = any(one.matched for one in self._active())
                continue
            self._show(held[: len(held) - needle.length])
            if isinstance(needle, _Switch):
                self._switch(needle)
                held, live = "", False
                continue
            self._held = ""
            self.stopped = needle is not self.trigger and needle is not self._head
            self.triggered = not self.stopped
            if self.triggered:
                self._call((held[-needle.length :] if needle is self._head else "") + text[i:])
            return
        hold = max((needle.matched for needle in self._active()), default=0)
        self._show(held[: len(held) - hold])
        self._held = held[len(held) - hold :]

    def _skipped(self, text: str, start: int) -> int:
        """The first place from `start` on where a needle can begin. (For speed: most text contains none.)"""
        match = self._begins.search(text, start)
        end = match.start() if match else len(text)
        if self._channel == TEXT and not text[start:end].isspace() and end > start:
            self._solid += end - start
            if self._head:
                self._head.miss()
        return end

    def _hit(self, char: str) -> Matcher | Head | _Switch | None:
        """The needle that ends with this character, the longest where there are several."""
        if self._channel == TEXT and not char.isspace():
            self._solid += 1
        if char == parts.CONTROL:
            self._control = True
            for stop in self._stops:
                stop.restart()
        hits = [needle for needle in self._active() if needle.feed(char)]
        if char == parts.CONTROL_END:
            self._control = False
        hits = [needle for needle in hits if not isinstance(needle, _Switch) or self._opens(needle)]
        return max(hits, key=lambda needle: needle.length) if hits else None

    def _opens(self, switch: _Switch) -> bool:
        """May the switch take effect? Thoughts begin only before the answer."""
        if switch.origin != TEXT or self._solid == sum(not char.isspace() for char in switch.matcher.needle):
            return True
        switch.matcher.restart()
        return False

    def _active_switches(self) -> list[_Switch]:
        return [switch for switch in self._switches if switch.origin in (None, self._channel)]

    def _active(self) -> list[Matcher | Head | _Switch]:
        active: list[Matcher | Head | _Switch] = [*self._active_switches(), *([] if self._control else self._stops)]
        if self.trigger and not self.inside:
            active.append(self.trigger)
        if self._head and self._channel == TEXT:
            active.append(self._head)
        return active

    def _switch(self, switch: _Switch) -> None:
        self._thought = self._thought or self.inside
        self._channel, self._solid, self._fresh, self._white = switch.to, 0, True, ""
        for needle in (*self._switches, self.trigger, self._head):
            if needle is not None:
                needle.restart()

    def _call(self, text: str) -> None:
        self.rest += text
        if self._calls is not None:
            self._out(self._calls.feed(text))

    def _show(self, text: str) -> None:
        """Show text in the current part of the answer."""
        text = parts.cleaned(text)
        if self._channel == HIDDEN or not text:
            return
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        if self.inside and text:
            text = self._white + text
            solid = text.rstrip()
            text, self._white = solid, text[len(solid) :]
        if text and self._channel != self._shown_as:
            self._shown_as = self._channel
            text = (parts.REASONING if self.inside else parts.TEXT) + text
        self._out(text)

    def _out(self, text: str) -> None:
        if text:
            self._parts.append(text)


class _Switch:
    """A mark after which another part of the answer comes. `origin`: the part in which it counts; None: in any."""

    __slots__ = ("matcher", "origin", "to")

    def __init__(self, matcher: Matcher, origin: int | None, to: int) -> None:
        self.matcher, self.origin, self.to = matcher, origin, to

    @property
    def matched(self) -> int:
        return self.matcher.matched

    @property
    def length(self) -> int:
        return len(self.matcher.needle)

    def feed(self, char: str) -> bool:
        return self.matcher.feed(char)

    def restart(self) -> None:
        self.matcher.restart()


class Head:
    """Finds one of some JSON beginnings at the start of a text, with blanks between its parts as grammars allow them.
    `heads`: these beginnings without blanks, for instance `{"name":"f","parameters":`."""

    __slots__ = ("_dead", "_heads", "_solid", "_text", "_white", "matched")

    def __init__(self, heads: Iterable[str]) -> None:
        self._heads = sorted(heads)
        self.restart()

    def restart(self) -> None:
        self._text = self._solid = self._white = ""
        self._dead = False
        self.matched = 0

    def state(self) -> tuple[str, str, str, bool]:
        return self._text, self._solid, self._white, self._dead

    def restore(self, state: tuple[str, str, str, bool]) -> None:
        self._text, self._solid, self._white, self._dead = state
        self.matched = 0 if self._dead else len(self._text)

    @property
    def length(self) -> int:
        return len(self._text)

    def miss(self) -> None:
        """The text begins with something else."""
        self._dead = True
        self.matched = 0

    def feed(self, char: str) -> bool:
        if self._dead or (not self._text and char.isspace()):
            return False
        self._text += char
        if char.isspace():
            self._white += char
            self._dead = not _BLANKS.fullmatch(self._white) or self._solid.count('"') % 2 == 1
        else:
            self._solid, self._white = self._solid + char, ""
            at = bisect_left(self._heads, self._solid)
            self._dead = at == len(self._heads) or not self._heads[at].startswith(self._solid)
        self.matched = 0 if self._dead else len(self._text)
        return not self._dead and not self._white and self._heads[at] == self._solid


_BLANKS = re.compile(r" |\n[ \t]{0,20}")
