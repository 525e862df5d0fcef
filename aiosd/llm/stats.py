"""Counts and times of the engine: cheap enough for every step, readable at any time.

`busy_since` is the heartbeat: the clock time at which the current step began, 0.0 between steps. The watcher of the
core takes a long step for a hang only if it takes far longer than the longest step so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

#: Tokens per second are averaged over this many seconds.
WINDOW = 10.0

_SMOOTH = 0.1


class EngineMeter:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.busy_since = 0.0
        self.steps = 0
        self.generated = 0  # tokens, since the start
        self.computed = 0  # prompt tokens computed
        self.cached = 0  # prompt tokens found in the cache
        self.calls = 0  # finished
        self.preemptions = 0
        self.step_s = 0.0  # smoothed
        self.decode_s = 0.0  # what was not for prompts in the last step that generated
        self._prompts_s = 0.0  # for prompts in this step
        self.longest_step_s = 0.0
        self._prefill_rate = 0.0  # tokens per second, smoothed
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])

    def begin(self) -> None:
        self.busy_since = self._clock()
        self._prompts_s = 0.0

    def end(self, generated: int) -> None:
        now = self._clock()
        took = now - self.busy_since
        self.busy_since = 0.0
        self.steps += 1
        self.generated += generated
        self.step_s += _SMOOTH * (took - self.step_s)
        if generated:
            self.decode_s = took - self._prompts_s
        if took > self.longest_step_s:
            self.longest_step_s = took
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.generated))
            while len(self._marks) > WINDOW + 1:
                self._marks.popleft()

    def prefilled(self, tokens: int, seconds: float) -> None:
        self.computed += tokens
        self._prompts_s += seconds
        if seconds > 0 and tokens >= 16:  # the rate of a few tokens does not predict that of many
            rate = tokens / seconds
            self._prefill_rate += (0.3 if self._prefill_rate else 1.0) * (rate - self._prefill_rate)

    def expect(self, rate: float) -> None:
        """Tokens of prompts per second, as measured before the first one."""
        self._prefill_rate = rate

    def tokens_in(self, seconds: float, least: int, unknown: int = 128) -> int:
        """How many prompt tokens are computed in `seconds`, by the rate so far."""
        return max(least, int(self._prefill_rate * seconds)) if self._prefill_rate else unknown

    def prompt_token_s(self) -> float:
        """Seconds for a token of a prompt; 0: none was computed yet."""
        return 1 / self._prefill_rate if self._prefill_rate else 0.0

    def stats(self) -> dict[str, Any]:
        now = self._clock()
        # Without a recent mark nothing was generated lately: a step that ends a second after a mark makes another.
        marks = [mark for mark in self._marks if now - mark[0] <= WINDOW + 1] or [(now, self.generated)]
        first, count = marks[0]
        return {
            "steps": self.steps,
            "calls_finished": self.calls,
            "preemptions": self.preemptions,
            "tokens_generated": self.generated,
            "tokens_prefilled": self.computed,
            "tokens_cached": self.cached,
            "tokens_per_s": round((self.generated - count) / max(now - first, 1e-9), 1),
            "prefill_tokens_per_s": round(self._prefill_rate, 1),
            "step_s": self.step_s,
            "longest_step_s": self.longest_step_s,
            "busy_s": now - self.busy_since if self.busy_since else 0.0,
        }
