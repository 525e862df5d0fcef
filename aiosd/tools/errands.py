"""Errands: system calls that the kernel makes for a call of a tool, in the name of that call's agent.

    errand: a generator of plans (`libaios.plan.Steps`); each plan is sent to the kernel and gets its reply from there

The kernel makes them with the rights of the agent whose call is under way, and drops them when that call is over. When
the kernel has died, the next one gets the open errands again, under their numbers, as soon as it knows the call again;
system calls that take effect once are then not done twice.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from aiosd.ipc import link
from libaios import wire
from libaios.plan import Plan, Steps, one_by_one

OnFinished = Callable[[Any, OSError | None], None]


@dataclass(slots=True)
class _Errand:
    steps: Generator[Plan[Any], Any, Any]
    finished: OnFinished
    plan: Plan[Any] | None = None  # the plan that was sent to the kernel,
    number: int = 0  # … under this number


class Errands:
    """All open errands. `send`: sends a message to the kernel."""

    def __init__(self, send: Callable[[link.FromService], None]) -> None:
        self._send = send
        self._open: dict[link.CallKey, _Errand] = {}
        self._keys: dict[int, link.CallKey] = {}  # by number
        # A toolbox that is forked again uses higher numbers than the last one, whose replies the kernel may still have.
        self._numbers = itertools.count(time.monotonic_ns())

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def begin(self, key: link.CallKey, steps: Steps[Any], finished: OnFinished) -> None:
        """Run these steps for a call. `finished` gets the result, or the error, unless the call is cancelled before."""
        errand = self._open[key] = _Errand(one_by_one(steps), finished)
        self._go_on(key, lambda: next(errand.steps))

    def replied(self, message: link.ErrandDone) -> None:
        key = self._keys.pop(message.number, None)
        if key is None:
            return  # the errand was cancelled
        errand = self._open[key]
        assert errand.plan is not None
        reply = msgspec.msgpack.decode(message.reply, type=wire.Reply)
        if reply.errno:
            text = msgspec.msgpack.decode(reply.body, type=wire.Failure).message
            error = wire.error(reply.errno, text)
            self._go_on(key, lambda: errand.steps.throw(error))
            return
        try:
            body = errand.plan.finish(msgspec.msgpack.decode(reply.body, type=errand.plan.body))
        except OSError as err:
            failed = err
            self._go_on(key, lambda: errand.steps.throw(failed))
        else:
            self._go_on(key, lambda: errand.steps.send(body))

    def again(self, key: link.CallKey) -> None:
        """A new kernel knows this call now."""
        errand = self._open.get(key)
        if errand is not None and errand.plan is not None:
            self._ask(key, errand, again=True)

    def cancel(self, key: link.CallKey) -> None:
        """Drop the errand of a call that was cancelled. The kernel has dropped its part already."""
        errand = self._open.pop(key, None)
        if errand is not None:
            self._keys.pop(errand.number, None)
            with contextlib.suppress(Exception):  # errors of a tool at its end: no call waits for it any more
                errand.steps.close()

    def _go_on(self, key: link.CallKey, advance: Callable[[], Plan[Any]]) -> None:
        errand = self._open[key]
        try:
            errand.plan = advance()
        except StopIteration as end:
            self._finish(key, end.value, None)
        except OSError as err:
            self._finish(key, None, err)
        except ValueError as err:
            self._finish(key, None, wire.error(errno.EINVAL, str(err)))
        else:
            errand.number = next(self._numbers)
            self._keys[errand.number] = key
            self._ask(key, errand, again=False)

    def _ask(self, key: link.CallKey, errand: _Errand, again: bool) -> None:
        assert errand.plan is not None
        args = Raw(wire.encode(errand.plan.args))
        self._send(link.Errand(key, errand.number, errand.plan.sys, args, again))

    def _finish(self, key: link.CallKey, result: Any, error: OSError | None) -> None:
        errand = self._open.pop(key)
        errand.finished(result, error)
