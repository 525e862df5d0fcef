"""When an agent that has ended is started again: the policy behind `aios-run --restart`, and its waits.

    no               never (the default)
    on-failure[:N]   when its exit code was not 0 or a signal ended it; N times at most
    always[:N]       whatever its exit code was

The first restart comes after 0.1 s, each further one after twice the wait of the one before, up to 30 s. An agent that
has lived for 10 s is taken for healthy: waits and tries count from the beginning again.

There is no clock in here: the caller passes how long the agent lived, and waits for the time that it gets.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 30.0
HEALTHY_S = 10.0
MOST_TRIES = 1_000_000


class When(enum.Enum):
    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The policy of one agent. `tries`: restarts in a row; None: no limit."""

    when: When = When.NO
    tries: int | None = None

    def __str__(self) -> str:
        return self.when.value if self.tries is None else f"{self.when.value}:{self.tries}"


def parse(text: str) -> RestartPolicy:
    """`no`, `on-failure`, `on-failure:3`, `always`; ValueError with a sentence for anything else."""
    word, colon, count = text.partition(":")
    try:
        when = When(word.lower())
    except ValueError:
        raise ValueError(f"{text!r} is no restart policy (no, on-failure[:N] or always[:N])") from None
    if not colon:
        return RestartPolicy(when)
    if when is When.NO or not (count.isascii() and count.isdigit() and 1 <= int(count) <= MOST_TRIES):
        raise ValueError(
            f"{text!r} is no restart policy (after on-failure: or always: a number from 1 to {MOST_TRIES})"
        )
    return RestartPolicy(when, int(count))


@dataclass(slots=True)
class Restarts:
    """The restarts of one agent. Plain data, so that a record which survives its keeper can hold it."""

    policy: RestartPolicy
    in_row: int = 0  # restarts since the agent was last healthy
    total: int = 0

    def after(self, status: int, lived_s: float, meant: bool = False) -> float | None:
        """The agent has ended, with an exit code or -signal, after `lived_s` seconds. Returns how many seconds to wait
        before it is started again, or None when it is not. `meant`: this end was requested (by aios-kill, a budget, the
        stop of the system). Counts the restart."""
        if lived_s >= HEALTHY_S:
            self.in_row = 0
        if meant or not self._wanted(status) or self.exhausted:
            return None
        wait_s = FIRST_WAIT_S * 2.0 ** min(self.in_row, 62)
        self.in_row += 1
        self.total += 1
        return min(wait_s, LONGEST_WAIT_S)

    @property
    def exhausted(self) -> bool:
        """Whether all tries that the policy allows were used up in a row."""
        return self.policy.tries is not None and self.in_row >= self.policy.tries

    def _wanted(self, status: int) -> bool:
        return self.policy.when is When.ALWAYS or (self.policy.when is When.ON_FAILURE and status != 0)


def exit_in_words(status: int) -> str:
    """An exit status (as of os.waitstatus_to_exitcode) in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"signal {-status}"
