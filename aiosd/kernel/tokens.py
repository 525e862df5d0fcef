"""Which agent a token of the gateway belongs to.

Each agent that shall find the gateway gets 256 random bits in its environment, in its letter (`aiosd.ipc.letter`). Only
the kernel makes tokens, and it keeps only their hashes. These are in the agents' records, so that a new kernel knows
them, too; so the supervisor, from which all agents are forked, never has more than hashes. A token is valid as long as
its agent lives. Tokens of a person's own programs are made by the person's command (`outside`).
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable

import msgspec

from aiosd.ipc import endpoint, link
from aiosd.ipc.endpoint import Endpoint
from aiosd.ipc.letter import Letter
from aiosd.kernel.proc import Proc
from aiosd.sandbox import hosts
from libaios import wire


class BearerTokens:
    """All tokens. `door`: where the gateway listens; None: there is no gateway, and no agent gets a token."""

    def __init__(self, door: Endpoint | None) -> None:
        self._door = door
        self._agents: dict[bytes, Proc] = {}  # by the hash of their token
        self.agent: Callable[[int], Proc | None] = lambda pid: None  # by its pid

    def give(
        self, spec: link.Fork, letter: Letter, parent: Proc | None, wanted: bool | None
    ) -> tuple[link.Fork, Letter]:
        """The same agent with a token, and with the variables that lead programs to the gateway. `wanted` None: only if
        its parent has one."""
        if wanted is None:
            wanted = parent is None or bool(parent.token)
        if self._door is None or not wanted:
            return spec, letter
        token = f"aios-{base64.urlsafe_b64encode(os.urandom(32)).rstrip(b'=').decode()}"
        env = endpoint.environment(letter.env, self._door, token)
        replace = msgspec.structs.replace
        return replace(spec, token=_hash(token)), replace(letter, env=env)

    @property
    def url(self) -> str:
        """The URL of the gateway; "": there is none."""
        return self._door.url if self._door is not None else ""

    def knows(self, token_hash: bytes) -> bool:
        return token_hash in self._agents

    def add(self, proc: Proc) -> None:
        if proc.token:
            self._agents[proc.token] = proc

    def forget(self, proc: Proc) -> None:
        self._agents.pop(proc.token, None)

    def bearer(self, token: str) -> Proc | None:
        """The agent of this token, or of this gate. None: there is none, or the agent is dead or waits to be started
        again. (Only the gateway may use this, and it takes no gates from programs.)"""
        if token.startswith(wire.GATE):
            return self._at_gate(token.removeprefix(wire.GATE))
        proc = self._agents.get(_hash(token))
        return proc if proc is not None and (proc.ospid or proc.outside) else None

    def _at_gate(self, pid: str) -> Proc | None:
        proc = self.agent(int(pid)) if pid.isascii() and pid.isdecimal() and len(pid) < 16 else None
        has_gates = proc is not None and proc.box is not None and hosts.are_named(proc.box.net)
        return proc if proc is not None and has_gates and proc.ospid else None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
