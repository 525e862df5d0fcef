"""A backend without a model and tokens: in each step it writes one word for every call. `boot` runs a system with one
core that uses it.

The last message decides the text: "count 5" gives "0 1 2 3 4 "; "count 5 die 3" ends the process before word 3, once;
"modules" gives the heavy modules that the process has loaded.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiosd import config
from aiosd.init import guardian
from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.home import Home

HEAVY = ("llama_cpp", "numpy", "jinja2", "aiosd.llm.engine")
PROMPT = 5  # tokens that each prompt costs; the kernel learns this at the end


@dataclass
class Writing:
    submit: link.Submit
    words: list[str]
    done: int = 0  # words
    given: int = 0  # characters
    started: bool = False


class Toy:
    def __init__(self, spec: ModelSpec, line: Line) -> None:
        self.line = line
        self.info: dict[str, Any] = {"description": "a toy", "chat": True}
        self.calls: dict[link.CallKey, Writing] = {}
        self.parked: set[int] = set()
        ignored = dict.fromkeys((link.ParkCall, link.PeerGone, link.Renice, link.Schedule), lambda message: None)
        self.table: dict[type, Any] = {
            link.Submit: self.submit,
            link.Ask: lambda ask: line.refuse(ask.key, wire.error(errno.ENOSYS, "a toy does not do this")),
            link.CancelCall: lambda message: self.calls.pop(message.key, None),
            link.Park: self.park,
            link.Keep: self.keep,
            **ignored,
        }

    def submit(self, message: link.Submit) -> None:
        last = (message.request.messages or [{}])[-1].get("content", "")
        given = message.request.given
        assert isinstance(given, str) or not given
        words = count(last, may_die=not given) if last.startswith("count") else [loaded()]
        self.calls[message.key] = Writing(message, words, len(str(given or "").split()), len(given))

    def park(self, message: link.Park) -> None:
        (self.parked.add if message.parked else self.parked.discard)(message.peer)
        if message.number:
            self.line.send(link.Parked(message.number))

    def keep(self, message: link.Keep) -> None:
        self.calls = {key: writing for key, writing in self.calls.items() if key[0] in message.peers}

    def runnable(self) -> list[Writing]:
        return [writing for key, writing in self.calls.items() if key[0] not in self.parked]

    @property
    def has_work(self) -> bool:
        return bool(self.runnable())

    def step(self) -> None:
        for writing in self.runnable():
            key = writing.submit.key
            started = [] if writing.started else [link.Started(key, 0, 0)]
            writing.started = True
            over = writing.done == len(writing.words)
            if over or writing.done == writing.submit.budget:
                del self.calls[key]
                usage = wire.Usage(PROMPT if over else 1, 1, writing.done)
                self.line.send(
                    link.GenerationDone(key, writing.given, [], "", "stop" if over else "limit", usage, charged=0)
                )
                continue
            word = writing.words[writing.done]
            if word == "die ":
                os._exit(3)
            self.line.send(link.Step([link.Delta(key, writing.given, [], word, charged=1)], started))
            writing.done, writing.given = writing.done + 1, writing.given + len(word)

    def fds(self) -> Sequence[int]:
        return []

    def stats(self) -> dict[str, Any]:
        return {"slots": {"total": 9, "free": 9 - len(self.calls), "used": len(self.calls)}}

    def close(self) -> None:
        self.calls.clear()


def count(text: str, may_die: bool) -> list[str]:
    _, number, *death = text.split()
    words = [f"{i} " for i in range(int(number))]
    if death and may_die:
        words[int(death[1])] = "die "
    return words


def loaded() -> str:
    return ",".join(name for name in HEAVY if name in sys.modules) or "none"


def boot() -> None:
    import dataclasses

    settings = config.load({}, Home())
    models = (ModelSpec("toy", backend="tests.toybackend:Toy"),)
    sys.exit(guardian.main(dataclasses.replace(settings, models=models)))
