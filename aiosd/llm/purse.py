"""How much calls of a core may still use of the budgets that they share, so that together they do not exceed one.

The kernel counts tokens when they are given out, which is too late for that: each of twenty calls could be a step
ahead. So tokens are paid for here before they are computed. A purse stands for one budget. It is filled with the amount
that the kernel reports as left; while calls of this core use it the core's own count is newer, since its last tokens
are still on their way to the kernel. Pure.

    invariant: paid for ≥ computed, and nothing is paid for that is not in the purse
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from aiosd.ipc.link import CallKey, PurseShare

#: An unused purse is kept for this time (s): the kernel may not have read the last usage yet.
KEEP_S = 5.0


@dataclass(slots=True, eq=False)
class Purse:
    """`left`: tokens; `room`: tokens that its calls may hold at a time; None: without limit."""

    left: int | None
    room: int | None
    users: set[CallKey] = field(default_factory=set)
    unused_since: float = 0.0


@dataclass(slots=True, eq=False)
class CallAccount:
    """The tokens that one call has paid for, and those that it holds."""

    key: CallKey
    purses: Sequence[Purse]
    paid: int = 0
    held: int = 0

    def pay(self, tokens: int, held: int) -> str:
        """Pay for `tokens` and hold `held` more, or do neither and return the kind of budget that is too small."""
        for purse in self.purses:
            if purse.left is not None and purse.left < tokens:
                return "tokens"
            if purse.room is not None and purse.room < held:
                return "context"
        self._change(tokens, held)
        return ""

    def give_back(self, tokens: int) -> None:
        """Give back tokens that were paid for and then cost nothing."""
        self._change(-tokens, 0)

    def let_go(self) -> None:
        """The call holds no tokens for the time being."""
        self._change(0, -self.held)

    def close(self, used: int) -> None:
        """The call is over, and this many tokens of it are charged."""
        self._change(used - self.paid, -self.held)

    def _change(self, tokens: int, held: int) -> None:
        self.paid += tokens
        self.held += held
        for purse in self.purses:
            if purse.left is not None:
                purse.left -= tokens
            if purse.room is not None:
                purse.room -= held


class Purses:
    def __init__(self) -> None:
        self._by_owner: dict[int, Purse] = {}

    def open(self, key: CallKey, shares: Iterable[PurseShare], now: float) -> CallAccount | None:
        """The account of a call that shares these budgets; None: it shares none."""
        found = [self._purse(share, now) for share in shares]
        for purse in found:
            purse.users.add(key)
        return CallAccount(key, found) if found else None

    def close(self, account: CallAccount, used: int, now: float) -> None:
        account.close(used)
        for purse in account.purses:
            purse.users.discard(account.key)
            if not purse.users:
                purse.unused_since = now

    def spend(self, key: CallKey, shares: Iterable[PurseShare], tokens: int, now: float) -> None:
        """Pay for a call that is computed at once. Raises OSError (EDQUOT) when too little is left."""
        account = self.open(key, shares, now)
        if account is not None:
            short = account.pay(tokens, 0)
            left = min(purse.left for purse in account.purses if purse.left is not None) if short else 0
            self.close(account, 0 if short else tokens, now)
            if short:
                raise OSError(errno.EDQUOT, f"{tokens} tokens, of which the token budget has {left} left")

    def _purse(self, share: PurseShare, now: float) -> Purse:
        purse = self._by_owner.get(share.owner)
        if purse is not None and not purse.users and now - purse.unused_since > KEEP_S:
            purse = None
        if purse is None:
            self._drop_old(now)
            purse = self._by_owner[share.owner] = Purse(share.left, share.context)
        elif purse.left is not None and share.left is not None:
            purse.left = min(purse.left, share.left)
        return purse

    def _drop_old(self, now: float) -> None:
        old = [owner for owner, one in self._by_owner.items() if not one.users and now - one.unused_since > KEEP_S]
        for owner in old:
            del self._by_owner[owner]
