"""The interface between a core's process (`core.py`) and its backend, the part that makes the text.

    kernel ══channel══ Line ── CoreProcess ── Backend ── llama.cpp in this process (`local.py`), or anything else

A backend is named in its `ModelSpec` as `module:function`, and that function is an `OpenBackend`. Nothing on this side
of the interface imports llama.cpp, so only the backend decides what is loaded into its process.

How a backend must handle each message of the kernel (`link` has their fields):

    Submit      one `Step` that has the call among `started`, deltas in any number, then one `GenerationDone`; or one
                `Failed`, with `elsewhere` if another model may be able to serve the call. With `others` the call fails
                rather than wait. If the backend has the key already, the generation goes on, and the backend sends
                again what comes after `request.given`. When `budget` tokens have been charged the generation ends,
                with the reason "limit".
    Ask         one `Answered` or `Failed` (`Line.answer`, `Line.refuse`)
    CancelCall  nothing more about this call, and whatever it holds is free
    Park        while it is in force nothing is generated for this peer; answered with `Parked` if it has a number
    ParkCall    the same for one call, without an answer
    Keep        the calls of all other peers are cancelled; parked peers are forgotten, the kernel names them anew
    PeerGone, Renice, Schedule   hints: a backend that cannot use them ignores them

The kernel does not interpret what a generation has given out: it sends it back as `request.given`, tokens or text as in
the deltas, when the call must go on in a new core. It charges the `charged` of the deltas, and at the end `usage` and
the last `charged`. If calls of a backend would wait long for a reason of its own, it reports that (`Health`), and when
it is over: routes skip it meanwhile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiosd.errors import Bug
from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.spec import ModelSpec

#: The messages that a backend takes. `GetStats` and `Quit` are the process's own.
MESSAGES = frozenset(
    {
        link.Submit,
        link.Ask,
        link.CancelCall,
        link.Park,
        link.ParkCall,
        link.Keep,
        link.PeerGone,
        link.Renice,
        link.Schedule,
    }
)

MessageTable = Mapping[type, Callable[[Any], None]]


class Backend(Protocol):
    @property
    def info(self) -> dict[str, Any]:
        """The fields of `wire.ModelInfo` without name and default."""

    @property
    def table(self) -> MessageTable:
        """One function for each of MESSAGES. None of them waits."""

    @property
    def has_work(self) -> bool:
        """Would a step do anything now? If not, the process sleeps."""

    def step(self) -> None:
        """Do a part of the work, and send its results. Called once in each round of the loop, also without work;
        messages are handled between two steps, so one step does not take long."""

    def fds(self) -> Sequence[int]:
        """Descriptors that also end the sleep when they can be read."""

    def stats(self) -> dict[str, Any]:
        """Figures for `aiosd status`. `slots` (total, free, used) where there are any."""

    def close(self) -> None:
        """The process ends."""


#: Makes the backend of a model, and reports by `Line.progress` if that takes long. Raises AiosdError with one line.
OpenBackend = Callable[[ModelSpec, Line], Backend]


def opened(spec: ModelSpec, line: Line) -> Backend:
    """The backend that the spec names."""
    module, _, function = spec.backend.partition(":")
    make: OpenBackend = getattr(importlib.import_module(module), function)
    backend = make(spec, line)
    missing = MESSAGES - set(backend.table)
    if missing:
        raise Bug(f"{spec.backend}: no function for {', '.join(sorted(kind.__name__ for kind in missing))}")
    return backend
