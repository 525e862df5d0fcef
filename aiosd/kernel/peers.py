"""All connections of each agent: its channel, and every client of the control socket that descends from it.

An agent's child may connect to the control socket by itself (a notebook's kernel, `aios-ps` in a script). It has the
agent's rights, shares its budget, and is stopped, counted and ended with it. So an operation on an agent's calls uses
this registry, never the agent's channel alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiosd.kernel.peer import AgentPeer, Call, ClientPeer, Peer
from aiosd.kernel.proc import Proc


class Peers:
    def __init__(self) -> None:
        self.channels: dict[int, AgentPeer] = {}  # by pid
        self.clients: dict[int, ClientPeer] = {}  # by id (negative), once they have sent their Hello
        self.others: list[Peer] = []  # those that act for services
        self._of_agent: dict[int, dict[ClientPeer, None]] = {}  # clients that descend from the agent of this pid

    def __iter__(self) -> Iterator[Peer]:
        yield from self.channels.values()
        yield from self.clients.values()
        yield from self.others

    def add(self, peer: Peer) -> None:
        if isinstance(peer, AgentPeer):
            self.channels[peer.id] = peer
        elif isinstance(peer, ClientPeer):
            self.clients[peer.id] = peer
            if peer.proc is not None:
                self._of_agent.setdefault(peer.proc.pid, {})[peer] = None

    def remove(self, peer: Peer) -> bool:
        """Remove a connection; whether it was there."""
        if isinstance(peer, AgentPeer):
            if self.channels.get(peer.id) is not peer:
                return False
            del self.channels[peer.id]
            return True
        if self.clients.get(peer.id) is not peer or not isinstance(peer, ClientPeer):
            return False
        del self.clients[peer.id]
        if peer.proc is not None:
            others = self._of_agent[peer.proc.pid]
            del others[peer]
            if not others:
                del self._of_agent[peer.proc.pid]
        return True

    def find(self, ident: int) -> Peer | None:
        return self.channels.get(ident) or self.clients.get(ident)

    def clients_of(self, proc: Proc) -> list[ClientPeer]:
        return list(self._of_agent.get(proc.pid, ()))

    def of(self, proc: Proc) -> list[Peer]:
        """Every connection of this agent."""
        channel = self.channels.get(proc.pid)
        return [*([channel] if channel is not None else []), *self._of_agent.get(proc.pid, ())]

    def calls_of(self, proc: Proc) -> list[Call]:
        """Every open call of this agent, over whatever connection."""
        return [call for peer in self.of(proc) for call in peer.calls.values()]
