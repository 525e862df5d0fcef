"""From the bytes of tokens to the characters that are shown.

Three things keep bytes from being shown at once: a character whose bytes are not all there, the beginning of
what may become a stop string, the beginning of what may become a tool call. `TextStream` holds such a tail
back. What it has let out after n tokens depends on those tokens alone, not on how they were grouped into
pieces: so a generation that is taken up again from its tokens goes on exactly where its reader stands.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

_utf8 = codecs.getincrementaldecoder("utf-8")


class Matcher:
    """Finds one string in a stream, character by character (Knuth, Morris, Pratt): constant memory, and a long
    stop string full of repetitions costs no more than any other."""

    __slots__ = ("_fail", "matched", "needle")

    def __init__(self, needle: str) -> None:
        self.needle = needle
        self.matched = 0  # length of the longest head of the needle that the stream ends with
        self._fail = [0] * len(needle)
        k = 0
        for i in range(1, len(needle)):
            while k and needle[i] != needle[k]:
                k = self._fail[k - 1]
            k += needle[i] == needle[k]
            self._fail[i] = k

    def feed(self, char: str) -> bool:
        """Does the stream end with the needle now? Not to be fed again after it did, unless `restart`ed."""
        needle, k = self.needle, self.matched
        while k and char != needle[k]:
            k = self._fail[k - 1]
        self.matched = k = k + 1 if char == needle[k] else k
        return k == len(needle)

    def restart(self) -> None:
        """Forget what was fed."""
        self.matched = 0


class TextStream:
    """The text of one generation: `feed` takes bytes, `take` gives the characters that may be shown since.

    After a stop string (`stopped`) or the trigger of a tool call (`triggered`) nothing more is shown; what
    follows the trigger gathers in `rest`. The first needle to be complete counts; of two that are complete
    with the same character, the longer one.

    `aside`: what a thinking model writes before and after its thoughts. There no tool call begins, whatever it
    quotes. `inside`: the text begins in the middle of one.
    """

    __slots__ = (
        "_aside", "_decoder", "_held", "_needles", "_parts", "_taken",
        "inside", "rest", "stopped", "trigger", "triggered",
    )  # fmt: skip

    def __init__(
        self,
        stops: Iterable[str] = (),
        trigger: str | None = None,
        aside: tuple[str, str] | None = None,
        inside: bool = False,
    ) -> None:
        self._decoder = _utf8("replace")
        self.trigger = Matcher(trigger) if trigger else None
        self._needles = [Matcher(stop) for stop in set(stops)]
        if self.trigger:
            self._needles.append(self.trigger)
        self._needles.sort(key=lambda matcher: len(matcher.needle), reverse=True)
        self._aside = (Matcher(aside[0]), Matcher(aside[1])) if aside and trigger else None
        self.inside = inside and self._aside is not None  # the thoughts of the model
        self._held = ""  # decoded, not shown: what some needle has matched so far
        self._parts: list[str] = []  # shown
        self._taken = 0  # parts that `take` has given out
        self.rest = ""
        self.stopped = False
        self.triggered = False

    def feed(self, piece: bytes) -> None:
        self._add(self._decoder.decode(piece))

    def finish(self) -> None:
        """The end: half a character becomes U+FFFD, and what was held back for a needle is shown."""
        self._add(self._decoder.decode(b"", True))
        if self._held and not self.stopped and not self.triggered:
            self._parts.append(self._held)
            self._held = ""

    def pull_trigger(self) -> None:
        """A tool call began without a trigger in the text (by a control token, or by how it starts)."""
        if self._held:
            self._parts.append(self._held)
            self._held = ""
        self.triggered = True

    def mark(self, control: str) -> None:
        """A control token, which is no text, may begin or end an aside too."""
        if self._aside is not None and control == self._aside[self.inside].needle:
            self._turn()

    def triggers(self, text: str) -> int:
        """Where in `text`, if it were fed now, the trigger would be complete: characters up to and with its end, 0
        if it would not. Changes nothing."""
        before = self.inside, [(matcher, matcher.matched) for matcher in (*self._needles, *(self._aside or ()))]
        first = next(((i, hits[0]) for i, char in enumerate(text, 1) if (hits := self._hits(char))), (0, None))
        self.inside = before[0]
        for matcher, matched in before[1]:
            matcher.matched = matched
        return first[0] if first[1] is self.trigger else 0

    def take(self) -> str:
        """What may be shown and was not yet taken."""
        new = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return new

    def skip(self, characters: int) -> None:
        """Let the next `take` begin after so many characters of the whole: for a reader who has those."""
        text = "".join(self._parts)
        self._parts = [text[:characters], text[characters:]]
        self._taken = 1

    @property
    def shown(self) -> int:
        """Characters let out so far, taken or not."""
        return sum(map(len, self._parts))

    def _add(self, text: str) -> None:
        if not text or self.stopped:
            return
        if self.triggered:
            self.rest += text
        elif self._needles:
            self._search(text)
        else:
            self._parts.append(text)

    def _search(self, text: str) -> None:
        buffer = self._held + text
        start = len(self._held)
        for end, char in enumerate(text, start + 1):
            hits = self._hits(char)
            if hits:
                self._held = ""
                self._parts.append(buffer[: end - len(hits[0].needle)])
                self.triggered = hits[0] is self.trigger
                self.stopped = not self.triggered
                if self.triggered:
                    self.rest = buffer[end:]
                return
        hold = max(needle.matched for needle in self._needles)  # (0 for a trigger within an aside)
        self._parts.append(buffer[: len(buffer) - hold])
        self._held = buffer[len(buffer) - hold :]

    def _hits(self, char: str) -> list[Matcher]:
        """The needles that end with this character, the longest first. Every needle sees every character, but the
        trigger sees none of an aside."""
        hits = [
            needle for needle in self._needles if not (self.inside and needle is self.trigger) and needle.feed(char)
        ]
        if self._aside is not None and self._aside[self.inside].feed(char):
            self._turn()
        return hits

    def _turn(self) -> None:
        self.inside = not self.inside
        assert self._aside is not None
        assert self.trigger is not None
        for matcher in (*self._aside, self.trigger):
            matcher.restart()
