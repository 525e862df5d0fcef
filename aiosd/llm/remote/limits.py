"""When a request may be sent to an endpoint, and the pauses after failures. Pure: all times are passed as `now`.

- `RateWindow` keeps a rate (requests or tokens in a minute) on this side, so that the endpoint need not refuse
  requests.
- `backoff` returns how long a call waits after its n-th failure, with jitter: calls that failed together come back
apart.
- `RateLimiter` is all of this for one endpoint.
- `Breaker` stops all requests to an endpoint that has failed `FAILURES` times in a row. After a pause one request is
  let through; if it fails, the pause doubles, and if it succeeds, all go on.
"""

from __future__ import annotations

import enum
import random
from collections import deque

MINUTE_S = 60.0
FIRST_S, MOST_S = 0.5, 30.0  # of back-off
LONGEST_RETRY_AFTER_S = 120.0  # longer pauses that an endpoint requests are cut to this
FAILURES = 5
PAUSE_S, LONGEST_PAUSE_S = 5.0, 120.0


class RateWindow:
    """At most `limit` units in any minute; 0: no limit. One use may be larger than that: it then goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._uses: deque[tuple[float, int]] = deque()
        self._sum = 0

    def wait(self, units: int, now: float) -> float:
        """Seconds until that many may be used; 0: now."""
        self._forget(now)
        if not self._limit:
            return 0.0
        over, until = self._sum + units - self._limit, now
        for at, used in self._uses:  # the oldest go first, until there is room
            if over <= 0:
                break
            over, until = over - used, at + MINUTE_S
        return max(until - now, 0.0)

    def use(self, units: int, now: float) -> None:
        """Count a use, or correct one by what it really was."""
        if self._limit:
            self._uses.append((now, units))
            self._sum += units

    def _forget(self, now: float) -> None:
        while self._uses and now - self._uses[0][0] >= MINUTE_S:
            self._sum -= self._uses.popleft()[1]


def backoff(failures: int, rng: random.Random) -> float:
    """Seconds after the n-th failure of a call (n from 1)."""
    return min(FIRST_S * 2.0 ** (failures - 1), MOST_S) * rng.uniform(0.5, 1.0)


class Circuit(enum.StrEnum):
    """The states of a circuit breaker: requests are sent; none are; one is sent to find out whether the endpoint
    answers again."""

    CLOSED = "closed"
    OPEN = "open"
    TRYING = "trying"


class Breaker:
    def __init__(self) -> None:
        self._failures = 0
        self._pause = PAUSE_S
        self._until = 0.0
        self._trying = False
        self.why = ""

    @property
    def circuit(self) -> Circuit:
        if self._failures < FAILURES:
            return Circuit.CLOSED
        return Circuit.TRYING if self._trying else Circuit.OPEN

    def wait(self, now: float) -> float:
        """Seconds until a request may be sent; 0: now. During a trial request no other may be sent."""
        if self._failures < FAILURES:
            return 0.0
        return 1.0 if self._trying else max(self._until - now, 0.0)

    def sent(self) -> bool:
        """A request is sent; is it the trial request?"""
        self._trying = self._failures >= FAILURES
        return self._trying

    def succeeded(self) -> None:
        """The endpoint answered, perhaps with a refusal of that one request."""
        self._failures, self._pause, self._trying, self.why = 0, PAUSE_S, False, ""

    def failed(self, why: str, now: float) -> None:
        if self._trying:
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        self._failures, self._trying, self.why = self._failures + 1, False, why
        if self._failures >= FAILURES:
            self._until = now + self._pause

    def given_up(self) -> None:
        """The trial request was cancelled: the state of the endpoint is still unknown."""
        self._trying = False


class RateLimiter:
    """Whether a request may be sent now: rates, the circuit breaker, and the rest that the endpoint has asked for."""

    def __init__(self, rpm: int, tpm: int) -> None:
        self.breaker = Breaker()
        self._requests, self._tokens = RateWindow(rpm), RateWindow(tpm)
        self._rest_until, self._rest_why = 0.0, ""

    def wait(self, tokens: int, now: float) -> float:
        """Seconds for which no request with a prompt of `tokens` tokens may be sent."""
        return max(
            self._rest_until - now,
            self.breaker.wait(now),
            self._requests.wait(1, now),
            self._tokens.wait(tokens, now),
            0.0,
        )

    def sent(self, tokens: int, now: float) -> bool:
        """A request is sent. Returns whether it is the trial request of the breaker."""
        self._requests.use(1, now)
        self._tokens.use(tokens, now)
        return self.breaker.sent()

    def used(self, tokens: int, now: float) -> None:
        """The request has used `tokens` more than were counted when it was sent."""
        self._tokens.use(max(tokens, 0), now)

    def rest(self, seconds: float, why: str, now: float) -> None:
        self._rest_until, self._rest_why = max(self._rest_until, now + seconds), why

    def trouble(self, now: float) -> str:
        """Why no request may be sent; "": one may be sent."""
        if self.breaker.wait(now):
            return f"it fails again and again: {self.breaker.why}"
        return self._rest_why if self._rest_until > now else "its rate is used up"
