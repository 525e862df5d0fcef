"""The record of one generation, from its arrival in the core to its last report.

    QUEUED ──slot──▶ PREFILL ──prompt in place──▶ DECODE ──▶ DONE
       ▲                │                            │
       └───── evicted ──┴────────── evicted ─────────┘          any ──cancel, error──▶ DONE

Parked is not a phase but a flag: a parked sequence stays in its phase and takes no part in steps. (It loses its slot
when another one needs that; then it is QUEUED, its state is saved, and it gets no slot while it is parked.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aiosd.budgets.price import FREE, Price
from aiosd.ipc.link import CallKey
from aiosd.llm.policy.contract import ANY_TURN, Quantum

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiosd.llm.dialects import ToolCallReader
    from aiosd.llm.logprobs import Raw
    from aiosd.llm.options import SamplerChain
    from aiosd.llm.prefix import Node
    from aiosd.llm.purse import CallAccount
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
    key: CallKey
    group: str
    scope: str  # whose computed prompts it shares: those of its group, or of all where it is marked public
    nice: int
    order: int
    arrived: float
    prompt: npt.NDArray[np.int32]
    max_tokens: int  # of the whole generation; tokens that came with the call (`given`) count
    chain: SamplerChain  # how its tokens are chosen
    stream: bool
    new_text: Callable[[], TextStream]  # makes the text as it is before the first token
    constraint: Constraint | None = None
    dialect: ToolCallReader | None = None
    budget: int | None = None  # how many tokens it may still use, those of the prompt included
    money: int | None = None  # how much more it may cost,
    price: Price = FREE  # … at these prices
    account: CallAccount | None = None  # what it pays out of budgets that it shares
    watched: bool = False  # the text of each token must be looked at when it is generated
    lora: str = ""  # the adapter that it is computed with

    text: TextStream = field(init=False)

    # owned by the engine
    phase: Phase = Phase.QUEUED
    parked_peer: bool = False
    parked_call: bool = False
    slot: int = -1
    length: int = 0  # tokens of prompt + out that are in the cache
    prefilled: int = 0  # how many of those, from the first on, were computed as a prompt (exact mode shares only these)
    out: list[int] = field(default_factory=list)
    forced: int = 0  # how many tokens at the beginning of `out` came with the call and were not drawn here
    limit: int = 0  # how many tokens `out` may hold at most
    limit_reason: str = "length"
    limit_kind: str = "tokens"  # which kind of budget, where that is "limit"
    short: str = ""  # the kind of budget of which too little was left
    plain: bool = False  # the next token is what the sampler draws; nothing else reads or changes the row
    raw: Raw | None = None  # the last row before anything changed it, where log probabilities are wanted
    logprobs: Logprobs | None = None  # of the tokens of `out`
    fed: int = 0  # how many tokens of `out` have been put into `text`
    snapshot: Node[Any] | npt.NDArray[np.uint8] | None = None  # its state while it has no slot
    leader: Sequence | None = None  # the call for which the beginning of this prompt is being computed …
    leader_stop: int = 0  # … up to this place
    least: int = 0  # its slot is not taken away before `out` holds this many tokens
    least_turn: Quantum = ANY_TURN  # how long it should keep its slot, because moving its state takes time
    cut_at: int = 0  # other calls wait for this prompt up to this place: a batch ends there

    # what was reported to the kernel
    sent: int = 0  # how many tokens of `out`
    started_reported: bool = False

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
        """How many tokens must be in the cache before a decode step: the prompt and all generated tokens but the last.
        The last one is put in by the decode step itself."""
        return len(self.prompt) + max(len(self.out) - 1, 0)

    @property
    def used(self) -> int:
        """Tokens that are charged for it: those of its prompt that were not cached, and those drawn here."""
        prompt = len(self.prompt) - self.cached if self.started_reported else 0
        return prompt + len(self.out) - self.forced

    @property
    def num_pending(self) -> int:
        return self.target - self.length

    @property
    def upcoming(self) -> int:
        """The generated token that the next decode step puts into the cache."""
        return self.out[self.length - len(self.prompt)]

    @property
    def replaying(self) -> bool:
        """Is a lost state being computed again, by decode steps whose results are known?"""
        return self.length - len(self.prompt) < len(self.out) - 1

    @property
    def simple(self) -> bool:
        """Is a token drawn from its rows as they are, and nothing else done with them?"""
        chain = self.chain
        return chain.edits is None and chain.mirostat is None and self.logprobs is None and self.constraint is None

    def tokens(self) -> npt.NDArray[np.int32]:
        """The tokens of the prompt and of the output so far."""
        return np.concatenate([self.prompt, np.asarray(self.out, np.int32)])
