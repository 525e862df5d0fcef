"""A service for tests only: a struct, three rows, a function. `boot` runs a system that has it.

Each call records in the file `begun` that it has begun, sends a part of its answer, and goes on when the file `gate`
exists. Both files lie in the folder named by its argument.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from aiosd import config
from aiosd.init import guardian
from aiosd.ipc import link
from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.service import Server, ServiceSpec
from libaios import wire
from libaios.channel import Channel
from libaios.home import Home
from libaios.wire import Again, Row

REPEAT, ONCE, NEVER, ECHO, CRASH, NOWHERE = range(900, 906)


class Work(Struct, array_like=True, frozen=True):
    folder: str


class Text(Struct, array_like=True, frozen=True):
    text: str


ROWS = (
    Row(REPEAT, Work, str, by="toy", again=Again.REPEAT, piece=str),
    Row(ONCE, Work, str, by="toy", again=Again.ONCE, piece=str),
    Row(NEVER, Work, str, by="toy", again=Again.NEVER, piece=str),
    Row(ECHO, Text, list[Any], by="toy"),
    Row(CRASH, Text, by="toy"),
    Row(NOWHERE, Text, by="storeroom"),
)
TOY = ServiceSpec("toy", kind="toy", entry="tests.toy:main")


def work(ask: link.Ask, args: Work) -> Iterator[str]:
    folder = Path(args.folder)
    effect = folder / f"effect-{ask.key[0]}-{ask.key[1]}"
    with open(folder / "begun", "a") as file:
        file.write(f"{ask.sys}\n")
    if ask.sys == ONCE and effect.exists():  # as a memo in the transaction that has the effect
        return "done before"
    effect.touch()
    yield "begun"
    while not (folder / "gate").exists():
        yield "…"
    return "done"


def echo(ask: link.Ask, args: Text) -> list[Any]:
    if args.text == "raise":
        raise FileNotFoundError(2, "there is none")
    if args.text == "bug":
        raise ZeroDivisionError
    return [args.text, ask.caller.pid, ask.caller.group, ask.caller.name, ask.caller.named]


def crash(ask: link.Ask, args: Text) -> None:
    import os

    os._exit(3)


def main(channel: Channel, argument: object, rounds: Rounds) -> int:
    return Server(channel, {REPEAT: work, ONCE: work, NEVER: work, ECHO: echo, CRASH: crash}).run(rounds)


wire.add(*ROWS)


def boot() -> None:
    settings = config.load({"threads": 1}, Home())
    sys.exit(guardian.main(dataclasses.replace(settings, services=(TOY,))))
