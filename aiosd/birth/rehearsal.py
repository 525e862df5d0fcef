"""The first calls of an agent's life, made once in the supervisor, before any agent is forked (`warm_up`).

When code runs for the first time, the interpreter specialises it, fills caches of attributes and types, and builds
decoders. Otherwise every agent would do that again, and copy pages that all agents share. So it is done here, with a
kernel in the same process that sends empty replies. It saves each agent a few milliseconds and a good part of its
memory (benchmarks/spawn.py measures both).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import msgpack

import libaios as aios
from aiosd.birth import agent as birth
from aiosd.birth import confinement, end, fork, frames, heap, layout, modules, program, report, title
from aiosd.birth.agent import environment_of, with_bytes
from aiosd.ipc import letter
from aiosd.ipc.letter import Letter
from libaios import agent, wire
from libaios.channel import Channel, Side, make_channel
from libaios.connection import Connection
from libaios.wire import Sys

ROUNDS = 20  # the interpreter specialises code that has run a few times

#: Modules whose functions run once in the life of an agent, and cannot be rehearsed in this process.
_ONCE = frozenset(one.__name__ for one in (birth, confinement, end, fork, frames, letter, program, report, title))

_GENERATED = wire.Generated("x", [1], "stop", wire.Usage(), [])
ANSWERS: dict[int, Any] = {
    Sys.GETPID: 1,
    Sys.GETPPID: 1,
    Sys.NICE: 0,
    Sys.SPAWN: wire.Spawned(1),
    Sys.WAIT: wire.Waited(1, 0),
    Sys.RECV: wire.Received(1, wire.raw("x")),
    Sys.GENERATE: _GENERATED,
    Sys.TOKENIZE: [1],
}
_decode = msgpack.Decoder(wire.Generate).decode


class _Stage(agent.AgentTransport):
    """An agent's transport whose other end is in this process: before it sleeps, it gets replies to its requests."""

    def __init__(self) -> None:
        memfd, kernel_bell, agent_bell = make_channel()
        super().__init__(memfd, agent_bell)
        self._kernel = Channel(os.dup(memfd), kernel_bell, Side.KERNEL)

    def wait(self, timeout: float | None = None, also: Sequence[int] = ()) -> bool:
        self._answer()
        return super().wait(timeout, also)

    def _answer(self) -> None:
        for payload in self._kernel.receive():
            request = wire.decode_request(payload)
            if request.sys == Sys.GENERATE and _decode(request.args).stream:
                piece = wire.Reply(request.id, 0, True, 0, wire.raw(wire.Piece("x", [1])))
                self._kernel.send(wire.encode(piece))
            self._kernel.send(wire.encode(wire.Reply(request.id, body=wire.raw(ANSWERS.get(request.sys)))))

    def leave(self) -> None:
        self._kernel.close()


def warm_up(hides: bool = True) -> None:
    """Run an agent's code until that changes nothing in memory any more; then make sure that neither the garbage
    collector nor new objects change these pages. `hides`: agents find the modules of a fresh interpreter."""
    heap.fill_holes()  # so that gathered code does not go into holes
    layout.gather(_first_steps, _ONCE)
    layout.forget_attributes()
    rehearse()
    _rehearse_birth()
    if hides:
        modules.hide()
        _rehearse_imports()
    gc.collect()
    heap.fill_holes()
    gc.freeze()


def _first_steps() -> None:
    """Run what nearly every agent does, and no more."""
    _connected(_first_calls)
    _rehearse_birth()


def _first_calls() -> None:
    aios.proc.getpid(), aios.proc.nice()
    aios.msg.send(1, 0)
    aios.msg.recv()


def rehearse() -> None:
    """Run an agent's first calls. Leaves nothing behind but warm code."""
    for _ in range(ROUNDS):
        _connected(_play)


def _connected(calls: Callable[[], None]) -> None:
    """Run these calls over a connection of their own."""
    stage = _Stage()
    agent._connection = connection = Connection(stage)
    try:
        calls()
    finally:
        agent._connection = None
        connection.close()
        stage.leave()


def _rehearse_birth() -> None:
    """Run what a child does before its program runs, except steps that would change this process."""
    sealed = letter.write(Letter("file", __file__, ["x"], {"HOME": "/", "LANG": "x"}, "/"))
    for _ in range(ROUNDS):
        content = with_bytes(letter.read(sealed))
        program.find(content)
        environment_of(content, 1, "/", -1, -1)
        confinement.rehearse()
        title.show(*title.inherited())
    os.close(sealed)


def _rehearse_imports() -> None:
    """Import hidden modules as a script would. They are hidden afterwards."""
    folder = os.path.dirname(__file__)  # any folder that the supervisor does not import from
    for _ in range(ROUNDS):
        sys.path.insert(0, folder)
        exec("import signal, libaios, libaios.proc")
        del sys.path[0]
        sys.path_importer_cache.pop(folder, None)
        modules.hide()


def _play() -> None:
    aios.proc.getpid()
    aios.proc.getppid()
    aios.proc.nice()
    aios.proc.wait(aios.proc.spawn("x.py", cwd="/", detached=True))
    aios.msg.send(1, {"x": [1, "y", None, 0.5]})
    aios.msg.recv(timeout=1.0)
    messages = [{"role": "user", "content": "x"}]
    aios.llm.chat(messages, max_tokens=1, temperature=0.0)
    for _ in aios.llm.chat(messages, stream=True):
        pass
    aios.llm.tokenize("x")
    exec(compile("import libaios\nlibaios.proc.getppid()", "x.py", "exec", dont_inherit=True), {})
    os.path.realpath("/usr/lib"), os.path.abspath("x.py"), os.fsencode("x")
