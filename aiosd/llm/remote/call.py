"""One call for a remote model, as the backend and its policy see it: a generation, or vectors."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiosd.ipc import link
from aiosd.llm import policy
from aiosd.llm.policy.contract import ANY_TURN
from aiosd.llm.purse import CallAccount
from aiosd.llm.remote import chances as probabilities
from aiosd.llm.remote.answer import StreamedAnswer
from aiosd.llm.remote.exchange import Exchange, ExchangeEvent
from aiosd.llm.remote.vectors import Vectors
from libaios.wire import Logprob, Logprobs


class OutputText:
    """The text of a call so far, and how much of it was sent to the kernel. Each piece costs the same time, however
    long the text is. Log probabilities are kept at the place where the piece begins with which they came."""

    def __init__(self, given: str) -> None:
        self._sent, self._new = [given], list[str]()
        self.num_sent = self.length = self.size = len(given)  # `size`: about as much memory as all of it takes
        self._chances: list[tuple[int, Logprob]] = []
        self._num_chances_sent = 0

    def add(self, text: str, chances: Sequence[Logprob] = ()) -> None:
        self._chances += [(self.length, one) for one in chances]
        self._new.append(text)
        self.length += len(text)
        self.size += len(text) + probabilities.size(chances)

    def send(self) -> str:
        """The text that was not sent yet; it counts as sent from now on."""
        if not self._new:
            return ""
        new = "".join(self._new)
        self._sent.append(new)
        self._new.clear()
        self.num_sent += len(new)
        return new

    def send_chances(self) -> Logprobs | None:
        """The same for log probabilities; None: there are none."""
        new: Logprobs = [one for _, one in self._chances[self._num_chances_sent :]]
        self._num_chances_sent = len(self._chances)
        return new or None

    def send_from(self, offset: int) -> None:
        """The kernel has `offset` characters: send all later text again."""
        text = self.whole()
        offset = min(offset, len(text))
        self._sent, self._new, self.num_sent = [text[:offset]], [text[offset:]], offset
        self._num_chances_sent = bisect_left(self._chances, offset, key=lambda one: one[0])

    def whole(self) -> str:
        return "".join(self._sent) + "".join(self._new)


@dataclass(eq=False)
class RemoteCall:
    submit: link.Submit
    arrived: float
    nice: int
    text: OutputText  # all text of the call so far, with the part that was given before
    prompt_estimate: int  # tokens
    since: float  # when it began to wait
    vectors: Vectors | None = None  # for a call that is no generation: the vectors that it wants
    order: int = 0  # of arrival
    counted: int = 0  # tokens charged
    uncharged: int = 0  # … and to be charged with the next delta
    failures: int = 0
    not_before: float = 0.0
    exchange: Exchange | None = None
    reported: int = 0  # tokens of the texts of the request under way, as its answer reports
    is_trial: bool = False  # its request is the trial of the circuit breaker
    answer: StreamedAnswer = field(default_factory=StreamedAnswer)
    answered: bool = False  # the attempt under way has got an answer, so it is to be paid for
    prompt_charged: int = 0  # tokens of prompts charged, of all attempts that are to be paid for,
    cached: int = 0  # … of these in the endpoint's cache
    on_account: int = 0  # … and of these for the attempt under way
    wasted: int = 0  # tokens of answers that came to nothing
    account: CallAccount | None = None  # pays from budgets that it shares with others
    limited: bool = False  # the attempt's limit of tokens comes from a budget
    expected: str = ""  # the beginning that the attempt under way must repeat
    least_turn: policy.Quantum = ANY_TURN  # for policies: it keeps its place to its end in any case
    parked_peer: bool = False
    parked_call: bool = False
    parked_since: float = 0.0
    backlog: deque[ExchangeEvent] = field(default_factory=deque)  # events that were not handled yet
    moved: float = 0.0  # when the attempt under way last brought something
    started: bool = False
    began: float = 0.0
    first: float = 0.0

    @property
    def key(self) -> link.CallKey:
        return self.submit.key

    @property
    def peer(self) -> int:
        return self.submit.key[0]

    @property
    def group(self) -> str:
        return self.submit.group

    @property
    def num_generated(self) -> int:
        return self.counted + self.uncharged

    @property
    def num_pending(self) -> int:
        return 0 if self.first else self.prompt_estimate

    @property
    def parked(self) -> bool:
        return self.parked_peer or self.parked_call

    @property
    def kept(self) -> str:
        """The text that no later attempt may change."""
        request = self.submit.request
        if request.stream:
            return self.text.whole()
        return request.given if isinstance(request.given, str) else ""
