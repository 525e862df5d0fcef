"""The memory manager: its names are here, the manager comes with a later release. Every call raises OSError(ENOSYS)."""

from __future__ import annotations

from typing import Any

from libaios.plan import Plan, syscall
from libaios.wire import NoArgs, Sys

__all__ = ["add", "get", "remove", "search", "stats", "update"]


@syscall
def _call(*args: Any, **kwargs: Any) -> Plan[Any]:
    return Plan(Sys.MEM, NoArgs())


add = get = update = remove = search = stats = _call
