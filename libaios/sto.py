"""The storage manager: its names are here; the manager comes with a later release. All raise OSError(ENOSYS)."""

from __future__ import annotations

from typing import Any

from libaios.plan import Plan, syscall
from libaios.wire import NoArgs, Sys

__all__ = ["history", "list", "mount", "read", "remove", "rollback", "search", "share", "write"]


@syscall
def _call(*args: Any, **kwargs: Any) -> Plan[Any]:
    return Plan(Sys.STO, NoArgs())


write = read = list = history = rollback = share = remove = search = mount = _call
