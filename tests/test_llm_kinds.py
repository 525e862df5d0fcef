"""Models that are no plain transformer: sliding windows (Gemma 2 and 3) and recurrent state (Mamba). They serve a crowd
like any other, with the same texts; what they cannot do is switched off, and reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aiosd.errors import UsageError
from aiosd.llm import engine as engine_module
from aiosd.llm import llama, loading, policy, schedule
from aiosd.llm.blob import StateLayout
from aiosd.llm.engine import Engine
from aiosd.llm.lookahead import Lookahead
from aiosd.llm.passes import PassCost
from aiosd.llm.policy.contract import Quantum
from tests.test_llm_engine import Bench, load
from tests.tinymodels import write_like

KINDS = {"gemma2": 2, "gemma3": 2, "gemma3, both": 7, "mamba": 2}  # layers; of Gemma 3's every sixth has no window
WINDOW = 32


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[loading.LoadedModel]:
    llama.start()
    kind = request.param.partition(",")[0]
    path = write_like(tmp_path_factory.mktemp("gguf") / "m.gguf", kind, window=WINDOW, layers=KINDS[request.param])
    loaded = load(path)
    yield loaded
    loaded.close()


@pytest.fixture
def bench(loaded: loading.LoadedModel) -> Iterator[Bench]:
    loaded.context.clear()
    bench = Bench(loaded)
    bench.engine = Engine(
        loaded.model,
        loaded.context,
        ctx=loaded.ctx,
        slots=loaded.slots,
        emit=bench.sent.append,
        clock=bench.clock,
        ram=1 << 24,
        policy=policy.make("rr", Quantum(8, 1000.0)),
    )
    yield bench
    bench.run()
    bench.engine.keep([])
    bench.engine._count()


def alone(bench: Bench, prompt: list[int], count: int, most: int = 512) -> list[int]:
    """Greedy tokens from a bare loop: one sequence, an empty cache, `most` tokens of the prompt at a time."""
    context = bench.loaded.context
    context.clear()
    batch = llama.BatchBuffer(most)
    tokens: list[int] = []
    for start in range(0, len(prompt), most):
        part = prompt[start : start + most]
        batch.size = n = len(part)
        batch.tokens[:n], batch.positions[:n] = part, range(start, start + n)
        batch.sequences[:n] = batch.wanted[:n] = 0
        batch.wanted[n - 1] = 1
        assert context.decode(batch) == llama.OK
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(int(context.logits(1)[0].argmax()))
        batch.size = 1
        batch.tokens[0], batch.positions[0], batch.wanted[0] = tokens[-1], position, 1
        assert context.decode(batch) == llama.OK
    context.clear()
    return tokens


def words(seed: int, count: int) -> list[int]:
    return [20 + (seed * 7919 + i * 104729 + i * i) % 200 for i in range(count)]


def test_a_crowd_gets_the_texts_that_each_gets_alone(bench: Bench) -> None:
    """Three times as many calls as slots, of different lengths, each preempted several times."""
    prompts = [words(i, 20 + 13 * i) for i in range(12)]
    expected = [alone(bench, prompt, 40) for prompt in prompts]
    keys = [bench.submit(prompt, peer=i + 1, max_tokens=40) for i, prompt in enumerate(prompts)]
    bench.run()
    assert [bench.whole(key)[0] for key in keys] == expected
    assert sum(bench.end(key).usage.preemptions for key in keys) > 12


@pytest.mark.parametrize("cost", [PassCost(another=1.0, row=0.0), PassCost(another=1.0, row=2.0)])
def test_calls_in_scattered_slots_get_the_texts_that_each_gets_alone(
    bench: Bench, cost: PassCost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a gap is always filled, and where none is, but slots change places. (Neither with a recurrent state, of
    which no part can be taken back: there slots only change places.)"""
    monkeypatch.setattr(engine_module, "PATIENCE", 1)
    recurrent = bench.loaded.model.recurrent
    prompts = [words(i, 20 + 13 * i) for i in range(12)]
    counts = [40 if i % 3 else 6 for i in range(12)]
    expected = [alone(bench, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    bench.engine.guesser.set(Lookahead(0, "", cost=None if recurrent else cost))
    bench.engine.meter._prefill_rate = 32 / schedule.PREFILL_SLICE  # prompts that take several steps
    keys = [
        bench.submit(prompt, peer=i + 1, max_tokens=count)
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    bench.run()
    assert [bench.whole(key)[0] for key in keys] == expected
    passes = bench.engine.stats()["passes"]
    assert isinstance(passes, dict)
    assert (passes["filled"] > 0) == (cost.row == 0 and not recurrent)
    assert passes["moved"] > 0 or cost.row == 0


def test_a_conversation_goes_on_in_its_slot(bench: Bench) -> None:
    turns, expected = [words(1, 100)], []
    for turn in range(3):
        expected.append(alone(bench, turns[-1], 30))
        turns.append(turns[-1] + expected[-1] + words(turn + 2, 10))
    for tokens, text in zip(turns, expected, strict=False):
        for again in range(2):
            key = bench.submit(tokens, peer=1, max_tokens=30)
            bench.run()
            assert bench.whole(key)[0] == text, again


def test_a_long_prompt_that_turns_off_far_behind_the_window(tmp_path: Path) -> None:
    """The cache of a sliding window is smaller than the context: cells before the window are lost."""
    path = write_like(tmp_path / "gemma3.gguf", "gemma3", window=WINDOW, layers=6, ctx=4096)
    loaded = load(path, ctx=1024, slots=2)
    try:
        bench = Bench(loaded, slots=2)
        tokens = words(1, 900)
        for at in (100, 880):
            other = tokens[:at] + words(at, 5)
            expected = alone(bench, other, 10, loaded.context.ubatch)
            bench.forget()
            bench.submit(tokens, peer=1, max_tokens=5)
            bench.run()
            key = bench.submit(other, peer=1, max_tokens=10)
            bench.run()
            assert bench.whole(key)[0] == expected, at
    finally:
        loaded.close()


def test_a_turn_that_follows_another_is_not_computed_again(bench: Bench) -> None:
    tokens = words(1, 100)
    first = bench.submit(tokens, peer=1, max_tokens=30)
    bench.run()
    more = tokens + bench.whole(first)[0] + words(2, 10)
    second = bench.submit(more, peer=1, max_tokens=30)
    bench.run()
    usage = bench.end(second).usage
    assert usage.cached_tokens >= 100, "what lies in the slot is what the prompt begins with"
    assert bench.whole(second)[0] == alone(bench, more, 30)


def test_a_prompt_that_turns_off_in_the_middle(bench: Bench) -> None:
    """Cells that the window or the recurrent state has lost must be computed again."""
    tokens = words(1, 150)
    others = {at: tokens[:at] + words(at, 40) for at in (10, 60, 110, 149)}
    expected = {at: alone(bench, other, 20) for at, other in others.items()}
    assert len({tuple(text) for text in expected.values()}) == len(expected), "they differ at all"
    for at, other in others.items():
        bench.submit(tokens, peer=1, max_tokens=30)
        bench.run()
        key = bench.submit(other, peer=1, max_tokens=20)
        bench.run()
        assert bench.whole(key)[0] == expected[at], at


def test_a_prompt_shared_by_several(bench: Bench) -> None:
    shared = words(9, 120)
    prompts = [shared + words(i, 10) for i in range(8)]
    keys = [bench.submit(prompt, peer=i + 1, max_tokens=20) for i, prompt in enumerate(prompts)]
    bench.run()
    texts = [bench.whole(key)[0] for key in keys]
    assert texts == [alone(bench, prompt, 20) for prompt in prompts]


def test_a_window_does_not_keep_beginnings_from_being_shared(bench: Bench) -> None:
    """Each prompt is computed from the first token that differs from others, in whatever slots these are or were."""
    if bench.loaded.model.recurrent:
        pytest.skip("a recurrent state has no parts")
    shared = words(9, 120)
    prompts = [shared + words(i, 10) for i in range(3 * bench.loaded.slots)]
    keys = [bench.submit(prompt, peer=i + 1, max_tokens=20) for i, prompt in enumerate(prompts)]
    bench.run()
    assert [bench.whole(key)[0] for key in keys] == [alone(bench, prompt, 20) for prompt in prompts]
    assert [bench.end(key).usage.cached_tokens >= 120 for key in keys] == [False] + [True] * (len(keys) - 1)
    assert sum(bench.end(key).usage.preemptions for key in keys) > 0
    store = bench.engine.cache.store
    assert store is not None
    store.check()


def test_a_token_that_a_cache_has_lost_is_found_out(loaded: loading.LoadedModel) -> None:
    """A block whose caches do not hold the same tokens is not cut."""
    context = loaded.context
    context.clear()
    layout = StateLayout.of(context.sample())
    if layout is None:
        pytest.skip("its state cannot be cut at all")
    batch = llama.BatchBuffer(20)
    batch.size = 20
    batch.tokens[:], batch.positions[:] = words(1, 20), range(20)
    assert context.decode(batch) == llama.OK
    block = context.read(0).copy()
    assert layout.cut(block, 0, 20, 5, 15).length == 10
    for length in (19, 21):
        with pytest.raises(LookupError):
            layout.cut(block, 0, length, 5, 15)
    first_cell = 8 + 4 + 4  # after magic, sequence, streams and the cells of stream 0
    block[first_cell : first_cell + 4].view(np.int32)[0] = 77
    with pytest.raises(LookupError):
        layout.cut(block, 0, 20, 5, 15)


def test_slots_that_change_places_keep_what_lies_before_the_window(loaded: loading.LoadedModel) -> None:
    context = loaded.context
    if loaded.model.recurrent:
        pytest.skip("it has none")

    def decode(slot: int, start: int, tokens: list[int]) -> llama.Floats:
        batch = llama.BatchBuffer(len(tokens))
        batch.size = len(tokens)
        batch.tokens[:], batch.sequences[:] = tokens, slot
        batch.positions[:] = np.arange(start, start + len(tokens))
        batch.wanted[-1] = 1
        assert context.decode(batch) == llama.OK
        return context.logits(1)[0].copy()

    context.clear()
    decode(0, 0, words(1, 60))
    expected = decode(0, 60, [33])
    context.clear()
    decode(0, 0, words(1, 60) + words(2, 140))
    decode(2, 0, words(3, 90))
    context.exchange(0, 2)
    assert context.cut(2, 60)
    np.testing.assert_allclose(decode(2, 60, [33]), expected, atol=0.01 * np.abs(expected).max())
    assert context.last_position(0) == 89


def test_what_the_window_has_lost_is_not_taken_for_there(loaded: loading.LoadedModel) -> None:
    """A state that llama.cpp itself returns can be continued only at its end."""
    context = loaded.context
    if loaded.model.recurrent:
        pytest.skip("it has no window")
    context.clear()
    batch = llama.BatchBuffer(200)
    batch.size = 200
    batch.tokens[:], batch.positions[:] = words(1, 200), range(200)
    assert context.decode(batch) == llama.OK
    size = context._into_buffer(0, 0)
    assert context.restore(1, context._buffers[0][:size].copy())
    assert not context.cut(1, 100)
    assert context.cut(1, 200)
    assert context.cut(0, 100)


def test_status_shows_what_is_switched_off(bench: Bench) -> None:
    assert ("cannot be cut by tokens" in str(bench.engine.stats())) == bench.loaded.model.recurrent


def test_a_recurrent_state_is_not_estimated_as_a_cache(tmp_path: Path) -> None:
    """It is small whatever the length of the context. An estimate by tokens would leave a large model no slot."""
    llama.start()
    path = write_like(tmp_path / "mamba.gguf", "mamba", d=128, layers=4)
    loaded = load(path, slots=4, ctx=512)
    per_token, constant = growth(loaded)
    loaded.close()
    assert per_token < 16
    assert loaded.kv_bytes == pytest.approx(4 * constant, rel=0.15)


def growth(loaded: loading.LoadedModel) -> tuple[float, float]:
    """Bytes of state per token, and besides, as the blocks have them that llama.cpp writes."""
    sizes = []
    batch = llama.BatchBuffer(256)
    for count in (128, 256):
        loaded.context.clear()
        batch.size = count
        batch.tokens[:count], batch.positions[:count] = 20, range(count)
        batch.sequences[:count] = batch.wanted[:count] = 0
        assert loaded.context.decode(batch) == llama.OK
        sizes.append(len(loaded.context.read(0)))
    per_token = (sizes[1] - sizes[0]) / 128
    return per_token, sizes[0] - 128 * per_token


def test_a_recurrent_model_in_exact_mode_is_refused(tmp_path: Path) -> None:
    llama.start()
    with pytest.raises(UsageError, match="recurrent state"):
        load(write_like(tmp_path / "mamba.gguf", "mamba"), exact=True)
