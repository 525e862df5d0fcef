"""Threads beside a loop.

Linux may refuse to start another one: the processes of agents count for the same limits (of the user, of a
container). Python raises RuntimeError then. Here that is an OSError with EAGAIN, as `os.fork` raises it, because it is
no bug, which would end the whole process: the work is done later or refused.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

T = TypeVar("T")


def start(run: Callable[[], object], name: str, daemon: bool = True) -> threading.Thread:
    """Start a thread. Raises OSError (EAGAIN)."""
    thread = threading.Thread(target=run, name=name, daemon=daemon)
    try:
        thread.start()
    except RuntimeError:
        raise none_left() from None
    return thread


def submit(executor: Executor, work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread of the executor, which starts one if necessary. Raises OSError (EAGAIN)."""
    try:
        return executor.submit(work)
    except RuntimeError:
        raise none_left() from None


class NoneLeft(BlockingIOError):
    """Linux starts no thread now. (EAGAIN has other reasons elsewhere.)"""


def none_left() -> NoneLeft:
    return NoneLeft(errno.EAGAIN, f"Linux starts no thread: {os.strerror(errno.EAGAIN)}")
