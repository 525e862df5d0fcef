"""The engine on a tiny random model: the same tokens whatever else is in the batch, and nothing left behind.

The text of a random model is meaningless, but deterministic: greedy decoding must give the same alone, beside other
calls, after parking, and after a restart from given tokens. The tests use the engine directly, without processes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aiosd.budgets.price import FREE, Price
from aiosd.errors import Bug
from aiosd.ipc.link import Failed, GenerationDone, Step, Submit
from aiosd.llm import engine as engine_module
from aiosd.llm import llama, loading, schedule
from aiosd.llm.dialects import call_id
from aiosd.llm.engine import Engine
from aiosd.llm.lookahead import Lookahead
from aiosd.llm.passes import PassCost
from aiosd.llm.sampling import Drawer
from aiosd.llm.sequence import Phase
from aiosd.llm.spec import ModelSpec
from aiosd.llm.text import TextStream
from libaios.parts import Splitter
from libaios.wire import Generate, Sampling
from tests import tinymodels
from tests.minischema import valid

SLOTS, CTX = 4, 512
REQUEST = ("messages", "tools", "schema", "stream", "given", "public", "grammar", "lora")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
            },
        },
    },
    {"name": "stop", "parameters": {"type": "object", "properties": {}}},
]


class Clock:
    """A clock that advances by a millisecond at each look, so that no test waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


NO_NUMBER = "the model gave no number for any token at this place"


class Bench:
    """An engine, and what it sends: final messages by key, and joined streams."""

    def __init__(self, loaded: loading.LoadedModel, slots: int = SLOTS, ram: int = 0) -> None:
        self.loaded = loaded
        self.clock = Clock()
        self.sent: list[Step | GenerationDone | Failed] = []
        self.engine = Engine(
            loaded.model,
            loaded.context,
            ctx=loaded.ctx,
            slots=slots,
            exact=loaded.spec.exact,
            emit=self.sent.append,
            clock=self.clock,
            ram=ram,
        )
        self._next = 0

    def submit(
        self, prompt: str | list[int] | None = None, *, peer: int = 1, key: int | None = None, **more: Any
    ) -> Any:
        """Queue a call; greedy, 24 tokens unless told otherwise. Returns its key."""
        self._next += 1
        fields = {name: more.pop(name) for name in ("nice", "group", "budget", "money", "price") if name in more}
        request = {name: more.pop(name) for name in REQUEST if name in more}
        sampling = Sampling(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **more})
        call = (peer, self._next if key is None else key)
        self.engine.submit(Submit(call, Generate(prompt=prompt, sampling=sampling, **request), **fields))
        return call

    def run(self, steps: int = 10_000) -> None:
        while steps and self.engine.has_work:
            self.engine.step()
            steps -= 1

    def end(self, key: Any) -> GenerationDone:
        ends = [message for message in self.sent if isinstance(message, GenerationDone | Failed) and message.key == key]
        assert len(ends) == 1, f"{len(ends)} final words on {key}: {ends}"
        assert isinstance(ends[0], GenerationDone), ends[0]
        return ends[0]

    def failure(self, key: Any) -> Failed:
        ends = [message for message in self.sent if isinstance(message, GenerationDone | Failed) and message.key == key]
        assert len(ends) == 1
        assert isinstance(ends[0], Failed), ends[0]
        return ends[0]

    def whole(self, key: Any, given: int = 0) -> tuple[list[int], str]:
        """Tokens and text from all deltas and the final message, after the given ones; offsets must fit."""
        tokens: list[int] = []
        text = ""
        for message in self.sent:
            parts = (
                message.deltas
                if isinstance(message, Step)
                else [message]
                if isinstance(message, GenerationDone)
                else []
            )
            for part in parts:
                if part.key == key:
                    assert part.offset == given + len(tokens)
                    tokens += part.tokens
                    text += part.text
        return tokens, text

    def alone(self, prompt: str | list[int], **more: Any) -> list[int]:
        """The result of the call alone, with an empty cache."""
        self.forget()
        key = self.submit(prompt, **more)
        self.run()
        return self.whole(key)[0]

    def forget(self) -> None:
        for slot in range(self.engine.slots.total):
            self.engine.slots.forget(slot)


def load(path: Path, **changes: Any) -> loading.LoadedModel:
    spec = ModelSpec("tiny", str(path), **{"ctx": CTX, "slots": SLOTS, "threads": 1, **changes})
    return loading.load(spec, lambda what, fraction: None)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", f16=True)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}, {"schema": {"type": "integer"}}])
@pytest.mark.parametrize("more", [{}, {"exact": True}, {"flash_attention": "off"}])
def test_a_row_without_a_number_ends_its_own_call(
    tmp_path: Path, options: dict[str, Any], more: dict[str, Any]
) -> None:
    """It leaves no state from which another call could go on."""
    llama.start()
    bad = 200
    loaded = load(tinymodels.spoil(tinymodels.write(tmp_path / "m.gguf"), bad, "nan"), **more)
    bench = Bench(loaded)
    fine = bench.submit([20, 21, 22, 23], peer=1, max_tokens=12)
    prompt = [30, 31, bad, 32, 33]
    spoilt = bench.submit(prompt, peer=2, **options)
    late = bench.submit([40, 41, 42], peer=3, given=[] if "schema" in options else [50, bad], **options)
    bench.run()
    for key in (spoilt,) if "schema" in options else (spoilt, late):
        assert (bench.failure(key).errno, bench.failure(key).message) == (errno.EIO, NO_NUMBER)
    assert len(bench.whole(fine)[0]) == 12
    assert not any(bad in held.tokens for held in bench.engine.slots.free_slots())
    loaded.close()


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Iterator[loading.LoadedModel]:
    loaded = load(model_path)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def exact_loaded(model_path: Path) -> Iterator[loading.LoadedModel]:
    loaded = load(model_path, exact=True)
    yield loaded
    loaded.close()


@pytest.fixture
def bench(loaded: loading.LoadedModel) -> Iterator[Bench]:
    loaded.context.clear()
    bench = Bench(loaded)
    yield bench
    bench.run()
    assert bench.engine.num_calls == 0 or any(s.parked for s in bench.engine._calls.values())
    bench.engine.keep([])
    bench.engine._count()


@pytest.fixture
def exact(exact_loaded: loading.LoadedModel) -> Iterator[Bench]:
    exact_loaded.context.clear()
    bench = Bench(exact_loaded)
    yield bench
    bench.run()
    bench.engine.keep([])
    bench.engine._count()


def play(monkeypatch: pytest.MonkeyPatch, script: list[int]) -> None:
    """Let every call generate these tokens instead of the model's."""
    monkeypatch.setattr(Drawer, "draw", lambda _, logits, wanted: [script[index] for index in wanted["index"]])


# ── one call ──────────────────────────────────────────────────────────────────────────────────────────────


def test_greedy_text_is_that_of_a_bare_loop(bench: Bench) -> None:
    model, context = bench.loaded.model, bench.loaded.context
    prompt = model.tokenize("hello there", bos=True, special=True)
    batch = llama.BatchBuffer(64)
    batch.size = n = len(prompt)
    batch.tokens[:n], batch.positions[:n], batch.sequences[:n], batch.wanted[:n] = prompt, range(n), 0, 0
    batch.wanted[n - 1] = 1
    expected = []
    for i in range(10):
        assert context.decode(batch) == llama.OK
        expected.append(int(context.logits(1)[0].argmax()))
        batch.size = 1
        batch.tokens[0], batch.positions[0], batch.wanted[0] = expected[-1], n + i, 1
    context.clear()
    key = bench.submit("hello there", max_tokens=10)
    bench.run()
    end = bench.end(key)
    assert bench.whole(key)[0] == expected
    assert end.finish_reason == "length"
    assert (end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens) == (n, 10, 0)
    assert end.text == b"".join(model.pieces[token] for token in expected).decode(errors="replace")


def test_a_call_has_times_and_a_beginning_before_its_end(bench: Bench) -> None:
    key = bench.submit("x", max_tokens=1)
    bench.run()
    kinds = [type(message) for message in bench.sent]
    assert kinds == [Step, GenerationDone]
    assert isinstance(bench.sent[0], Step)
    assert bench.sent[0].started[0].key == key
    usage = bench.end(key).usage
    assert usage.queue_s > 0
    assert usage.prefill_s > 0
    assert usage.decode_s >= 0


def test_a_request_for_no_tokens_ends_at_once(bench: Bench) -> None:
    key = bench.submit("hello", max_tokens=0)
    assert not bench.engine.has_work
    assert bench.end(key).finish_reason == "length"
    assert bench.end(key).usage.prompt_tokens > 0


def test_full_context_ends_a_call_without_a_limit(bench: Bench) -> None:
    key = bench.submit([7] * 500, max_tokens=None)
    bench.run()
    end = bench.end(key)
    assert end.finish_reason == "length"
    assert end.usage.completion_tokens == CTX - 500


@pytest.mark.parametrize(
    ("request_", "code", "why"),
    [
        ({"prompt": ""}, errno.EINVAL, "empty"),
        ({"prompt": []}, errno.EINVAL, "empty"),
        ({"prompt": [5] * CTX}, errno.EMSGSIZE, f"{CTX} tokens, but the context holds {CTX}"),
        ({"prompt": [10**6]}, errno.EINVAL, "vocabulary has ids 0 to"),
        ({}, errno.EINVAL, "either messages or a prompt"),
        ({"prompt": "x", "messages": []}, errno.EINVAL, "either messages or a prompt"),
        ({"messages": []}, errno.EINVAL, "list is empty"),
        ({"messages": [{"content": "x"}]}, errno.EINVAL, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, errno.EINVAL, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, errno.EINVAL, "Roles must be user or assistant"),
        ({"prompt": "x", "tools": [{"name": "f"}]}, errno.EINVAL, "need a chat"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, errno.EINVAL, "tools[0] has no name"),
        (
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "parameters": {"not": {}}}]},
            errno.EINVAL,
            "tools[0].parameters: not:",
        ),
        ({"prompt": "x", "schema": {"not": {}}}, errno.EINVAL, "schema: not:"),
        ({"prompt": "x", "given": [10**6]}, errno.EINVAL, "given[0]"),
        ({"prompt": "x", "given": [5] * CTX}, errno.EMSGSIZE, "given"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(
    bench: Bench, request_: dict[str, Any], code: int, why: str
) -> None:
    key = bench.submit(request_.pop("prompt", None), **request_)
    failure = bench.failure(key)
    assert failure.errno == code
    assert why in failure.message
    assert not bench.engine.has_work


# ── many calls ────────────────────────────────────────────────────────────────────────────────────────────


def prompts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(5, 260, size).tolist() for size in rng.integers(2, 120, n)]


def test_more_calls_than_slots_all_end_and_in_the_order_of_arrival(bench: Bench) -> None:
    keys = [bench.submit(prompt, max_tokens=5 + i % 7) for i, prompt in enumerate(prompts(17))]
    assert bench.engine.num_waiting == 17
    bench.engine.step()
    assert bench.engine.slots.num_free == 0
    bench.run()
    for i, key in enumerate(keys):
        assert bench.end(key).usage.completion_tokens == 5 + i % 7
    started = [s.key for message in bench.sent if isinstance(message, Step) for s in message.started]
    assert started == keys


def test_exact_text_is_the_same_alone_and_among_neighbours(exact: Bench) -> None:
    texts = prompts(9)
    expected = [exact.alone(prompt, max_tokens=12 + i) for i, prompt in enumerate(texts)]
    exact.forget()
    keys = [exact.submit(prompt, max_tokens=12 + i) for i, prompt in enumerate(texts)]
    exact.run()
    assert [exact.whole(key)[0] for key in keys] == expected


def test_exact_logits_are_the_same_bit_for_bit(exact: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole row is the same, for every token of a call, alone and beside changing other calls."""
    rows: dict[Any, list[bytes]] = {}
    original = Engine._next

    def recording(self: Engine, sequence: Any, row: Any, token: int) -> None:
        rows.setdefault(sequence.key, []).append(row.tobytes())
        original(self, sequence, row, token)

    monkeypatch.setattr(Engine, "_next", recording)
    options = {"max_tokens": 30, "logprobs": True}  # with this every row passes through `_next`
    texts = prompts(8)
    exact.forget()
    alone = exact.submit(texts[0], **options)
    exact.run()
    exact.forget()
    for prompt in texts[4:7]:
        exact.submit(prompt, **{**options, "max_tokens": 11})
    among = exact.submit(texts[0], **options)
    exact.run(5)
    for prompt in texts[1:4]:
        exact.submit(prompt, **options)
    exact.run()
    assert len(rows[alone]) == 30
    assert rows[alone] == rows[among]


def test_seeded_sampling_repeats_itself_among_neighbours(exact: Bench) -> None:
    options = {"temperature": 1.0, "seed": 11, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 20}
    expected = exact.alone([9, 8, 7], **options)
    exact.forget()
    keys = [exact.submit(prompt) for prompt in prompts(3)]
    key = exact.submit([9, 8, 7], **options)
    other = exact.submit([9, 8, 7], **{**options, "seed": 12})
    exact.run()
    assert exact.whole(key)[0] == expected
    assert exact.whole(other)[0] != expected
    assert all(exact.end(k) for k in keys)


def test_a_crowd_begins_to_decode_together(bench: Bench) -> None:
    bench.engine.meter._prefill_rate = 4 * CTX / schedule.PREFILL_ALONE
    keys = [bench.submit([5 + i, *range(10, 250)], peer=1 + i) for i in range(SLOTS)]  # more than a batch holds
    bench.run(1)
    assert [len(s.out) for s in bench.engine.slots.owners()] == [2] * SLOTS, "none waits for another's prompt any more"
    bench.run()
    assert [len(bench.whole(key)[0]) for key in keys] == [24] * SLOTS


def test_long_prompt_does_not_stop_the_others(bench: Bench) -> None:
    """While a prompt of many steps is computed, a running call gets a token in every step."""
    bench.engine.meter._prefill_rate = 16 / schedule.PREFILL_SLICE
    running = bench.submit([5, 6], max_tokens=40)
    bench.run(2)
    long = bench.submit([7] * 400, max_tokens=1)
    sequence = bench.engine._calls[running]
    for _ in range(8):
        before = len(sequence.out)
        bench.engine.meter._prefill_rate = 16 / schedule.PREFILL_SLICE
        bench.engine.step()
        assert len(sequence.out) == before + 1
    assert 0 < bench.engine._calls[long].length < 400
    bench.run()
    assert bench.end(long)


def test_scattered_slots_come_together_and_no_call_notices(exact: Bench) -> None:
    long = {"max_tokens": 40}
    expected = exact.alone([1, 2, 3, 4], **long)
    exact.forget()
    first = exact.submit([5, 6, 7], **long)
    short = [exact.submit(prompt, max_tokens=3) for prompt in ([8, 9], [10, 11])]
    last = exact.submit([1, 2, 3, 4], **long)
    exact.run()
    assert exact.whole(last)[0] == expected
    assert exact.end(first)
    assert all(exact.end(key) for key in short)


def test_batch_in_pieces_is_made_whole(bench: Bench) -> None:
    long = {"max_tokens": 40}
    bench.submit([5, 6, 7], **long)
    short = [bench.submit(prompt, max_tokens=3) for prompt in ([8, 9], [10, 11])]
    last = bench.submit([1, 2, 3, 4], **long)
    bench.run(3)
    assert all(bench.end(key) for key in short)
    assert bench.engine._calls[last].slot == 3
    bench.run(engine_module.PATIENCE)
    assert bench.engine._calls[last].slot == 1
    assert bench.engine.slots.holds(3), "what lay in the hole must still serve as a prefix"
    again = bench.submit([8, 9, 9], max_tokens=3)
    bench.run()
    assert bench.end(last)
    assert bench.end(again).usage.cached_tokens == 2


def test_a_gap_is_filled_by_what_leaves_no_trace(bench: Bench) -> None:
    """Slot 1 holds a finished conversation, slot 2 a prompt that takes many steps."""
    options = {"max_tokens": 40}
    expected = [bench.alone(prompt, **options) for prompt in ([5, 6, 7], [1, 2, 3, 4])]
    slow = bench.alone([7] * 300, max_tokens=3)
    bench.loaded.context.clear()
    bench.forget()
    engine = bench.engine
    engine.guesser.set(Lookahead(0, "", cost=PassCost(another=1.0, row=0.1)))
    keys = [bench.submit([5, 6, 7], **options)]
    short = [bench.submit(prompt, max_tokens=3) for prompt in ([8, 9], [10, 11])]
    keys.append(bench.submit([1, 2, 3, 4], **options))
    bench.run(3)
    long = bench.submit([7] * 300, max_tokens=3)
    decoded, decode = [], bench.loaded.context.decode

    def record(batch: llama.BatchBuffer) -> int:
        decoded.append(batch.sequences[: batch.size].tolist())
        return decode(batch)

    bench.loaded.context.decode = record  # type: ignore[method-assign]
    try:
        for _ in range(engine_module.PATIENCE - 2):
            engine.meter._prefill_rate = 16 / schedule.PREFILL_SLICE
            engine.step()
    finally:
        del bench.loaded.context.decode  # type: ignore[method-assign]
    assert 0 < engine._calls[long].length < 300
    assert [0, 1, 2, 3] in decoded, "one pass"
    assert engine.filled > 0
    last = bench.loaded.context.last_position
    assert last(engine._calls[long].slot) == engine._calls[long].length - 1
    bench.run()
    assert [bench.whole(key)[0] for key in keys] == expected
    assert bench.whole(long)[0] == slow
    assert all(bench.end(key) for key in short)


def test_a_call_changes_places_with_one_whose_prompt_is_computed(bench: Bench) -> None:
    options = {"max_tokens": 40}
    expected, slow = bench.alone([1, 2, 3, 4], **options), bench.alone([7] * 300, max_tokens=3)
    bench.loaded.context.clear()
    bench.forget()
    engine = bench.engine
    engine.guesser.set(Lookahead(0, "", cost=PassCost(another=1.0, row=2.0)))
    first, short = bench.submit([5, 6, 7], **options), bench.submit([8, 9], max_tokens=2)
    third, last = bench.submit([10, 11], **options), bench.submit([1, 2, 3, 4], **options)
    bench.run(2)
    assert bench.end(short)
    long = bench.submit([7] * 300, max_tokens=3)
    for _ in range(engine_module.PATIENCE + 1):
        engine.meter._prefill_rate = 16 / schedule.PREFILL_SLICE
        engine.step()
    assert engine._calls[long].phase is Phase.PREFILL
    assert [engine._calls[key].slot for key in (first, third, last, long)] == [0, 2, 1, 3]
    assert engine.exchanges == 1
    bench.run()
    assert bench.whole(last)[0] == expected
    assert bench.whole(long)[0] == slow


def test_slots_stay_where_an_exchange_takes_longer_than_it_saves(bench: Bench) -> None:
    engine = bench.engine
    engine.guesser.set(Lookahead(0, "", cost=PassCost(another=0.001, row=0.002)))
    engine._exchange_s = 1.0
    first = bench.submit([5, 6, 7], max_tokens=40)
    short = [bench.submit(prompt, max_tokens=3) for prompt in ([8, 9], [10, 11])]
    last = bench.submit([1, 2, 3, 4], max_tokens=40)
    bench.run()
    assert engine.exchanges == engine.filled == 0
    assert 0.5 < engine._exchange_s < 1.0, "it is tried again some time"
    assert all(bench.end(key) for key in (first, *short, last))


def test_what_was_not_computed_to_fill_a_gap_is_not_taken_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with guesses fills none. The slot that would have been filled has a prompt in the next step."""
    engine = bench.engine
    engine.guesser.set(Lookahead(7, "", (0.0, *[1.0] * 16), cost=PassCost(another=1.0, row=0.1)))
    copied = [*range(10, 40)] * 2
    keys = [bench.submit(prompt, max_tokens=most) for prompt, most in ((copied, 40), ([8, 9], 2), ([5, 6], 40))]
    bench.run(3)
    assert bench.end(keys[1])
    assert engine._scattered
    engine._arrange(engine._ready)
    assert engine._dummies
    monkeypatch.setattr(engine.guesser, "verified", lambda calls, guessed, tokens: None)
    engine._decode_guesses([[1], []])
    assert engine._dummies == []


# ── prefixes ──────────────────────────────────────────────────────────────────────────────────────────────


def test_second_turn_computes_only_what_is_new(bench: Bench) -> None:
    first = bench.submit([5] * 50 + [6], max_tokens=4)
    bench.run()
    out = bench.whole(first)[0]
    second = bench.submit([5] * 50 + [6] + out + [9, 9], max_tokens=4)
    bench.run()
    assert bench.end(second).usage.cached_tokens == 51 + 3  # the last token of `out` was never put into the cache
    assert bench.end(second).usage.prompt_tokens == 57


def test_the_same_prompt_again_computes_its_last_token_only(bench: Bench) -> None:
    expected = bench.alone([5, 6, 7, 8])
    again = bench.submit([5, 6, 7, 8])
    bench.run()
    assert bench.end(again).usage.cached_tokens == 3
    assert bench.whole(again)[0] == expected


def test_prefixes_are_not_shared_between_groups(bench: Bench) -> None:
    bench.submit([5] * 40, group="a")
    bench.run()
    other = bench.submit([5] * 40, group="b")
    bench.run()
    assert bench.end(other).usage.cached_tokens == 0
    same = bench.submit([5] * 40, group="a")
    bench.run()
    assert bench.end(same).usage.cached_tokens == 39


def test_exact_mode_shares_prefilled_tokens_only(exact: Bench) -> None:
    expected = exact.alone([5] * 30, max_tokens=8)
    second = exact.alone([5] * 30 + expected, max_tokens=8)
    exact.forget()
    exact.alone([5] * 30, max_tokens=8)
    key = exact.submit([5] * 30 + expected, max_tokens=8)
    exact.run()
    assert exact.end(key).usage.cached_tokens == 30
    assert exact.whole(key)[0] == second


# ── parking, cancelling, attaching ────────────────────────────────────────────────────────────────────────


def test_parked_call_goes_on_as_if_nothing_had_happened(exact: Bench) -> None:
    expected = exact.alone([5, 6, 7], max_tokens=40)
    exact.forget()
    key = exact.submit([5, 6, 7], peer=3, max_tokens=40)
    other = exact.submit([9, 9], peer=4, max_tokens=100)
    exact.run(6)
    exact.engine.park(3, True)
    held = len(exact.engine._calls[key].out)
    exact.run(20)
    assert len(exact.engine._calls[key].out) == held
    exact.engine.park(3, False)
    exact.run()
    assert exact.whole(key)[0] == expected
    assert exact.end(other)


def test_parked_calls_do_not_block_slots_and_their_state_returns(exact: Bench) -> None:
    expected = [exact.alone([i, i + 1, i + 2], max_tokens=30) for i in range(5, 5 + SLOTS)]
    exact.forget()
    stopped = [exact.submit([i, i + 1, i + 2], peer=3, max_tokens=30) for i in range(5, 5 + SLOTS)]
    exact.run(7)
    exact.engine.park(3, True)
    assert not exact.engine.has_work
    others = [exact.submit([50 + i] * 9, peer=4) for i in range(2 * SLOTS)]
    exact.run()
    assert all(exact.end(key) for key in others)
    exact.engine.park(3, False)
    exact.run()
    for key, tokens in zip(stopped, expected, strict=True):
        assert exact.whole(key)[0] == tokens
    assert sum(exact.end(key).usage.preemptions for key in stopped) == SLOTS


def test_call_of_a_stopped_agent_waits(bench: Bench) -> None:
    bench.engine.park(3, True)
    key = bench.submit([5, 6], peer=3)
    assert not bench.engine.has_work
    bench.engine.park(3, False)
    bench.run()
    assert bench.end(key)


def test_all_tokens_of_a_parked_agent_are_reported_by_then(bench: Bench) -> None:
    """Also those of calls that do not stream and report seldom: the kernel counts no more of a stopped agent."""
    key = bench.submit([5, 6], peer=3)
    bench.submit([7, 8], peer=4, max_tokens=60)
    bench.run(8)
    bench.engine.park(3, True)
    reported = len(bench.whole(key)[0])
    assert reported > 0
    bench.run(20)
    bench.clock.now += 1.0
    bench.run(20)
    assert len(bench.whole(key)[0]) == reported
    bench.engine.park(3, False)
    bench.run()
    assert len(bench.whole(key)[0]) == 24


def test_parked_twice_by_agent_and_reader_needs_both_to_go_on(bench: Bench) -> None:
    key = bench.submit([5, 6], peer=3)
    bench.engine.park(3, True)
    bench.engine.park_call(key, True)
    bench.engine.park(3, False)
    assert not bench.engine.has_work
    bench.engine.park_call(key, False)
    bench.run()
    assert bench.end(key)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cancelled_call_frees_its_slot_and_is_not_heard_of(bench: Bench, steps: int) -> None:
    bench.engine.meter._prefill_rate = 16 / schedule.PREFILL_SLICE
    other = bench.submit([9, 9], max_tokens=60)
    bench.run(2)
    key = bench.submit([5] * 300, max_tokens=100)
    bench.run(steps)
    bench.engine.cancel(key)
    assert bench.engine.slots.num_free == SLOTS - 1
    said = len(bench.sent)
    bench.run()
    assert bench.end(other)
    assert all(getattr(message, "key", None) != key for message in bench.sent[said:])
    bench.engine.cancel(key)
    bench.engine.cancel((77, 77))


def test_new_kernel_keeps_the_calls_of_live_peers_only(bench: Bench) -> None:
    keys = [bench.submit([5, 6 + i], peer=i) for i in range(6)]
    bench.run(2)
    bench.engine.keep([1, 4, 5])
    assert bench.engine.num_calls == 3
    bench.run()
    ended = {message.key for message in bench.sent if isinstance(message, GenerationDone)}
    assert ended == {keys[1], keys[4], keys[5]}


@pytest.mark.parametrize("known", [0, 3, 24])
@pytest.mark.parametrize("steps", [4, 10_000])
def test_same_key_again_attaches_and_sends_the_rest(bench: Bench, known: int, steps: int) -> None:
    key = bench.submit("attach to me", stream=True)
    bench.run(steps)
    tokens = bench.whole(key)[0] if steps > 100 else None
    given = bench.whole(key)[0][:known]
    bench.sent.clear()
    assert bench.submit("attach to me", stream=True, key=key[1], given=given) == key
    bench.run()
    rest, text = bench.whole(key, len(given))
    assert len(given + rest) == 24
    assert tokens is None or given + rest == tokens
    known_text, whole_text = TextStream(), TextStream()
    known_text.feed(bench.loaded.model.detokenize(given))
    whole_text.feed(bench.loaded.model.detokenize(given + rest))
    whole_text.finish()
    assert known_text.take() + text == whole_text.take()


@pytest.mark.parametrize("cut", [1, 2, 9, 24])
def test_given_tokens_are_forced_and_the_rest_follows(exact: Bench, cut: int) -> None:
    """After a core's death a call has the tokens so far. In exact mode the text goes on bit for bit."""
    options = {"temperature": 0.9, "seed": 3, "max_tokens": 24}
    expected = exact.alone([5, 6, 7, 8, 9], **options)
    exact.forget()
    key = exact.submit([5, 6, 7, 8, 9], given=expected[:cut], **options)
    exact.run()
    end = exact.end(key)
    assert end.offset >= cut or end.offset == cut
    rest = [
        t for m in exact.sent if isinstance(m, Step) for d in m.deltas if d.key == key for t in d.tokens
    ] + end.tokens
    assert expected[:cut] + rest == expected
    assert end.usage.completion_tokens == 24


def test_given_tokens_that_were_all_is_an_end_at_once(bench: Bench) -> None:
    key = bench.submit([5, 6], given=[7] * 24)
    assert bench.end(key).finish_reason == "length"
    assert bench.end(key).tokens == []


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_end_token_is_not_among_the_tokens(bench: Bench) -> None:
    options = {"ignore_eos": False, "max_tokens": 400, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    keys = [bench.submit("hello", seed=seed, **options) for seed in range(4)]
    bench.run()
    assert "stop" in [bench.end(key).finish_reason for key in keys]
    for key in keys:
        assert not set(bench.whole(key)[0]) & bench.loaded.model.end_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(bench: Bench, stream: bool) -> None:
    tokens = bench.alone("hello there", max_tokens=40)
    text = bench.loaded.model.detokenize(tokens).decode(errors="replace")
    stop = next(text[i : i + 2] for i in range(6, len(text)) if text[i : i + 2].isascii())
    bench.forget()
    key = bench.submit("hello there", max_tokens=40, stop=[stop, "never to be seen"], stream=stream)
    bench.run()
    assert bench.end(key).finish_reason == "stop"
    assert bench.whole(key)[1] == text[: text.index(stop)]


def test_streams_report_in_every_step_and_add_up(bench: Bench) -> None:
    key = bench.submit("hello there", stream=True)
    bench.run()
    deltas = [delta for m in bench.sent if isinstance(m, Step) for delta in m.deltas]
    assert len(deltas) == 22  # the first two tokens come in one step, the last with the final message
    tokens, text = bench.whole(key)
    assert text == bench.loaded.model.detokenize(tokens).decode(errors="replace")


def test_calls_that_do_not_stream_report_now_and_then(bench: Bench) -> None:
    key = bench.submit("hello there", max_tokens=300)
    bench.run()
    deltas = [delta for m in bench.sent if isinstance(m, Step) for delta in m.deltas]
    assert 3 < len(deltas) < 60
    assert len(bench.whole(key)[0]) == 300


def test_slow_kernel_gets_fewer_and_larger_pieces(bench: Bench) -> None:
    congested = True
    bench.engine._congested = lambda: congested
    key = bench.submit("hello there", stream=True)
    bench.run(10)
    assert [delta for m in bench.sent if isinstance(m, Step) for delta in m.deltas] == []
    congested = False
    bench.run()
    assert len(bench.whole(key)[0]) == 24


def test_token_budget_is_a_limit(bench: Bench) -> None:
    key = bench.submit([5] * 10, budget=15)
    none = bench.submit([6] * 10, budget=7)
    zero = bench.submit([7] * 10, budget=0)
    bench.run()
    assert bench.end(key).finish_reason == "limit"
    assert bench.end(key).usage.completion_tokens == 5
    assert bench.end(none).finish_reason == "limit"
    assert bench.end(none).usage.completion_tokens == 0
    assert bench.end(zero).finish_reason == "limit"


def test_money_is_a_limit(bench: Bench) -> None:
    """A prompt of ten costs 20, and each token of the answer 7."""
    price = Price(prompt=2, completion=7, cached=1)
    key = bench.submit([5] * 10, money=20 + 5 * 7 + 6, price=price)
    none = bench.submit([6] * 10, money=20 + 6, price=price)
    free = bench.submit([7] * 10, money=0, price=FREE, max_tokens=3)
    bench.run()
    for call, count, reason, short in ((key, 5, "limit", "cost"), (none, 0, "limit", "cost"), (free, 3, "length", "")):
        end = bench.end(call)
        assert (end.usage.completion_tokens, end.finish_reason, end.short) == (count, reason, short)


# ── structured output ─────────────────────────────────────────────────────────────────────────────────────

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}


@pytest.mark.parametrize("seed", range(6))
def test_text_under_a_schema_is_valid(bench: Bench, seed: int) -> None:
    options = {"temperature": 1.2, "top_p": 1.0, "min_p": 0.0} if seed else {}
    key = bench.submit("x", schema=PERSON, max_tokens=300, seed=seed, stream=seed % 2 == 0, **options)
    bench.run()
    assert bench.end(key).finish_reason == "stop"
    assert valid(json.loads(bench.whole(key)[1]), PERSON)


def test_schema_does_not_depend_on_neighbours_or_restarts(exact: Bench) -> None:
    options = {"schema": PERSON, "max_tokens": 300, "temperature": 1.0, "seed": 5}
    expected = exact.alone([5, 6, 7], **options)
    exact.forget()
    exact.submit([8, 9], max_tokens=200)
    key = exact.submit([5, 6, 7], given=expected[:11], **options)
    exact.run()
    assert expected[:11] + exact.whole(key, 11)[0] == expected


def test_given_tokens_outside_of_the_schema_are_refused(bench: Bench) -> None:
    key = bench.submit("x", schema=PERSON, given=bench.loaded.model.tokenize("hello", bos=False, special=False))
    assert "do not fit" in bench.failure(key).message


def call_text(bench: Bench, text: str) -> list[int]:
    return bench.loaded.model.tokenize(text, bos=False, special=True)


def test_tool_call_is_valid_and_the_text_before_it_is_kept(bench: Bench) -> None:
    given = call_text(bench, "Let me see.<tool_call>")
    key = bench.submit(messages=[{"role": "user", "content": "?"}], tools=TOOLS, given=given, max_tokens=400, seed=4,
                       temperature=1.0)  # fmt: skip
    bench.run()
    end = bench.end(key)
    assert end.finish_reason == "tool_calls"
    assert end.tool_calls
    for call in end.tool_calls:
        parameters = {"weather": TOOLS[0]["function"]["parameters"], "stop": TOOLS[1]["parameters"]}[call.name]  # type: ignore[index]
        assert valid(call.arguments, parameters)
    assert len({call.id for call in end.tool_calls}) == len(end.tool_calls)
    assert bench.whole(key, len(given))[1] == "", "the text was given out before"
    msgspec.msgpack.encode(end)


def test_tool_call_ids_do_not_change_over_a_restart(bench: Bench) -> None:
    tokens = call_text(bench, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    messages = [{"role": "user", "content": "?"}]
    for given in (tokens, tokens[:-1]):
        bench.engine.keep([])
        bench.sent.clear()
        key = bench.submit(messages=messages, tools=TOOLS[1:], given=given, key=900, max_tokens=len(tokens))
        bench.run()
        assert [(call.id, call.name, call.arguments) for call in bench.end(key).tool_calls] == [
            (call_id((1, 900), 0), "stop", {})
        ]


def test_a_whole_call_is_no_less_a_call_where_max_tokens_leaves_no_room_for_the_end_token(bench: Bench) -> None:
    tokens = call_text(bench, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    reasons = []
    for count in (len(tokens), len(tokens) - 1):
        key = bench.submit(messages=[{"role": "user", "content": "?"}], tools=TOOLS[1:], given=tokens[:count],
                           max_tokens=count)  # fmt: skip
        bench.run()
        reasons.append(bench.end(key).finish_reason)
    assert reasons == ["tool_calls", "length"]


def test_a_stream_of_thoughts_goes_on_after_the_kernels_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tinymodels.CHATML.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\n<think>\\n'")
    loaded = load(tinymodels.write(tmp_path / "thinks.gguf", template=template))
    bench = Bench(loaded)
    assert bench.engine.requests.template.thinks
    said = "I could write <tool_call> here, but no.</think>The answer is 42."
    script = call_text(bench, said)
    play(monkeypatch, [*script, loaded.model.eos])
    request = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS[1:], "stream": True, "ignore_eos": False}
    key = bench.submit(**request, key=7, max_tokens=200)
    bench.run(len(script) // 2)
    tokens = [token for step in bench.sent if isinstance(step, Step) for delta in step.deltas for token in delta.tokens]
    text = "".join(delta.text for step in bench.sent if isinstance(step, Step) for delta in step.deltas)
    assert "<tool_call>" in text
    bench.sent.clear()
    bench.engine.keep([1])
    bench.submit(**request, key=7, given=tokens, max_tokens=200)
    bench.run()
    thoughts, _, answer = said.partition("</think>")
    assert Splitter().split(text + bench.whole(key, len(tokens))[1]) == (answer, thoughts, [])
    assert bench.end(key).usage.reasoning_tokens == len(call_text(bench, f"{thoughts}</think>"))
    loaded.close()


def test_call_that_breaks_off_is_no_call(bench: Bench) -> None:
    given = call_text(bench, 'Now<tool_call>\n{"name": "weather", "arguments": {"ci')
    key = bench.submit(messages=[{"role": "user", "content": "?"}], tools=TOOLS, given=given, max_tokens=len(given) + 1)
    bench.run()
    assert bench.end(key).finish_reason == "length"
    assert bench.end(key).tool_calls == []


def test_without_a_call_tools_do_not_touch_the_text(bench: Bench) -> None:
    messages = [{"role": "user", "content": "?"}]
    key = bench.submit(messages=messages, tools=TOOLS, max_tokens=6)
    bench.run()
    assert bench.end(key).finish_reason in ("length", "tool_calls")


# ── when llama.cpp fails ──────────────────────────────────────────────────────────────────────────────────


class Broken:
    """A context whose next decode gives this result instead."""

    def __init__(self, context: llama.LlamaContext, result: int) -> None:
        self._context, self._result = context, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, batch: llama.BatchBuffer) -> int:
        result, self._result = self._result, llama.OK
        return result or self._context.decode(batch)


@pytest.mark.parametrize(("result", "code"), [(llama.NO_ROOM, errno.ENOSPC), (-1, errno.EIO), (-3, errno.EIO)])
@pytest.mark.parametrize("steps", [0, 3])
def test_failed_decode_ends_the_calls_of_the_batch_and_no_others(
    bench: Bench, result: int, code: int, steps: int
) -> None:
    key = bench.submit([5, 6, 7])
    bench.run(steps)
    bench.engine._context = Broken(bench.loaded.context, result)  # type: ignore[assignment]
    bench.engine.step()
    assert bench.failure(key).errno == code
    assert f"result {result}" in bench.failure(key).message
    later = bench.submit([5, 6, 7])
    bench.run()
    assert bench.end(later).usage.cached_tokens == 0


@pytest.mark.parametrize("steps", [0, 3])
def test_aborted_decode_goes_on_from_what_is_there(bench: Bench, steps: int) -> None:
    expected = bench.alone([5, 6, 7])
    bench.forget()
    key = bench.submit([5, 6, 7])
    bench.run(steps)
    bench.engine._context = Broken(bench.loaded.context, llama.ABORTED)  # type: ignore[assignment]
    bench.run()
    assert bench.whole(key)[0] == expected


def test_leaked_slot_is_a_bug_that_shows_when_idle(loaded: loading.LoadedModel) -> None:
    bench = Bench(loaded)
    key = bench.submit([5, 6], max_tokens=3)
    bench.engine.step()
    bench.engine._calls.pop(key).phase = Phase.DONE
    bench.engine._stale = True
    with pytest.raises(Bug, match="slots are in use"):
        bench.engine.step()
    loaded.context.clear()


def test_stats_add_up(bench: Bench) -> None:
    for prompt in prompts(6):
        bench.submit(prompt, max_tokens=10)
    bench.run()
    stats = bench.engine.stats()
    assert stats["slots"] == {"total": SLOTS, "free": SLOTS, "used": 0}
    assert stats["tokens_generated"] == 60
    assert stats["tokens_prefilled"] == sum(map(len, prompts(6)))
    assert stats["calls_finished"] == 6
    assert stats["waiting"] == stats["running"] == 0


def test_sequence_phases_are_what_the_engine_says(bench: Bench) -> None:
    key = bench.submit([5] * 20, max_tokens=5)
    sequence = bench.engine._calls[key]
    assert sequence.phase is Phase.QUEUED
    bench.engine.step()
    assert sequence.phase is Phase.DECODE
    bench.run()
    assert sequence.phase is Phase.DONE


def test_a_long_prompt_is_given_up_in_the_middle_of_its_batch(loaded: loading.LoadedModel) -> None:
    """The cancel arrives while llama.cpp computes. The slot is free before the next step; other calls go on."""
    loaded.context.clear()
    bench = Bench(loaded)
    gone: set[Any] = set()
    bench.engine.cancelled = lambda: gone  # the core reads this from its messages
    other = bench.submit("hello", max_tokens=40)
    bench.run(3)
    long = bench.submit([7] * 400, peer=2)
    gone.add(long)
    bench.run(1)
    sequence = bench.engine._calls[long]
    assert sequence.computed == 0, "its batch was not given up"
    bench.engine.cancel(long)
    assert bench.engine.slots.num_free == SLOTS - 1
    bench.run()
    assert len(bench.whole(other)[0]) == 40
    gone.clear()
    again = bench.submit([7] * 400, peer=2, max_tokens=2)
    bench.run()
    assert len(bench.whole(again)[0]) == 2


# ── a new kernel ──────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_stays_parked_that_a_new_kernel_does_not_park_again(bench: Bench) -> None:
    """All may have been continued meanwhile. The kernel itself names parked calls, after those to keep."""
    key = bench.submit("hello there", peer=7, max_tokens=20, stream=True)
    bench.run(3)
    bench.engine.park(7, True)
    bench.engine.park_call(key, True)
    bench.engine.keep([7])
    bench.sent.clear()
    bench.engine.submit(Submit(key, Generate(prompt="hello there", stream=True)))
    bench.run()
    assert len(bench.whole(key)[0]) == 20
    later = bench.submit("another", peer=7, max_tokens=2)
    bench.run()
    assert len(bench.whole(later)[0]) == 2


def test_running_calls_are_reported_before_anything_is_computed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a call that ends the process in its first batch would be given to one successor after the other."""

    def die(batch: object) -> int:
        raise SystemExit

    monkeypatch.setattr(bench.engine._context, "decode", die)
    key = bench.submit("hello there")
    with pytest.raises(SystemExit):
        bench.engine.step()
    assert [started.key for m in bench.sent if isinstance(m, Step) for started in m.started] == [key]
    monkeypatch.undo()
    bench.run()


def test_a_call_that_cannot_be_read_because_of_a_bug_ends_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench.engine.requests, "_prompt", lambda *_: 1 // 0)
    key = bench.submit("hello there")
    assert bench.failure(key).errno == errno.EIO
    assert "ZeroDivisionError" in caplog.text
