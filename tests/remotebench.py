"""The backend of a remote model, without a kernel, against an endpoint whose behaviour the test sets."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.remote import limits
from aiosd.llm.remote.backend import Remote
from aiosd.llm.spec import ModelSpec
from libaios.wire import Generate
from tests.fakeendpoint import Deed, Endpoint

USER = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
KEY = "sk-a-secret-key"


class Deaf:
    """A channel that records what is sent."""

    outbox_bytes, hung_up, more, reborn = 0, False, False, False

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, payload: bytes) -> None:
        self.sent.append(link.decode_from_service(payload))


class Bench:
    def __init__(self, endpoint: Endpoint, clock: Callable[[], float] = time.monotonic, **options: Any) -> None:
        self.channel: Any = Deaf()
        spec = ModelSpec("m", **{"url": endpoint.url, "model": "gpt", **options})
        self.remote = Remote(spec, Line(self.channel, "m"), clock, rng=random.Random(1))
        self.endpoint = endpoint
        self.number = 0

    def submit(self, peer: int = 1, budget: int | None = None, **args: Any) -> link.CallKey:
        self.number += 1
        return self.again((peer, self.number), budget, **args)

    def again(self, key: link.CallKey, budget: int | None = None, **args: Any) -> link.CallKey:
        made = Generate(**{"messages": USER, "stream": True, **args})
        self.remote.table[link.Submit](link.Submit(key, made, budget=budget))
        return key

    def send(self, message: Any) -> None:
        self.remote.table[type(message)](message)

    def until(self, holds: Callable[[], Any], seconds: float = 60.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, self.channel.sent[-3:]
            self.remote.step()
            if not self.remote.has_work:
                select.select(self.remote.fds(), [], [], 0.2)
        return found

    def end(self, key: link.CallKey) -> Any:
        """The final message about a call."""
        kinds = (link.GenerationDone, link.Failed)
        return self.until(lambda: next((m for m in self.channel.sent if isinstance(m, kinds) and m.key == key), None))

    def deltas(self, key: link.CallKey) -> list[link.Delta]:
        steps = [message for message in self.channel.sent if isinstance(message, link.Step)]
        return [delta for step in steps for delta in step.deltas if delta.key == key]

    def text(self, key: link.CallKey) -> str:
        """The text that the kernel has received, joined as it joins it."""
        text, end = "", self.end(key)
        for message in [*self.deltas(key), end]:
            if not isinstance(message, link.Failed):
                assert message.offset == len(text)
                text += message.text
        return text

    def logprobs(self, key: link.CallKey) -> list[Any]:
        ends = [*self.deltas(key), self.end(key)]
        return [one for message in ends for one in message.logprobs or ()]

    def charged(self, key: link.CallKey) -> int:
        """Tokens of answers that have been charged so far."""
        end = self.end(key)
        return sum(message.charged for message in [*self.deltas(key), end] if not isinstance(message, link.Failed))

    def prompts(self, key: link.CallKey) -> int:
        """Tokens of prompts that have been charged so far."""
        spent = [one for message in self.channel.sent if isinstance(message, link.Step) for one in message.spent]
        spent += [
            one.spent for one in self.channel.sent if isinstance(one, link.GenerationDone) and one.spent is not None
        ]
        return sum(one.prompt_tokens for one in spent if one.key == key)


Make = Callable[..., Bench]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_S", 0.01)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Bench] = []

    def bench(*deeds: Deed, **options: Any) -> Bench:
        made.append(Bench(Endpoint(*deeds), **options))
        return made[-1]

    yield bench
    for each in made:
        each.endpoint.over.set()
        each.remote.close()
        each.endpoint.close()
