"""Contexts outside the slots: none is confused with another, budgets hold, and exact text stays exact.

The pure part uses states that consist of their tokens, so that every restored piece can be checked. The rest runs the
engine on a tiny random model with a policy that preempts calls at random.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.llm import ggml, llama, loading
from aiosd.llm.blob import LayerPart, Section, StateLayout, StatePiece
from aiosd.llm.cache import Cache
from aiosd.llm.contexts import GONE, Extent, Store, Swap
from aiosd.llm.engine import Engine
from aiosd.llm.policy import Fifo, Quantum, make
from aiosd.llm.prefix import Tree
from aiosd.llm.saved import Saved
from tests import tinymodels
from tests.test_llm_engine import SLOTS, Bench, Clock, load

# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────

#: K as rows and V transposed; both hold the tokens themselves.
TOY = StateLayout(1, 4, [Section(1, 1, [LayerPart(b"k" * 12, 4, 0), LayerPart(b"v" * 12, 4, 1)])])


def toy(tokens: Sequence[int]) -> StatePiece:
    row = np.asarray(tokens, np.int32).view(np.uint8)
    return StatePiece(np.concatenate([row, row]), len(tokens))


def read(pieces: list[StatePiece], length: int) -> list[int]:
    """The tokens in a block that is made from these pieces."""
    block = TOY.join(pieces, 2, length, np.empty(TOY.size(length), np.uint8))
    whole = TOY.cut(block, 2, length, 0, length).data.view(np.int32).tolist()
    assert whole[:length] == whole[length:]
    return whole[:length]


def store(ram: int, swap: Swap | None = None) -> Store:
    return Store(TOY, ram * TOY.bytes_per_token, swap, Clock())


def add(where: Store, tokens: list[int], scope: str = "", peer: int = 1) -> Any:
    array = np.asarray(tokens, np.int32)
    return where.add(scope, array, len(tokens), lambda a, b: toy(tokens[a:b]), peer)


def find(where: Store, tokens: list[int], scope: str = "") -> list[int]:
    pieces, length = where.find(scope, np.asarray(tokens, np.int32), len(tokens))
    return read(pieces, length) if length else []


texts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(deadline=None)
@given(texts, st.integers(0, 12), st.integers(0, 12))
def test_a_block_cut_and_joined_is_the_same_block(tokens: list[int], a: int, b: int) -> None:
    a, b = sorted((min(a, len(tokens)), min(b, len(tokens))))
    whole = toy(tokens)
    pieces = [TOY.part_of(whole, x, y) for x, y in ((0, a), (a, b), (b, len(tokens)))]
    for length in range(1, len(tokens) + 1):
        assert read(pieces, length) == tokens[:length]


@settings(deadline=None)
@given(
    st.lists(st.tuples(texts, st.sampled_from(["", "g"]), st.sampled_from(["add", "find", "private"])), max_size=30),
    st.integers(0, 60),
    st.sampled_from([0, 10, 1000]),
)
def test_what_is_found_is_what_was_kept_and_budgets_hold(
    steps: list[tuple[list[int], str, str]], ram: int, disk: int
) -> None:
    swap = Swap("/tmp", disk * TOY.bytes_per_token) if disk else None
    where = store(ram, swap)
    kept: dict[str, list[list[int]]] = {"": [], "g": []}
    privates: list[tuple[Any, list[int]]] = []
    try:
        for tokens, scope, what in steps:
            if what == "find":
                found = find(where, tokens, scope)
                assert found == tokens[: len(found)]
                assert not found or any(other[: len(found)] == found for other in kept[scope]), "from nowhere"
                continue
            kept[scope].append(tokens)
            node = add(where, tokens, scope)
            if node is not None and what == "private":
                tail = [9] * 3
                private = where.add_private(node, np.asarray(tail, np.int32), toy(tail))
                if private is not None:
                    privates.append((private, tokens + tail))
            where.check()
            assert where.ram <= where.ram_budget
            assert swap is None or swap.used <= swap.budget
        for private, tokens in privates:
            pieces = where.whole(private)
            assert pieces is None or read(pieces, len(tokens)) == tokens
            where.drop(private)
        where.check()
    finally:
        where.close()


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=12))
def test_with_room_for_everything_the_longest_prefix_is_found(kept: list[list[int]]) -> None:
    where = store(10_000)
    for tokens in kept:
        add(where, tokens)
    for tokens in kept:
        assert find(where, tokens) == tokens
        probe = [*tokens, 7]
        assert find(where, probe) == tokens
    distinct = {tuple(tokens[:n]) for tokens in kept for n in range(1, len(tokens) + 1)}
    assert where.ram == len(distinct) * TOY.bytes_per_token, "a shared token is kept once"


def test_what_many_use_outlives_what_was_used_once() -> None:
    where = store(40)
    system = [1] * 10
    add(where, system)
    add(where, [*system, 2, 2])
    for i in range(3, 30):
        add(where, [i] * 8)
        if i % 4 == 0:
            find(where, system)
    assert find(where, system) == system


def test_under_pressure_contexts_go_to_disk_and_come_back(tmp_path: Path) -> None:
    where = store(30, Swap(str(tmp_path / "new"), 1000 * TOY.bytes_per_token))
    for i in range(20):
        add(where, [i] * 10)
    stats = where.stats()
    assert stats["disk"]["contexts"] >= 17
    assert stats["ram"]["bytes"] <= stats["ram"]["budget"]
    assert list((tmp_path / "new").iterdir()) == [], "the swap file has no name"
    for i in range(20):
        assert find(where, [i] * 10) == [i] * 10
    where.check()
    where.close()


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.randoms(use_true_random=False))
def test_freed_room_in_the_swap_file_is_joined_again(lengths: list[int], rng: Any) -> None:
    with contextlib.closing(Swap("/tmp", 300 * TOY.bytes_per_token)) as swap:
        kept: list[Extent] = []
        for length in lengths:
            extent = swap.put(toy([0] * length))
            if extent is not None:
                kept.append(extent)
            if kept and rng.random() < 0.4:
                swap.free(kept.pop(rng.randrange(len(kept))))
            places = sorted([(e.offset, e.size) for e in kept] + swap._free)
            assert [0, *(offset + size for offset, size in places)] == [*(offset for offset, _ in places), swap.budget]
        for extent in rng.sample(kept, len(kept)):
            swap.free(extent)
        assert swap._free == [(0, swap.budget)]
        assert swap.used == 0


@pytest.mark.parametrize("others", [0, GONE + 1])
def test_contexts_of_ended_agents_are_evicted_first(others: int) -> None:
    where = store(40)
    add(where, [1] * 10, peer=1)
    add(where, [2] * 10, peer=2)
    where.gone(2)
    for peer in range(10, 10 + others):
        where.gone(peer)
    add(where, [1] * 10 + [3] * 10, peer=3)  # that of peer 2 was used later than that of peer 1
    add(where, [4] * 15, peer=4)
    assert find(where, [2] * 10) == []
    assert find(where, [1] * 10) == [1] * 10
    assert len(where._gone) <= GONE


def test_a_piece_damaged_on_disk_is_computed_again(tmp_path: Path) -> None:
    swap = Swap(str(tmp_path), 1000 * TOY.bytes_per_token)
    where = store(20, swap)
    node = add(where, [1] * 10)
    add(where, [2] * 20)
    assert isinstance(node.payload, Extent)
    os.pwrite(swap._file.fileno(), b"\xff", node.payload.offset + 3)
    assert find(where, [1] * 10) == []
    where.check()
    assert add(where, [1] * 10) is not None
    where.close()


@pytest.mark.parametrize("most", [3, 7, 1000])
def test_a_state_is_read_whole_however_much_comes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Linux reads at most 2 GiB in one call."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [view[:most] for view in views], at))
    where = store(20, Swap(str(tmp_path), 1000 * TOY.bytes_per_token))
    node = add(where, [1] * 10)
    add(where, [2] * 20)
    assert isinstance(node.payload, Extent)
    assert find(where, [1] * 10) == [1] * 10
    where.close()


@pytest.mark.parametrize("more", [[1] * 20 + [2] * 5 + [7] * 5, [1] * 20 + [2] * 10 + [8] * 10])
def test_an_ancestor_does_not_go_while_its_child_is_added(tmp_path: Path, more: list[int]) -> None:
    where = store(40, Swap(str(tmp_path), 12 * TOY.bytes_per_token))
    for tokens in ([1] * 20, [1] * 20 + [2] * 10, [3] * 12, [4] * 8):
        add(where, tokens)
    for tokens in ([3] * 12, [4] * 8):  # the first two have been used longest ago, and the disk is full
        find(where, tokens)
    add(where, more)
    where.check()
    assert where.ram <= 40 * TOY.bytes_per_token
    where.close()


def test_a_full_disk_costs_contexts_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    where = store(20, Swap(str(tmp_path), 1000 * TOY.bytes_per_token))
    for i in range(10):
        assert add(where, [i] * 10) is not None
    assert where.stats()["disk"]["failed"] == "No space left on device"
    assert where.evictions["dropped"] > 0
    where.check()
    where.close()


def test_an_emptied_tree_keeps_no_roots() -> None:
    tree: Tree[int] = Tree(lambda payload, count: (payload, payload))
    nodes = [tree.add(f"group {i}", np.array([1, 2], np.int32), 2, lambda at: 0, 0.0) for i in range(5)]
    for node in nodes:
        tree.remove(node)
    assert not tree._roots


# ── the engine ────────────────────────────────────────────────────────────────────────────────────────────


class Restless(Fifo):
    """A policy that takes slots, gives slots and selects calls at random."""

    name = "restless"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def admit(self, waiting: Sequence[Any], running: Sequence[Any], free: int, now: float) -> list[Any]:
        return self.random.sample(list(waiting), min(free, len(waiting)))

    def evict(self, waiting: Sequence[Any], running: Sequence[Any], free: int, now: float) -> list[Any]:
        return [call for call in running if self.random.random() < 0.15]

    def select(self, decoding: list[Any], now: float) -> list[Any]:
        return [call for call in decoding if self.random.random() < 0.8] or decoding


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", f16=True)


KINDS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "plain": {"flash_attention": "off"},
    "flash": {"flash_attention": "on"},
    "own": {},
    "unified": {"kv_layout": "unified"},
}


@pytest.fixture(scope="module", params=KINDS)
def any_loaded(request: pytest.FixtureRequest, model_path: Path) -> Iterator[loading.LoadedModel]:
    if request.param == "own" and not tinymodels.OWN_ATTENTION:
        pytest.skip("not for this processor")
    loaded = load(model_path, **KINDS[request.param])
    assert loaded.flash_attention == (request.param in ("flash", "own"))
    assert (loaded.context.attention is not None) == (request.param == "own")
    yield loaded
    loaded.close()


def engine(loaded: loading.LoadedModel, folder: Path, *, ram: int, disk: int = 0, policy: Any = None) -> Bench:
    loaded.context.clear()
    bench = Bench(loaded)
    bench.engine = Engine(
        loaded.model,
        loaded.context,
        ctx=loaded.ctx,
        slots=SLOTS,
        exact=loaded.spec.exact,
        emit=bench.sent.append,
        clock=bench.clock,
        policy=policy,
        ram=ram,
        disk=disk,
        folder=str(folder),
    )
    return bench


def check(bench: Bench) -> None:
    bench.engine._count()
    cache: Cache = bench.engine.cache
    cache.bases.check()
    for held in cache.slots.free_slots():
        cache.wipe(held.slot)
    assert not cache.bases.used
    if cache.store is not None:
        cache.store.check()
        assert not any(node.private or node.pins for node in cache.store._tree.nodes()), "left behind by a call"
    cache.close()


def crowd(n: int) -> list[list[int]]:
    """Prompts with common beginnings of several lengths."""
    rng = np.random.default_rng(3)
    systems = [rng.integers(5, 260, size).tolist() for size in (90, 40)]
    return [systems[i % 2][: 40 + 10 * (i % 5)] + rng.integers(5, 260, 3 + 7 * i % 20).tolist() for i in range(n)]


@pytest.mark.parametrize(("ram", "disk"), [(1 << 24, 0), (60_000, 1 << 22), (60_000, 0), (0, 0)])
def test_calls_that_lose_their_slot_again_and_again_end_as_if_they_had_not(
    any_loaded: loading.LoadedModel, tmp_path: Path, ram: int, disk: int
) -> None:
    prompts = crowd(12)
    options: dict[str, Any] = {"max_tokens": 25, "temperature": 1.0, "seed": 4, "top_k": 0}
    alone = engine(any_loaded, tmp_path, ram=0)
    expected = [alone.alone(prompt, **options) for prompt in prompts]
    bench = engine(any_loaded, tmp_path, ram=ram, disk=disk, policy=Restless(1))
    keys = [bench.submit(prompt, peer=1 + i, **options) for i, prompt in enumerate(prompts)]
    bench.run(5000)
    told = [bench.whole(key)[0] for key in keys]
    assert sum(bench.end(key).usage.preemptions for key in keys) > len(keys)
    if any_loaded.spec.exact:
        assert told == expected
    assert [len(tokens) for tokens in told] == [25] * 12
    check(bench)


@pytest.mark.parametrize("more", [{"max_tokens": 0}, {"budget": 20}])
def test_a_prompt_that_is_not_computed_is_not_charged(
    any_loaded: loading.LoadedModel, tmp_path: Path, more: dict[str, int]
) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    key = bench.submit([5] * 50, **more)
    bench.run()
    usage = bench.end(key).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (50, 50, 0)
    assert bench.engine.meter.stats()["tokens_prefilled"] == 0
    check(bench)


@pytest.mark.parametrize("budget", [0, 100_000])
def test_states_that_cannot_be_cut_stay_within_their_budget(
    any_loaded: loading.LoadedModel, tmp_path: Path, budget: int
) -> None:
    bench = engine(any_loaded, tmp_path, ram=0, policy=Turns())
    cache = bench.engine.cache
    cache._budgets = (budget, 0, "")
    keys = [bench.submit([5 + i] * 60, peer=1 + i, max_tokens=12) for i in range(4 * SLOTS)]
    most = 0
    while bench.engine.has_work:
        bench.run(1)
        most = max(most, cache.stats()["tiers"]["ram"]["bytes"])
    assert most <= budget
    assert (most > 0) == (budget > 0)
    assert [len(bench.whole(key)[0]) for key in keys] == [12] * len(keys)
    assert cache.stats()["tiers"]["ram"]["bytes"] == 0
    check(bench)


@pytest.mark.parametrize("ram", [1 << 24, 200_000, 60_000, 0])
def test_buffers_for_copies_count_in_the_budget(any_loaded: loading.LoadedModel, tmp_path: Path, ram: int) -> None:
    any_loaded.context.drop_buffers()
    bench = engine(any_loaded, tmp_path, ram=ram, policy=Restless(1))
    any_loaded.context.drop_buffers()  # of the sample
    for i, prompt in enumerate(crowd(12)):
        bench.submit(prompt, peer=1 + i, max_tokens=25)
    moved = 0
    while bench.engine.has_work:
        bench.run(1)
        tier = bench.engine.cache.stats()["tiers"]["ram"]
        assert tier["bytes"] + tier["buffers"] <= ram
        assert tier["buffers"] == any_loaded.context.buffer_bytes
        moved = max(moved, tier["buffers"])
    assert moved <= ram // 4
    assert (moved > 0) == (ram > 0), "they stay where there is room"
    check(bench)


@pytest.mark.parametrize("name", ["fair", "rr"])
def test_where_contexts_find_no_room_calls_come_to_their_end(
    any_loaded: loading.LoadedModel, tmp_path: Path, name: str
) -> None:
    bench = engine(any_loaded, tmp_path, ram=20_000, policy=make(name, Quantum(8, 100.0), {}))
    keys = [bench.submit([5 + i] * 50, peer=1 + i, max_tokens=60) for i in range(3 * SLOTS)]
    bench.run(4000)
    assert [len(bench.whole(key)[0]) for key in keys] == [60] * len(keys)
    check(bench)


def test_a_crowd_with_one_prompt_computes_it_once(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    system = list(range(5, 205))
    keys = [bench.submit([*system, 230 + i, 7, 8], peer=1 + i) for i in range(12)]
    bench.run()
    computed = bench.engine.meter.computed
    assert computed <= 203 + 11 * 4, f"{computed} tokens computed"
    assert [bench.end(key).usage.cached_tokens for key in keys[1:]] == [200] * 11
    assert bench.engine.cache.hits == 11
    check(bench)


def test_the_prompt_of_a_running_call_is_shared_before_it_ends(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    system = list(range(5, 105))
    long = bench.submit([*system, 1, 2], peer=1, max_tokens=200)
    bench.run(20)
    short = bench.submit([*system, 3, 4], peer=2, max_tokens=2)
    bench.run(20)
    assert bench.end(short).usage.cached_tokens == 100
    assert any(sequence.key == long for sequence in bench.engine.slots.owners()), "the first call still runs"
    bench.run()
    check(bench)


def test_only_public_contexts_are_shared_between_groups(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    prompt = list(range(5, 105))
    cached = []
    for group, public in (("a", False), ("b", False), ("a", True), ("b", True), ("a", False)):
        key = bench.submit(prompt, group=group, public=public, max_tokens=1)
        bench.run()
        cached.append(bench.end(key).usage.cached_tokens)
    most = 98 if any_loaded.spec.exact else 99
    assert cached == [0, 0, 0, most, most]
    check(bench)


def test_a_conversation_finds_its_context_though_others_had_its_slot(
    any_loaded: loading.LoadedModel, tmp_path: Path
) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    talks: list[list[int]] = [[5 + i, *range(20, 80), 6, 5 + i] for i in range(3 * SLOTS)]
    for turn in range(3):
        for i, talk in enumerate(talks):
            key = bench.submit(talk, peer=i + 1, max_tokens=8)
            bench.run()
            end = bench.end(key)
            if turn and not any_loaded.spec.exact:
                assert end.usage.cached_tokens >= len(talk) - 5, "all but the last answer's end and what is new"
            elif turn:
                assert end.usage.cached_tokens >= 60, "all that was prefilled"
            talk += [*bench.whole(key)[0], 9, 9, 9]
    check(bench)


class Turns(Fifo):
    """A policy in which a call gives up its slot after three tokens if others wait."""

    name = "turns"

    def evict(self, waiting: Sequence[Any], running: Sequence[Any], free: int, now: float) -> list[Any]:
        return [call for call in running if call.num_generated % 3 == 2] if len(waiting) > free else []


def test_only_what_is_new_of_a_context_is_read_from_its_slot(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24, policy=Turns())
    system = [5 + i % 200 for i in range(300)]
    keys = [bench.submit([*system, 210 + i, 7, 8], peer=1 + i, max_tokens=6) for i in range(3 * SLOTS)]
    bench.run()
    cache, preemptions = bench.engine.cache, sum(bench.end(key).usage.preemptions for key in keys)
    assert cache.store is not None
    assert preemptions > 2 * SLOTS
    whole, own = cache.store.layout.size(300), cache.store.layout.size(10)
    if cache.bases.possible or cache.cells is not None:  # the prompt is read where it lies
        assert preemptions * cache.store.layout.size(1) < cache.copied["restored"] < 2 * whole + preemptions * own
    else:
        assert cache.copied["restored"] > preemptions * whole
    assert cache.copied["saved"] < 2 * whole + preemptions * own, "the prompt, and of each its own"
    check(bench)


def test_a_call_whose_given_tokens_others_have_too_gives_its_slot_up(
    any_loaded: loading.LoadedModel, tmp_path: Path
) -> None:
    """After a core's death the given tokens are searched like a prompt, and so may be read from a base."""
    bench = engine(any_loaded, tmp_path, ram=1 << 24, policy=Turns())
    words = [5 + i % 200 for i in range(120)]
    first = bench.submit([*words, 7], peer=1, max_tokens=40)
    bench.engine.step()
    others = [bench.submit(words[:60], peer=2 + i, given=words[60:], max_tokens=70) for i in range(3 * SLOTS)]
    bench.run()
    assert [bench.end(key).finish_reason for key in (first, *others)] == ["length"] * (1 + 3 * SLOTS)
    if not any_loaded.spec.exact:  # with --exact they are replayed first, in their slots
        assert sum(bench.end(key).usage.preemptions for key in others) > SLOTS
    check(bench)


def test_free_slots_keep_no_memory_that_is_needed(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    per_token = StateLayout.of(any_loaded.context.sample()).bytes_per_token  # type: ignore[union-attr]
    bench = engine(any_loaded, tmp_path, ram=300 * per_token)
    prompt = [5 + i % 200 for i in range(99)]
    for i in range(SLOTS):
        bench.submit([*prompt, 5 + i], peer=1 + i, max_tokens=3)
    bench.run()
    cache = bench.engine.cache
    assert bool(cache.bases.used) == cache.bases.possible
    # of 300, of which a quarter is for states that are being copied
    tokens = np.arange(220, dtype=np.int32)
    piece = StatePiece(np.zeros(220 * per_token, np.uint8), 220)
    assert cache.take_in("other", tokens, piece, 9) == 220
    check(bench)


def test_time_spent_copying_is_counted_once(
    any_loaded: loading.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24, policy=Turns())
    cache, context, now = bench.engine.cache, any_loaded.context, [0.0]
    monkeypatch.setattr(cache, "_clock", lambda: now[0])

    def slow(plain: Any) -> Any:
        def takes_a_second(*args: Any) -> Any:
            now[0] += 1
            return plain(*args)

        return takes_a_second

    for name in ("read", "restore"):  # nothing else takes time
        monkeypatch.setattr(context, name, slow(getattr(context, name)))
    system = [5 + i % 200 for i in range(60)]
    for turn in range(2):
        for i in range(3 * SLOTS):
            bench.submit([*system, 210 + i, 7, 8, *[9] * turn * 20], peer=1 + i, max_tokens=6)
        bench.run()
    assert now[0] > 6 * SLOTS
    assert cache.copy_s == now[0]
    check(bench)


def test_a_leader_that_is_cancelled_leaves_its_followers_running(
    any_loaded: loading.LoadedModel, tmp_path: Path
) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    system = [5 + i % 200 for i in range(400)]
    first = bench.submit([*system, 1], peer=1)
    rest = [bench.submit([*system, 2 + i], peer=2 + i, max_tokens=3) for i in range(3)]
    bench.run(1)
    bench.engine.cancel(first)
    bench.run()
    assert [len(bench.whole(key)[0]) for key in rest] == [3, 3, 3]
    check(bench)


def test_a_parked_leader_does_not_delay_others(any_loaded: loading.LoadedModel, tmp_path: Path) -> None:
    bench = engine(any_loaded, tmp_path, ram=1 << 24)
    system = [5 + i % 200 for i in range(400)]
    bench.submit([*system, 1], peer=1, max_tokens=2)
    follower = bench.submit([*system, 2], peer=2, max_tokens=3)
    bench.run(1)
    bench.engine.park(1, True)
    bench.run()
    assert len(bench.whole(follower)[0]) == 3
    bench.engine.park(1, False)
    bench.run()
    check(bench)


def test_a_layout_is_learnt_from_llama_and_joins_to_the_same_bytes(any_loaded: loading.LoadedModel) -> None:
    context = any_loaded.context
    context.clear()
    batch = llama.BatchBuffer(64)
    batch.size = n = 40
    batch.tokens[:n], batch.positions[:n], batch.sequences[:n], batch.wanted[:n] = range(5, 45), range(n), 1, 0
    batch.wanted[n - 1] = 1
    assert context.decode(batch) == llama.OK
    block = context.read(1).copy()
    layout = StateLayout.of(block)
    assert layout is not None
    pieces = [layout.cut(block, 1, n, a, b) for a, b in ((0, 7), (7, 30), (30, 40))]
    assert (layout.join(pieces, 1, n, np.empty(layout.size(n), np.uint8)) == block).all()
    plain = layout.plain(pieces[1])
    assert (layout.own(plain).data == pieces[1].data).all()
    assert (plain.data == pieces[1].data).all() == bool(any_loaded.flash_attention), "values are transposed without it"
    context.clear()
    assert StateLayout.of(context.read(0)) is None


def test_a_build_of_llama_cpp_is_identified_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds with the same version, 0.5.0-dev, are distinguished, and so are states saved with them."""

    def build() -> str:
        monkeypatch.setattr(ggml, "C", SimpleNamespace(_lib=SimpleNamespace(_name=str(tmp_path / "libllama.so"))))
        return ggml.build.__wrapped__()

    (tmp_path / "libllama.so").write_bytes(b"the one")
    (tmp_path / "libggml.so").write_bytes(b"the same")
    one, again = build(), build()
    (tmp_path / "libggml.so").write_bytes(b"another")
    assert one == again != build()


@pytest.mark.parametrize("kinds", [("flash", "plain"), ("unified", "flash"), ("plain", "unified")])
def test_a_state_saved_with_flash_attention_is_of_use_without_and_the_other_way_round(
    model_path: Path, tmp_path: Path, kinds: tuple[str, str]
) -> None:
    """A state of a slot with cells of its own can also be restored where all slots share cells, and vice versa."""
    tokens = np.arange(5, 205, dtype=np.int32)
    texts = []
    for step, kind in enumerate(kinds):
        loaded = load(model_path, **KINDS[kind])
        bench = engine(loaded, tmp_path, ram=1 << 24)
        cache = bench.engine.cache
        assert cache.store is not None
        other = bench.submit(list(range(5, 60)), peer=2, max_tokens=30)
        bench.run(3)
        saved = Saved(str(tmp_path), {"layout": cache.store.layout.description}, cache.store.layout)
        if step == 1:
            opened = saved.read("g", "n")
            assert not opened.refused
            assert opened.piece is not None
            assert cache.take_in("", tokens, opened.piece, 1) == len(tokens)
        key = bench.submit([*tokens.tolist(), 7, 8], peer=1, max_tokens=12)
        bench.run()
        assert bench.end(key).usage.cached_tokens == (len(tokens) if step else 55)
        assert len(bench.whole(other)[0]) == 30
        texts.append(bench.whole(key)[0])
        if step == 0:
            saved.write("g", "n", [], tokens, cache.export("", tokens, 1))
        check(bench)
        loaded.close()
    assert texts[0] == texts[1]
