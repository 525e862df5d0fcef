"""Shares by nice value and by group; an agent that has slept may run ahead.

Virtual token counters (VTC, OSDI 2024): an agent's `rank` grows with each token that it is given, more slowly the
greater its weight. The agent with the least rank comes first: to a slot, to the computation of its prompt, and, where
ranks have drifted apart, to the next step. Weights are those of Linux for nice values. One *virtual token* is one token
of an agent of nice 0.

- **Slots.** A waiting call gets the slot of a running one whose agent is ahead of it by more than a quantum (in tokens
  of the running one), or by anything at all once that has run for quantum.seconds. Of several calls of one agent the
  one that has had least comes first; each further call counts as two quanta behind the one before it, so that agents
  with one call do not wait for agents with ten.
- **Steps.** All calls that are ready are decoded together, because throughput grows with the batch: in a crowd of
equals
  no call is ever held out. Calls whose agents are ahead of the hindmost agent by more than a quantum are held out if
  they are at least half of the batch (for fewer it would not pay), and calls that are ahead by more than FAR quanta are
  held out in any case.
- **Newcomers** begin at the *line*: they are owed nothing for the time before they came, and have nothing to make up
  for. The line moves on by what the active agents are given on average, and is never ahead of the hindmost of them. An
  agent that comes back begins where it was, if that is further on than the line.
- **Sleepers.** An agent sleeps when it has no call for NAP_S and for an eighth of the time that it had one before. It
  earns an allowance for that (and has a small one when it comes for the first time): its rank begins that far before
  its line. So an agent that makes a small call now and then runs ahead of a crowd that generates without end, though it
  takes more than its share while it does. It passes only agents that have had more than a quantum since they last
  slept, so that short calls do not delay each other. Tokens given on an allowance are not counted. Allowances are for
  few: when more than the part FEW of the active agents have slept (a crowd in which all use tools, and pause
  meanwhile), all allowances are void. And they are rationed: when agents on allowances have kept others waiting for
  RATION_S at a stretch, or for half of the time, all are void until the ration has grown again.
- **Groups** with a share: the members of the group divide the weight of that number of agents of nice 0 among them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiosd.llm.policy.contract import PROMPT_WEIGHT, BasePolicy, E, Entry, Quantum

# fmt: off
#: Linux's sched_prio_to_weight, from nice -20 to 19: a step changes the share by a quarter.
WEIGHTS = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)
# fmt: on
NICE_0 = 1024

#: What an idle agent earns: virtual tokens a second, and at most.
ALLOWANCE_RATE, ALLOWANCE = 256.0, 512.0

#: Virtual tokens that an agent has when it comes for the first time: a person's first question must not wait for a
#: crowd either.
WELCOME = 128.0

#: An agent has slept when it was idle for NAP_S seconds and for the part NAP_PART of the time that it was active
#: before. Allowances count while at most the part FEW of the active agents have slept.
NAP_S, NAP_PART, FEW = 0.25, 1 / 8, 1 / 4

#: Seconds for which agents on allowance may keep others waiting, saved up one for one while they do not.
RATION_S = 4.0

#: A call that is ahead by this number of quanta is held out of steps even if that makes the batch hardly smaller.
FAR = 8

#: Idle agents are remembered with rank and allowance: this number of them, and for this number of seconds.
REMEMBER, REMEMBER_S = 4096, 3600.0


@dataclass(slots=True, eq=False)
class _FairAgent:
    peer: int
    weight: int = NICE_0
    group: _Group | None = None
    cost: float = 1.0  # virtual tokens that a token costs
    rank: float = 0.0
    line: float = 0.0  # while rank < line, it lives on its allowance
    calls: dict[int, Entry] = field(default_factory=dict)
    active_since: float = 0.0
    idle_since: float = 0.0

    def slept(self, now: float) -> bool:
        return now - self.idle_since >= max(NAP_S, NAP_PART * (self.idle_since - self.active_since))


@dataclass(slots=True, eq=False)
class _Group:
    """The active agents of a group with a share."""

    share: float
    members: dict[int, _FairAgent] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Quiet:
    """The state of the last check, in which all slots were taken and no running call had to give way to a waiting
    one."""

    waiting: int  # the number of waiting calls
    rank: float  # the least of their ranks
    gifts: bool  # is one on allowance among them?


class Fair(BasePolicy):
    """Promise: of two agents that have calls open all the time, neither is ever ahead of the other by more than
    `reach` of the one ahead; so in any stretch of time their service, in tokens by weight, differs by no more than
    the two reaches together. And no agent is kept waiting by those on allowance for more than RATION_S at a
    stretch, nor for more than half of the time in the long run."""

    name = "fair"

    def __init__(self, quantum: Quantum, shares: Mapping[str, float] | None = None) -> None:
        self._quantum = quantum
        self._tokens = float(quantum.tokens)
        self._groups = {name: _Group(share) for name, share in (shares or {}).items()}
        self._stale: set[str] = set()  # groups whose members must be weighed again
        self._of: dict[int, _FairAgent] = {}  # open call → its agent
        self._active: dict[int, _FairAgent] = {}  # agents with open calls
        self._idle: OrderedDict[int, _FairAgent] = OrderedDict()  # others, the longest idle first
        self._sleepers: set[_FairAgent] = set()  # active ones that slept before, and have not had much since
        self._gifted: set[_FairAgent] = set()  # active ones that came with an allowance
        self._line = 0.0
        self._given = 0.0  # virtual tokens, to all, since the line last moved
        self._seated: dict[int, float] = {}  # call → when it got its slot
        self._quiet: _Quiet | None = None  # the last check of the waiting calls, if it is still valid
        self._ahead: float | None = None  # the rank of the agent that others were held out for in the last step
        self._ration = _Ration()

    def reach(self, nice: int, batch: int = 1, prompt: int = 0) -> float:
        """How far, in virtual tokens, an agent of this nice value and no group can get ahead of another: FAR quanta, or
        an allowance; and what one step gives it, with `batch` calls open and `prompt` tokens computed at once."""
        cost = NICE_0 / WEIGHTS[nice + 20]
        return ALLOWANCE + FAR * self._tokens * max(cost, 1.0) + cost * (batch + PROMPT_WEIGHT * prompt)

    # ── active agents ──────────────────────────────────────────────────────────────────────────────────────

    def arrive(self, call: Entry, now: float) -> None:
        if call.order in self._of:
            return
        self._quiet = None
        agent = self._active.get(call.peer)
        if agent is None:
            agent = self._wake(call, now)
        agent.calls[call.order] = call
        self._of[call.order] = agent
        self.renice(call, now)

    def _wake(self, call: Entry, now: float) -> _FairAgent:
        """An agent becomes active: at the line, or where it was, less its allowance."""
        agent = self._idle.pop(call.peer, None)
        self._advance()
        if agent is None:
            agent = _FairAgent(call.peer, group=self._groups.get(call.group), line=self._line, active_since=now)
            agent.rank = agent.line - WELCOME
        elif agent.slept(now):
            earned = max(agent.line - agent.rank, 0.0) + (now - agent.idle_since) * ALLOWANCE_RATE
            agent.line = max(agent.line, agent.rank, self._line)
            agent.rank = agent.line - min(earned, ALLOWANCE)
            agent.active_since = now
            self._sleepers.add(agent)
        elif agent.rank < agent.line:
            left = agent.line - agent.rank
            agent.line = max(agent.line, self._line)
            agent.rank = agent.line - left
        else:  # it goes on: its `line` is that of its last sleep
            agent.rank = max(agent.rank, self._line)
        self._active[agent.peer] = agent
        if agent.group is not None:
            agent.group.members[agent.peer] = agent
        if agent.rank < agent.line:
            self._gifted.add(agent)
        if not self._ration.open or len(self._sleepers) > FEW * len(self._active):
            self._void()
        return agent

    def _void(self) -> None:
        """No agent runs ahead any more."""
        self._quiet = None
        for agent in self._gifted:
            agent.rank = max(agent.rank, agent.line)
        self._gifted.clear()

    def _advance(self) -> None:
        """Move the line. It must not simply be the least rank: that jumps if the hindmost agent leaves for a moment.
        Agents that have slept, but have had more than any allowance since, are treated like all others."""
        given, self._given = self._given, 0.0
        if given and self._active:
            self._sleepers -= {agent for agent in self._sleepers if agent.rank >= agent.line + ALLOWANCE}
            hindmost = min(max(agent.rank, agent.line) for agent in self._active.values())
            self._line = max(self._line, min(hindmost, self._line + given / len(self._active)))

    def leave(self, call: Entry, now: float) -> None:
        agent = self._of.pop(call.order, None)
        if agent is None:
            return
        self._quiet = None
        self._seated.pop(call.order, None)
        self._spend(now, False)
        self._ahead = None
        del agent.calls[call.order]
        if agent.calls:
            return
        self._advance()
        del self._active[agent.peer]
        self._sleepers.discard(agent)
        self._gifted.discard(agent)
        if agent.group is not None:
            del agent.group.members[agent.peer]
            self._stale.add(call.group)
        agent.idle_since = now
        self._idle[agent.peer] = agent
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._idle:
            oldest = next(iter(self._idle.values()))
            if len(self._idle) <= REMEMBER and now - oldest.idle_since <= REMEMBER_S:
                return
            del self._idle[oldest.peer]

    def renice(self, call: Entry, now: float) -> None:
        agent = self._of.get(call.order)
        if agent is None:
            return
        agent.weight = WEIGHTS[min(max(call.nice, -20), 19) + 20]
        if agent.group is None:
            agent.cost = NICE_0 / agent.weight
        else:
            self._weigh(agent.group)

    def _weigh(self, group: _Group) -> None:
        """Divide the group's weight among its active members."""
        total = sum(member.weight for member in group.members.values())
        for member in group.members.values():
            member.cost = total / (group.share * member.weight)

    # ── what they have had ────────────────────────────────────────────────────────────────────────────────

    def charge(self, calls: Sequence[Entry], tokens: int, now: float) -> None:
        of, given = self._of, 0.0
        for call in calls:
            agent = of[call.order]
            cost = agent.cost * tokens
            agent.rank += cost
            given += cost
        self._given += given

    def charge_prompt(self, call: Entry, tokens: int, now: float) -> None:
        agent = self._of[call.order]
        cost = agent.cost * tokens * PROMPT_WEIGHT
        agent.rank += cost
        self._given += cost

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────────────

    def _key(self, call: Entry) -> tuple[float, int]:
        """The rank of a call: that of its agent, and two quanta for each call of it that comes before this one."""
        agent = self._of[call.order]
        if len(agent.calls) == 1:
            return agent.rank, call.order
        mine = self._had(call)
        before = sum(self._had(other) < mine for other in agent.calls.values())
        return agent.rank + 2 * before * self._tokens * agent.cost, call.order

    def _had(self, call: Entry) -> tuple[int, int]:
        return call.num_generated // self._quantum.tokens, call.order

    def _patience(self, call: Entry, now: float) -> float:
        """How far ahead of a waiting call this running one may be, in virtual tokens."""
        cost, quantum = self._of[call.order].cost, self._quantum.of(call)
        if now - self._seated.setdefault(call.order, now) >= quantum.seconds:
            return cost
        return quantum.tokens * cost

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if len(waiting) <= free or not running or self._none_gives_way(waiting, running, now):
            return []
        self._quiet = None
        first = sorted(((*self._key(call), call) for call in waiting), key=lambda entry: entry[:2])[free:]
        seats = sorted(((self._key(call), self._patience(call, now), call) for call in running), key=lambda s: s[0])
        victims: list[E] = []
        least = float("inf")  # of the victims' ranks; admit must choose what they make room for before any of them
        for rank, _, call in first:
            line = self._of[call.order].line
            ahead = [i for i, seat in enumerate(seats) if self._gives_way(seat[0][0], seat[1], seat[2], rank, line)]
            if not ahead or least <= rank:
                break
            (own, _), _, victim = seats.pop(ahead[-1])
            least = min(least, own)
            victims.append(victim)
        if not victims and not free:
            gifts = any(rank < self._of[call.order].line for rank, _, call in first)
            self._quiet = _Quiet(len(waiting), first[0][0], gifts)
        return victims

    def _none_gives_way(self, waiting: Sequence[E], running: Sequence[E], now: float) -> bool:
        """The short answer for nearly every step. The waiting calls are those of the last check, with the same ranks;
        so only the running calls are checked: is one far enough ahead of the least of these ranks by now? This costs
        nothing for each waiting call, of which there may be thousands."""
        quiet = self._quiet
        if quiet is None or quiet.waiting != len(waiting):
            return False
        most = self._tokens if quiet.gifts else float("inf")
        return all(self._key(call)[0] <= quiet.rank + min(self._patience(call, now), most) for call in running)

    def _gives_way(self, own: float, patience: float, call: Entry, rank: float, line: float) -> bool:
        """Does this running call give way to a waiting one? Only a long one does for an allowance."""
        if rank < line and self._is_long(self._of[call.order]):
            return own > rank + min(patience, self._tokens)
        return own > max(rank, line) + patience

    def _is_long(self, agent: _FairAgent) -> bool:
        """Has it had more than a quantum since it came?"""
        return agent.rank > agent.line + self._tokens

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if free <= 0:
            return []
        self._quiet = None
        admitted = sorted(waiting, key=self._key)[:free]
        for call in admitted:
            self._seated[call.order] = now
        return admitted

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        """While others are held out of steps for the sake of one on allowance, their prompts wait as well."""
        ahead, self._ahead = self._ahead, None
        ordered = sorted(pending, key=self._key)
        if ahead is None:
            return ordered

        def may(agent: _FairAgent) -> bool:
            return not self._is_long(agent) or agent.rank <= ahead + self._tokens

        return [call for call in ordered if may(self._of[call.order])]

    def select(self, decoding: list[E], now: float) -> list[E]:
        if self._stale:
            for name in self._stale:
                self._weigh(self._groups[name])
            self._stale.clear()
        of = self._of
        agents = [of[call.order] for call in decoding]
        ranks = [agent.rank for agent in agents]
        least = min(ranks)
        hindmost = agents[ranks.index(least)]
        gift = hindmost.rank < hindmost.line
        kept = decoding
        if max(ranks) - least > self._tokens:
            kept = self._behind(agents, ranks, least, decoding) if gift else decoding
            if 2 * len(kept) > len(decoding):
                kept = self._near(agents, decoding)
        self._spend(now, gift and len(kept) < len(of))
        self._ahead = least if gift and len(kept) < len(decoding) else None
        return kept

    def _behind(self, agents: list[_FairAgent], ranks: list[float], least: float, decoding: list[E]) -> list[E]:
        """Calls as far behind as the one on an allowance, and those whose agents have had little."""
        most = least + self._tokens
        return [
            call
            for call, agent, rank in zip(decoding, agents, ranks, strict=True)
            if rank <= most or not self._is_long(agent)
        ]

    def _near(self, agents: list[_FairAgent], decoding: list[E]) -> list[E]:
        """Those not ahead by more than a quantum, if they are at most half; else those not ahead by FAR quanta: in
        tokens of their own, allowances aside."""
        ranks = [max(agent.rank, agent.line) for agent in agents]
        least = min(ranks)
        quanta = [
            (rank - least) / (self._tokens * max(agent.cost, 1.0)) for agent, rank in zip(agents, ranks, strict=True)
        ]
        near = [call for call, ahead in zip(decoding, quanta, strict=True) if ahead <= 1]
        if 2 * len(near) <= len(decoding):
            return near
        if max(quanta) <= FAR:
            return decoding
        return [call for call, ahead in zip(decoding, quanta, strict=True) if ahead <= FAR]

    def _spend(self, now: float, waiting: bool) -> None:
        if not self._ration.spend(now, waiting):
            self._void()


class _Ration:
    """The time that agents on allowance may keep others waiting."""

    def __init__(self) -> None:
        self.open = True
        self._left_s = RATION_S
        self._last: float | None = None
        self._used = False  # since the last check

    def spend(self, now: float, used: bool) -> bool:
        """Count the time since the last check; `used`: is the ration being used from now on? False: it has just run
        out."""
        passed = now - self._last if self._last is not None else 0.0
        self._left_s = min(self._left_s + (-passed if self._used else passed), RATION_S)
        self._last, self._used = now, used and self.open
        if self.open and self._left_s <= 0.0:
            self.open = self._used = False
            return False
        if self._left_s >= RATION_S / 2:
            self.open = True
        return True
