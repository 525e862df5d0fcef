"""The record of one generation, from its arrival in the core to its final word.

    QUEUED ──slot──▶ PREFILL ──prompt in place──▶ DECODE ──▶ DONE
       ▲                │                            │
       └───── evicted ──┴────────── evicted ─────────┘          any ──cancel, error──▶ DONE

Parking is not a state but a flag: a parked sequence is where it is and takes no part in steps. (It is taken
off its slot when others wait for one; then it is QUEUED, with a snapshot, and not admitted while parked.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aiosd.link import Key

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiosd.llm.dialects import Reader
    from aiosd.llm.logprobs import Raw
    from aiosd.llm.options import Choice
    from aiosd.llm.prefix import Node
    from aiosd.llm.structured import Constraint
    from aiosd.llm.text import TextStream
    from libaios.wire import Logprobs


class Phase(Enum):
    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    # fixed at arrival
    key: Key
    group: str
    scope: str  # who shares computed prompts with it: its group, or all where the prompt is marked public
    nice: int
    order: int
    arrived: float
    prompt: npt.NDArray[np.int32]
    max_tokens: int  # counted over the whole generation, `given` included
    choice: Choice  # how its tokens are chosen
    stream: bool
    new_text: Callable[[], TextStream]  # as it is before the first token
    constraint: Constraint | None = None
    dialect: Reader | None = None
    budget: int | None = None  # tokens this call may still charge, prompt included
    watched: bool = False  # every token's text must be looked at as it comes

    text: TextStream = field(init=False)

    # owned by the engine
    phase: Phase = Phase.QUEUED
    parked_peer: bool = False
    parked_call: bool = False
    slot: int = -1
    length: int = 0  # tokens of prompt + out that are in the cache
    prefilled: int = 0  # how many of those came by prefill, from the start (exact mode shares only these)
    out: list[int] = field(default_factory=list)
    forced: int = 0  # leading tokens of `out` that were given, not sampled here
    limit: int = 0  # how many tokens `out` may come to hold
    limit_reason: str = "length"
    plain: bool = False  # the next token is what the sampler draws, and nothing else looks at the row
    raw: Raw | None = None  # what the row at hand was, where log probabilities are wanted
    logprobs: Logprobs | None = None  # of `out`
    fed: int = 0  # tokens of `out` whose bytes `text` has seen
    snapshot: Node[Any] | npt.NDArray[np.uint8] | None = None  # its state while it has no slot
    leader: Sequence | None = None  # computes the beginning of this prompt just now …
    leader_stop: int = 0  # … up to here
    least: int = 0  # tokens of `out` before which its slot is not taken
    cut_at: int = 0  # others wait for this prompt up to here: a batch ends there

    # what the kernel has been told
    sent: int = 0  # tokens of `out`
    started_told: bool = False

    # counters
    cached: int = 0
    computed: int = 0  # prompt tokens computed by this core
    preemptions: int = 0
    slot_at: float = 0.0
    first_at: float = 0.0

    def __post_init__(self) -> None:
        self.text = self.new_text()

    @property
    def peer(self) -> int:
        return self.key[0]

    @property
    def parked(self) -> bool:
        return self.parked_peer or self.parked_call

    @property
    def num_generated(self) -> int:
        return len(self.out)

    @property
    def target(self) -> int:
        """How many tokens must be in the cache before the next one can be sampled: all but the last generated,
        which goes through a decode step; without any, the whole prompt."""
        return len(self.prompt) + max(len(self.out) - 1, 0)

    @property
    def num_pending(self) -> int:
        return self.target - self.length

    @property
    def upcoming(self) -> int:
        """The generated token that the next decode step puts into the cache."""
        return self.out[self.length - len(self.prompt)]

    @property
    def replaying(self) -> bool:
        """Are there generated tokens left that must go through decode steps again?"""
        return self.length - len(self.prompt) < len(self.out) - 1

    @property
    def simple(self) -> bool:
        """Are its rows only drawn from?"""
        choice = self.choice
        return choice.edits is None and choice.mirostat is None and self.logprobs is None and self.constraint is None

    def tokens(self) -> npt.NDArray[np.int32]:
        """Prompt and output so far."""
        return np.concatenate([self.prompt, np.asarray(self.out, np.int32)])
