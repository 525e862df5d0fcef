"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence

from aiosd.llm.policy.contract import BasePolicy, E


class Fifo(BasePolicy):
    """Promise: calls get slots in the order of arrival, without exception, and keep them to their end. So no call
    waits for one that came after it, and the longest wait is that for the slots of those before it: a crowd of long
    calls keeps a short one waiting for as long as they like."""

    name = "fifo"

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        return []

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        return sorted(waiting, key=lambda call: call.order)[:free] if free > 0 else []

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=lambda call: call.order)
