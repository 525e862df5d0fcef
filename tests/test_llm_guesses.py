"""Guesses in the engine: a text is the same with and without them, and all counts of tokens are the same.

`Teacher` replaces `Guesser`. It has the result of each call without guesses, so its guesses can be right, wrong, or
right up to a given place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aiosd.ipc.link import GenerationDone, PurseShare, Step, Submit
from aiosd.llm import llama, loading
from aiosd.llm.engine import Engine
from aiosd.llm.lookahead import CALLS, ROWS, Lookahead
from aiosd.llm.passes import PassCost
from aiosd.llm.policy import Quantum, make
from libaios.wire import Generate, Logprobs, Sampling
from tests import tinymodels
from tests.test_llm_engine import SLOTS, TOOLS, Bench, load, play

FREE = Lookahead(15, "costs nothing", (0.0, *[1.0] * ROWS))

KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "plain": {"flash_attention": "off"},
    "unified": {"kv_layout": "unified"},
    "window": {},
}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[loading.Loaded]:
    if request.param == "own" and not tinymodels.OWN_ATTENTION:
        pytest.skip("not for this processor")
    llama.start()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    if request.param == "window":
        tinymodels.write_like(path, "gemma3", window=24, layers=6)
    else:
        tinymodels.write(path, scale=3.0)
    loaded = load(path, **KINDS[request.param])
    yield loaded
    loaded.close()


class Teacher:
    """Guesses up to `most` tokens of each call; about one in seven is wrong. Gaps between slots are filled, too."""

    ahead = Lookahead(7, "taught", cost=PassCost(another=1.0, row=0.1))

    def __init__(self, known: dict[Any, list[int]], seed: int = 1, most: int = 7) -> None:
        self._known, self._random, self._most = known, random.Random(seed), most
        self.steps = self.guessed = self.right = 0

    def guesses(self, calls: Sequence[Any]) -> list[list[int]]:
        if not 0 < len(calls) <= CALLS:
            return []
        found = [self._guess(call) for call in calls]
        while sum(map(len, found)) + len(calls) > ROWS:
            max(found, key=len).pop()
        return found if any(found) else []

    def _guess(self, call: Any) -> list[int]:
        most = min(call.limit - len(call.out) - 1, self._random.randint(0, self._most))
        guess = self._known.get(call.key, [])[len(call.out) : len(call.out) + max(most, 0)]
        return [token if self._random.random() > 0.15 else (token + 1) % 250 for token in guess]

    def verified(self, calls: int, guessed: int, tokens: int) -> None:
        self.steps += 1
        self.guessed += guessed
        self.right += tokens - calls

    def forget(self, call: Any) -> None:
        pass

    def stats(self) -> dict[str, object]:
        return {}


class Lesson:
    """Runs the same calls twice: without guesses, and then with a teacher that has the results."""

    def __init__(self, loaded: loading.Loaded, **options: Any) -> None:
        self.loaded, self.options = loaded, options

    def bench(self) -> Bench:
        self.loaded.context.clear()
        bench = Bench(self.loaded)
        bench.engine = Engine(
            self.loaded.model,
            self.loaded.context,
            ctx=self.loaded.ctx,
            slots=SLOTS,
            emit=bench.sent.append,
            clock=bench.clock,
            **self.options,
        )
        return bench

    def twice(self, scene: Callable[[Bench], list[Any]], seed: int = 1, most: int = 7) -> tuple[Bench, Bench, Teacher]:
        """`scene` submits calls and returns their keys."""
        plain = self.bench()
        keys = scene(plain)
        plain.run()
        tidy(plain)
        teacher = Teacher({key: plain.whole(key)[0] for key in keys}, seed, most)
        ahead = self.bench()
        ahead.engine.guesser = teacher  # type: ignore[assignment]
        assert scene(ahead) == keys
        ahead.run()
        for key in keys:
            assert ends(ahead, key) == ends(plain, key)
        tidy(ahead)
        return plain, ahead, teacher


def ends(bench: Bench, key: Any) -> Any:
    end = bench.end(key)
    usage = replace(end.usage, queue_s=0.0, prefill_s=0.0, decode_s=0.0, preemptions=0, cached_tokens=0)
    return bench.whole(key), end.finish_reason, usage, end.tool_calls, end.short


def tidy(bench: Bench) -> None:
    """Check that no call runs, and that a slot has cells only for the tokens that it should hold."""
    engine = bench.engine
    engine._count()
    engine.cache.bases.check()
    for held in engine.slots.free_slots():
        if len(held.tokens):
            assert engine.cache.tokens_in(held.slot) == len(held.tokens)
        engine.cache.wipe(held.slot)  # no later engine of this context finds a base under its slots


def logprobs(bench: Bench, key: Any) -> Logprobs:
    found: Logprobs = []
    for message in bench.sent:
        for part in (
            message.deltas if isinstance(message, Step) else [message] if isinstance(message, GenerationDone) else []
        ):
            if part.key == key:
                found += part.logprobs or []
    return found


SEEDED = {"temperature": 0.8, "seed": 5}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SEEDED,
    "open": {**SEEDED, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "xtc": {**SEEDED, "xtc_probability": 0.5},
    "penalties": {**SEEDED, "repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "dry": {**SEEDED, "dry_multiplier": 1.0, "dry_allowed_length": 1},
    "mirostat 1": {**SEEDED, "mirostat": 1},
    "mirostat 2": {**SEEDED, "mirostat": 2},
    "bias": {"logit_bias": {65: 3.0, 66: -5.0}, **SEEDED},
    "ends": {**SEEDED, "temperature": 2.0, "ignore_eos": False, "min_tokens": 6},
    "stop token": {**SEEDED, "stop_tokens": list(range(100, 140))},
    "schema": {"schema": {"type": "array", "items": {"type": "integer"}, "minItems": 3}, **SEEDED},
    "grammar": {"grammar": 'root ::= ("ab" | "cd")+ [0-9]+', **SEEDED},
    "stream": {"stream": True, **SEEDED},
    "logprobs": {"logprobs": True, "top_logprobs": 3, **SEEDED},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_is_the_same_with_guesses(loaded: loading.Loaded, way: str) -> None:
    def scene(bench: Bench) -> list[Any]:
        return [bench.submit([20 + i, 30, 40 + i, 50], max_tokens=40 + i, **WAYS[way]) for i in range(2)]

    plain, ahead, teacher = Lesson(loaded).twice(scene)
    assert teacher.guessed >= teacher.right > 0
    if way == "logprobs":
        for key in ((1, 1), (1, 2)):
            before, after = logprobs(plain, key), logprobs(ahead, key)
            assert [one.token for one in after if one] == ahead.whole(key)[0]
            for one, two in zip(before, after, strict=True):
                assert one is not None
                assert two is not None
                assert two.logprob == pytest.approx(one.logprob, abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_calls_of_all_kinds_beside_each_other(loaded: loading.Loaded, seed: int) -> None:
    """Calls begin and end, and some wait: many, then few, then none."""
    chance = random.Random(seed)
    ways = [chance.choice(list(WAYS)) for _ in range(9)]
    sizes = [(chance.randint(2, 60), chance.randint(1, 60)) for _ in ways]

    def scene(bench: Bench) -> list[Any]:
        return [
            bench.submit([(7 * i + j) % 200 + 20 for j in range(size)], max_tokens=most, peer=1 + i % 3, **WAYS[way])
            for i, (way, (size, most)) in enumerate(zip(ways, sizes, strict=True))
        ]

    _, _, teacher = Lesson(loaded, ram=1 << 20).twice(scene, seed)
    assert teacher.right


def test_a_stop_string_ends_a_text_inside_of_what_was_guessed(loaded: loading.Loaded) -> None:
    one = Lesson(loaded)
    bench = one.bench()
    key = bench.submit([20, 30, 40], max_tokens=40, **SEEDED)
    bench.run()
    tokens, text = bench.whole(key)
    for begin in range(3, len(text) - 3, 9):
        stop = text[begin : begin + 2]
        plain, _, _ = one.twice(
            lambda bench, stop=stop: [bench.submit([20, 30, 40], max_tokens=40, stop=[stop], **SEEDED)],
            seed=begin,
            most=15,
        )
        assert plain.end(key).finish_reason == "stop"
    assert tokens


@pytest.mark.parametrize("kind", ["max_tokens", "budget", "money"])
def test_a_limit_is_kept_to_the_token(loaded: loading.Loaded, kind: str) -> None:
    from aiosd.budgets.price import Price

    one = Lesson(loaded)
    for most in (1, 2, 3, 6, 10, 13):

        def scene(bench: Bench, most: int = most) -> list[Any]:
            limits: dict[str, dict[str, Any]] = {
                "max_tokens": {"max_tokens": most},
                "budget": {"budget": 3 + most, "max_tokens": None},
                "money": {"money": 10 * most, "price": Price(0, 10, 0), "max_tokens": None},
            }
            return [bench.submit([20, 30, 40], **limits[kind])]

        _, ahead, _ = one.twice(scene, seed=most, most=15)
        assert ahead.end((1, 1)).usage.completion_tokens == most


@pytest.mark.parametrize("left", range(10, 40, 5))
def test_calls_that_share_a_budget_use_it_up_to_the_token(loaded: loading.Loaded, left: int) -> None:
    """Which call gets the last tokens depends on the steps. Together they get exactly the budget."""

    def scene(bench: Bench) -> list[Any]:
        keys = [(2, 1), (2, 2)]
        for key in keys:
            sampling = Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
            request = Generate(prompt=[20 + key[1], 30, 40], sampling=sampling)
            bench.engine.submit(Submit(key, request, shares=[PurseShare(9, left, None)]))
        return keys

    one = Lesson(loaded)
    plain = one.bench()
    keys = scene(plain)
    plain.run()
    whole = one.bench()
    for key in keys:
        whole.submit([20 + key[1], 30, 40], max_tokens=60, peer=2, key=key[1])
    whole.run()
    ahead = one.bench()
    ahead.engine.guesser = Teacher({key: whole.whole(key)[0] for key in keys}, left)  # type: ignore[assignment]
    scene(ahead)
    ahead.run()
    for bench in (plain, ahead):
        assert sum(3 + len(bench.whole(key)[0]) for key in keys) == left
        assert {bench.end(key).finish_reason for key in keys} == {"limit"}
        assert all(bench.whole(key)[0] == whole.whole(key)[0][: len(bench.whole(key)[0])] for key in keys)
    tidy(ahead)


def test_calls_that_lose_their_slots_go_on_where_they_were(loaded: loading.Loaded) -> None:
    def scene(bench: Bench) -> list[Any]:
        bench.engine.set_policy(make("rr", Quantum(8, 100.0), {}))
        return [bench.submit([20 + i, 30, 40], max_tokens=50, peer=1 + i, **SEEDED) for i in range(SLOTS + 2)]

    plain, ahead, teacher = Lesson(loaded, ram=1 << 20).twice(scene)
    assert plain.engine.meter.preemptions
    assert ahead.engine.meter.preemptions
    assert teacher.right


def test_beginnings_that_calls_share_stay_what_they_are(loaded: loading.Loaded) -> None:
    """Bases, shared cells or copies: tokens of wrong guesses come after them, and only these are removed."""
    prompt = [(13 * i) % 200 + 20 for i in range(120)]

    def scene(bench: Bench) -> list[Any]:
        first = bench.submit([*prompt, 21], max_tokens=30, **SEEDED)
        bench.run()
        return [first, *(bench.submit([*prompt, 22 + i], max_tokens=30, peer=2 + i, **SEEDED) for i in range(3))]

    plain, ahead, teacher = Lesson(loaded, ram=1 << 20).twice(scene)
    assert ahead.engine.cache.hits == plain.engine.cache.hits > 0
    assert teacher.right


def test_a_conversation_goes_on_from_what_lies_in_the_slot(loaded: loading.Loaded) -> None:
    def scene(bench: Bench) -> list[Any]:
        keys, tokens = [], [20, 30, 40]
        for turn in range(4):
            keys.append(bench.submit([*tokens], max_tokens=20, **SEEDED))
            bench.run()
            tokens += [*bench.whole(keys[-1])[0], 60 + turn]
        return keys

    one = Lesson(loaded)
    plain = one.bench()
    keys = scene(plain)
    ahead = one.bench()
    ahead.engine.guesser = Teacher({key: plain.whole(key)[0] for key in keys})  # type: ignore[assignment]
    scene(ahead)
    assert [ends(ahead, key) for key in keys] == [ends(plain, key) for key in keys]
    assert ahead.end(keys[-1]).usage.cached_tokens == plain.end(keys[-1]).usage.cached_tokens > 60
    tidy(ahead)


@pytest.mark.parametrize("way", ["greedy", "mirostat 2", "schema", "penalties"])
def test_after_a_death_a_call_goes_on_from_any_place(loaded: loading.Loaded, way: str) -> None:
    """A new core gets the tokens so far, after any number of steps, and the result is the same."""
    one = Lesson(loaded)
    plain, ahead, _ = one.twice(lambda bench: [bench.submit([20, 30, 40], max_tokens=40, stream=True, **WAYS[way])])
    key = (1, 1)
    tokens, text = plain.whole(key)
    deltas = [delta for message in ahead.sent if isinstance(message, Step) for delta in message.deltas]
    assert max(len(delta.tokens) for delta in deltas) > 1
    for delta in deltas[::5]:
        given = tokens[: delta.offset + len(delta.tokens)]
        bench = one.bench()
        bench.engine.guesser = Teacher({key: tokens}, len(given))  # type: ignore[assignment]
        sampling = Sampling(
            **{"temperature": 0.0, "ignore_eos": True, "max_tokens": 40}
            | {name: value for name, value in WAYS[way].items() if name not in ("schema",)}
        )
        request = Generate(
            prompt=[20, 30, 40], sampling=sampling, stream=True, given=given, schema=WAYS[way].get("schema")
        )
        bench.engine.submit(Submit(key, request, mu=delta.mu))
        bench.run()
        assert given + bench.whole(key, len(given))[0] == tokens
        before = "".join(one.text for one in deltas if one.offset < len(given))
        assert before + bench.whole(key, len(given))[1] == text


@pytest.mark.parametrize("what", ["cancel", "park", "new kernel"])
def test_what_happens_between_two_steps_with_guesses(loaded: loading.Loaded, what: str) -> None:
    one = Lesson(loaded)
    plain = one.bench()
    keys = [plain.submit([20 + i, 30, 40], max_tokens=60, peer=1 + i, **SEEDED) for i in range(2)]
    plain.run()
    for steps in range(2, 12, 2):
        bench = one.bench()
        bench.engine.guesser = Teacher({key: plain.whole(key)[0] for key in keys}, steps)  # type: ignore[assignment]
        for i in range(2):
            bench.submit([20 + i, 30, 40], max_tokens=60, peer=1 + i, **SEEDED)
        bench.run(steps)
        if what == "cancel":
            bench.engine.cancel(keys[0])
        elif what == "park":
            bench.engine.park(1, True)
            bench.run(5)
            bench.engine.park(1, False)
        else:
            bench.sent.clear()
            for key in keys:
                request = Generate(
                    prompt=[19 + key[0], 30, 40], sampling=Sampling(max_tokens=60, ignore_eos=True, **SEEDED)
                )
                bench.engine.submit(Submit(key, request))
        bench.run()
        for key in keys[what == "cancel" :]:
            assert bench.end(key)
            assert bench.whole(key) == plain.whole(key)
        tidy(bench)


def test_a_tool_call_is_the_same(loaded: loading.Loaded) -> None:
    if loaded.model.n_swa:
        pytest.skip("this model has no dialect")
    messages = [{"role": "user", "content": "x"}]
    for choice in ("required", "auto"):
        _, _, teacher = Lesson(loaded).twice(
            lambda bench, choice=choice: [
                bench.submit(messages=messages, tools=TOOLS, max_tokens=80, **SEEDED) for _ in range(1)
            ]
        )
        assert teacher.guessed or choice


def test_no_guesses_while_a_prompt_is_computed(loaded: loading.Loaded) -> None:
    bench = Lesson(loaded).bench()
    asked: list[int] = []

    class Watched(Teacher):
        def guesses(self, calls: Sequence[Any]) -> list[list[int]]:
            asked.append(len(calls))
            return []

    bench.engine.guesser = Watched({})  # type: ignore[assignment]
    bench.submit([5, 6], max_tokens=30)
    bench.run(3)
    before = len(asked)
    bench.engine.meter._prefill_rate = 64.0
    bench.submit([7] * 300, max_tokens=1)
    while any(call.phase.value != "decode" for call in bench.engine._calls.values()):
        bench.engine.step()
    assert len(asked) == before
    bench.run()
    assert len(asked) > before


def test_the_real_guesser_finds_a_copy(loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that copies its prompt takes few steps; how many tokens were guessed is counted."""
    bench = Lesson(loaded, ahead=FREE).bench()
    prompt = [(13 * i) % 200 + 20 for i in range(80)]
    play(monkeypatch, prompt[4:64])
    key = bench.submit([*prompt, *prompt[:4]], max_tokens=60)
    bench.run()
    assert bench.whole(key)[0] == prompt[4:64]
    assert bench.engine.meter.steps < 20
    assert bench.engine.meter.generated == 60
    counts = bench.engine.stats()["lookahead"]
    assert isinstance(counts, dict)
    assert counts["why"] == "looks up to 15 tokens ahead: costs nothing"
    assert counts["guessed"] >= counts["right"] > 30
    tidy(bench)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lookahead": 0}, "does not look ahead: --lookahead off"),
        ({"exact": True}, "does not look ahead: --exact"),
        ({"lookahead": 3}, "looks up to 3 tokens ahead: asked for; a step of "),
    ],
)
def test_status_shows_the_setting_in_force(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    llama.start()
    loaded = load(tinymodels.write(tmp_path / "tiny.gguf", f16=True), **changes)
    assert loaded.ahead.described.startswith(why)
    loaded.close()


def test_a_recurrent_state_cannot_be_taken_back(tmp_path: Path) -> None:
    llama.start()
    loaded = load(tinymodels.write_like(tmp_path / "mamba.gguf", "mamba", d=128, layers=4))
    assert loaded.ahead.described.startswith("does not look ahead: the model keeps a recurrent state")
    loaded.close()


# ── real models ───────────────────────────────────────────────────────────────────────────────────────────

ORDERS = "\n".join(
    f'{{"order": {7919 * i % 90000 + 10000}, "goods": "{goods}", "total": {313 * i % 900}.{i}5}}'
    for i, goods in enumerate(("oak desk", "garden hose", "reading lamp", "steel kettle", "wool blanket"), 1)
)


def copies(loaded: loading.Loaded, ahead: Lookahead) -> tuple[Bench, list[Any]]:
    """Two calls that continue a copy of earlier text, one greedy and one drawn."""
    bench = Lesson(loaded, ahead=ahead).bench()
    prompt = f"The output of the tool:\n\n{ORDERS}\n\nThe same output once more:\n\n{ORDERS[:60]}"
    keys = [bench.submit(prompt, max_tokens=60), bench.submit(prompt, max_tokens=60, temperature=0.3, seed=4, top_k=3)]
    bench.run()
    return bench, keys


def copies_faster(path: Path) -> None:
    llama.start()
    loaded = load(path, ctx=1024)
    try:
        plain, keys = copies(loaded, Lookahead(0, "off"))
        # Not with the measured costs of steps, because the number of guesses would depend on the machine.
        ahead, _ = copies(loaded, FREE)
        assert ahead.engine.meter.steps < 0.6 * plain.engine.meter.steps
        for key in keys:
            # Rounding differs between batches of several sizes, and may turn a close draw.
            same = sum(one == two for one, two in zip(ahead.whole(key)[0], plain.whole(key)[0], strict=True))
            assert same > 30
        tidy(ahead)
    finally:
        loaded.close()


def test_smollm2_copies_in_fewer_steps(smollm2: Path) -> None:
    copies_faster(smollm2)


def test_gemma3_copies_in_fewer_steps(gemma3: Path) -> None:
    copies_faster(gemma3)
