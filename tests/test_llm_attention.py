"""Our attention gives the same results as llama.cpp's, whatever the shape of heads and batches, and the state
that it reads outside of the cache counts as if it lay in the cache. The use of bases
by slots is counted correctly."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.llm import llama
from aiosd.llm.arrays import Tokens
from aiosd.llm.attention import Attention, Unavailable
from aiosd.llm.bases import Bases
from aiosd.llm.blob import StateLayout, StatePiece
from aiosd.llm.contexts import Store, Swap
from aiosd.llm.prefix import most_shared
from tests import tinymodels
from tests.test_llm_engine import load

SLOTS, CTX = 6, 512

#: Heads of 32 to 256 values, one to eight of which share K and V.
SHAPES: dict[str, dict[str, Any]] = {
    "32x3": {"d": 96, "heads": 3, "kv_heads": 3},
    "32x6/2": {"d": 192, "heads": 6, "kv_heads": 2},
    "64x8/1": {"d": 512, "heads": 8, "kv_heads": 1, "ff": 64},
    "96x2/1": {"d": 192, "heads": 2, "kv_heads": 1},
    "256x2": {"d": 512, "heads": 2, "kv_heads": 2, "ff": 64},
}

#: Numbers of tokens in consecutive batches.
PLANS = [(1, 1, 1), (2, 3, 1), (7, 1), (40, 1, 1), (75, 33), (129, 2)]

pytestmark = pytest.mark.skipif(not tinymodels.OWN_ATTENTION, reason="not for this processor")


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Model]:
    llama.start()
    path = tinymodels.write(tmp_path_factory.mktemp("gguf") / "shape.gguf", **SHAPES[request.param])
    model = llama.Model(str(path), 0, lambda fraction: None)
    yield model
    model.close()


def context(model: llama.Model, attention: Attention | None, threads: int = 1) -> llama.LlamaContext:
    return llama.LlamaContext(
        model,
        slots=SLOTS,
        ctx=CTX,
        ubatch=512,
        threads=threads,
        flash_attention=attention is not None,
        attention=attention,
    )


def decode(
    context: llama.LlamaContext, slots: list[int], starts: list[int], tokens: np.ndarray[Any, Any]
) -> llama.Floats:
    """Decode; returns the logits after the last token of each slot, one row each."""
    rows, size = tokens.shape
    batch = llama.BatchBuffer(rows * size)
    batch.size = rows * size
    batch.sequences[:] = np.repeat(slots, size)
    batch.positions[:] = np.concatenate([np.arange(start, start + size) for start in starts])
    batch.tokens[:] = tokens.ravel()
    batch.wanted[size - 1 :: size] = 1
    assert context.decode(batch) == llama.OK
    return context.logits(rows).copy()


def assert_same(ours: llama.Floats, theirs: llama.Floats) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.005 * np.abs(theirs).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", ["0", "8"])
def test_logits_are_those_of_llama_cpp(
    model: llama.Model, monkeypatch: pytest.MonkeyPatch, width: str, threads: int
) -> None:
    monkeypatch.setenv("AIOS_VECTOR_WIDTH", width)
    attention = Attention.load(SLOTS)
    both = context(model, None, threads), context(model, attention, threads)
    rng = np.random.default_rng(1)
    for plan in PLANS:
        for slots in ([0], [2, 3, 4], [0, 1, 4, 5]):
            fitting = [size for size in plan if size * len(slots) <= 512]
            tokens = rng.integers(5, model.n_vocab, (len(slots), sum(fitting)))
            at = 0
            for one in both:
                one.clear()
            for size in fitting:
                theirs, ours = (decode(c, slots, [at] * len(slots), tokens[:, at : at + size]) for c in both)
                assert_same(ours, theirs)
                at += size
    assert attention.used
    for one in both:
        one.close()


@pytest.mark.parametrize("width", ["0", "8"])
@pytest.mark.parametrize("window", [16, 100])
def test_a_sliding_window_is_what_it_is_for_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, width: str
) -> None:
    """Rows of one batch have windows that begin at different cells, also within one item of work."""
    monkeypatch.setenv("AIOS_VECTOR_WIDTH", width)
    path = tinymodels.write_like(tmp_path / "m.gguf", "gemma3", window=window, layers=7, d=128)
    model = llama.Model(str(path), 0, lambda fraction: None)
    attention = Attention.load(SLOTS)
    both = context(model, None), context(model, attention)
    rng = np.random.default_rng(2)
    at = 0
    for size in (1, 70, 1, 3, 1, 1, 90, 2, 1, 40):
        tokens = rng.integers(5, model.n_vocab, (2, size))
        theirs, ours = (decode(one, [1, 2], [at, at], tokens) for one in both)
        assert_same(ours, theirs)
        at += size
    assert attention.used
    for one in both:
        one.close()
    model.close()


def test_sequences_of_different_lengths_in_one_batch(model: llama.Model) -> None:
    both = context(model, None), context(model, Attention.load(SLOTS))
    rng = np.random.default_rng(2)
    lengths = [3, 300, 17, 64, 1, 255]
    for slot, length in enumerate(lengths):
        tokens = rng.integers(5, model.n_vocab, (1, length))
        for one in both:
            decode(one, [slot], [0], tokens)
    for step in range(3):
        tokens = rng.integers(5, model.n_vocab, (SLOTS, 1))
        starts = [length + step for length in lengths]
        theirs, ours = (decode(one, list(range(SLOTS)), starts, tokens) for one in both)
        assert_same(ours, theirs)
    for one in both:
        one.close()


@pytest.mark.parametrize("width", ["0", "8"])
def test_what_lies_outside_of_the_cache_counts_as_if_it_lay_in_it(
    model: llama.Model, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    """There are two bases, in pieces of uneven length. Four slots use one, one slot a part of it, and one the other."""
    monkeypatch.setenv("AIOS_VECTOR_WIDTH", width)
    attention = Attention.load(SLOTS)
    ours = context(model, attention)
    layout = StateLayout.of(ours.sample())
    assert layout is not None
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, model.n_vocab, (1, length)) for length in (150, 70)]
    stands = [(0, 150), (0, 150), (0, 90), (1, 70), (0, 150), (0, 150)]
    theirs = context(model, None)
    for slot, (which, length) in enumerate(stands):
        decode(theirs, [slot], [0], prompts[which][:, :length])
    pieces = []
    for prompt in prompts:
        ours.clear()
        decode(ours, [0], [0], prompt)
        n = prompt.shape[1]
        whole = layout.cut(ours.read(0), 0, n, 0, n)
        pieces.append([layout.part_of(whole, 0, 33), layout.part_of(whole, 33, n)])
    ours.clear()
    attention.set_layout(layout.sizes)
    attention.set_runs([(piece.data.ctypes.data, piece.length) for two in pieces for piece in two])
    attention.base_run[:] = [2 * which for which, _ in stands]
    attention.base_length[:] = lengths = [length for _, length in stands]
    for size, done in ((20, 0), (1, 20), (1, 21), (5, 22)):
        tokens = rng.integers(5, model.n_vocab, (SLOTS, size))
        starts = [length + done for length in lengths]
        slots = list(range(SLOTS))
        assert_same(decode(ours, slots, starts, tokens), decode(theirs, slots, starts, tokens))
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("arch", "why"), [("gemma2", "caps its attention scores"), ("mamba", "recurrent state")])
def test_what_it_cannot_compute_is_left_to_llama_cpp(tmp_path: Path, arch: str, why: str) -> None:
    """The model is served with llama.cpp's attention, and its status gives the reason."""
    loaded = load(tinymodels.write_like(tmp_path / f"{arch}.gguf", arch, d=32))
    assert loaded.context.attention is None
    assert re.fullmatch(rf"llama\.cpp \(.*{why}\)", loaded.attention)
    loaded.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_quantised_models_are_served_with_it(tmp_path: Path, kind: str) -> None:
    """They round activations to 8 bits: two attentions that differ in the last bit differ by percents in the logits, so
    logits are not what tells whether ours is right."""
    plain = tinymodels.write(tmp_path / "m.gguf", d=256, heads=4, kv_heads=2, ff=256, layers=24)
    loaded = load(tinymodels.quantise(plain, kind))
    assert loaded.attention == "aiosd"
    loaded.close()


@pytest.mark.parametrize(
    ("errors", "why"),
    [
        ((0.5, 0.0, 0.0), "means something else"),
        ((0.0, 0.01, 0.0), "wrong for this model by 1.0%"),
        ((0, 0, 1), "shared"),
    ],
)
def test_an_attention_that_computes_something_else_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    errors: tuple[float, ...],
    why: str,
) -> None:
    monkeypatch.setattr(Attention, "errors", property(lambda self: errors))
    loaded = load(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"]))
    assert loaded.context.attention is None
    assert why in loaded.attention
    assert why in caplog.text
    loaded.close()


def test_a_wrong_result_of_ours_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K is read from a wrong place, as an example of any fault in our computation."""
    set_runs = Attention.set_runs
    monkeypatch.setattr(Attention, "set_runs", lambda self, runs: set_runs(self, [(at + 64, n) for at, n in runs]))
    loaded = load(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"]))
    assert "ours would be wrong" in loaded.attention
    loaded.close()


@pytest.mark.parametrize("how", ["inf", "nan"])
@pytest.mark.parametrize("length", [2, 3, 20, 70])
@pytest.mark.parametrize("width", ["0", "8"])
def test_a_row_is_not_spoilt_by_what_it_must_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str, length: int, how: str
) -> None:
    """The last token of a prompt has an infinite value, which the tokens before it must not see."""
    monkeypatch.setenv("AIOS_VECTOR_WIDTH", width)
    bad = 200
    path = tinymodels.spoil(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"], layers=1), bad, how)
    model = llama.Model(str(path), 0, lambda fraction: None)
    ours = context(model, Attention.load(SLOTS))
    tokens = np.arange(length) % 100 + 20
    alone = decode(ours, [0], [0], tokens[None])
    ours.clear()
    batch = llama.BatchBuffer(length + 1)
    batch.size = length + 1
    batch.positions[:] = np.arange(length + 1)
    batch.tokens[:] = [*tokens, bad]
    batch.wanted[-2] = 1
    assert ours.decode(batch) == llama.OK
    together = ours.logits(1)
    assert np.isfinite(together).all()
    assert_same(together, alone)
    batch.wanted[-2:] = 0, 1
    ours.clear()
    assert ours.decode(batch) == llama.OK
    assert not np.isfinite(ours.logits(1)).all(), "the spoilt token itself is no number"
    ours.close()
    model.close()


def test_threads_that_come_and_go_leave_nothing(model: llama.Model) -> None:
    """OpenMP keeps its threads; a ggml without OpenMP starts new ones for each graph."""
    ours = context(model, Attention.load(SLOTS))
    tokens = np.arange(5, 25)[None]

    def one() -> None:
        ours.clear()
        decode(ours, [0], [0], tokens)

    def some(count: int) -> int:
        for _ in range(count):
            thread = threading.Thread(target=one)
            thread.start()
            thread.join()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = some(20)
    assert some(200) - before < 20 << 20
    ours.close()


def test_a_state_in_another_order_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of the layers are read at their places in a sequence's state. If these ever change, it is detected."""
    monkeypatch.setattr(StateLayout, "sizes", property(lambda self: [0] * len(self._parts)))
    loaded = load(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"]))
    assert loaded.context.attention is None
    loaded.close()


@pytest.mark.parametrize("options", [{"exact": True}, {"flash_attention": "on"}, {"flash_attention": "off"}])
def test_another_attention_can_be_chosen(tmp_path: Path, options: dict[str, Any]) -> None:
    loaded = load(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"]), **options)
    assert loaded.context.attention is None
    assert next(iter(options)).replace("_", "-") in loaded.attention
    loaded.close()


def test_without_the_compiled_part_llama_cpps_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiosd.llm.attention._tensors_as_known", lambda *args: False)
    with pytest.raises(Unavailable):
        Attention.load(4)
    loaded = load(tinymodels.write(tmp_path / "m.gguf", **SHAPES["32x6/2"]))
    assert loaded.context.attention is None
    assert loaded.attention == "llama.cpp (this llama.cpp lays out its tensors in another way)"
    loaded.close()


# ── which slots use which bases ───────────────────────────────────────────────────────────────────────────


class Rows:
    """A minimal layout for bases and store: four bytes per token, K and V of one layer."""

    by_rows, bytes_per_token, sizes = True, 4, [2, 2]

    def part_of(self, piece: StatePiece, start: int, stop: int) -> StatePiece:
        return StatePiece(piece.data[4 * start : 4 * stop].copy(), stop - start)


def new_store(ram: int = 100_000) -> Store:
    return Store(Rows(), ram)  # type: ignore[arg-type]


def keep(store: Store, tokens: Tokens, stop: int) -> None:
    store.add("", tokens, stop, lambda a, b: StatePiece(tokens[a:b].view(np.uint8).copy(), b - a))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(0, 4), st.integers(0, 2), st.integers(20, 100)),
            st.tuples(st.just("cut"), st.integers(0, 4), st.integers(0, 120), st.none()),
            st.tuples(st.just("exchange"), st.integers(0, 4), st.integers(0, 4), st.none()),
            st.tuples(st.just("divide"), st.integers(0, 4), st.integers(1, 99), st.none()),
        ),
        max_size=40,
    )
)
def test_bases_exist_while_a_slot_uses_them_and_no_longer(steps: list[tuple[Any, ...]]) -> None:
    """Whatever happens, each slot reads exactly the tokens of its base, while the store divides its pieces."""
    attention, store = Attention.load(5), new_store()
    bases = Bases(attention, store, 5, budget=900)
    prompts = [np.arange(100, dtype=np.int32) + 1000 * i for i in range(3)]
    for prompt in prompts:
        keep(store, prompt, 100)
    expected: list[tuple[int, int] | None] = [None] * 5
    for what, slot, other, length in steps:
        if what == "take" and expected[slot] is None:
            got = bases.take(slot, "", prompts[other], length)
            assert got in (0, length)
            expected[slot] = (other, got) if got else None
        elif what == "cut":
            bases.cut(slot, other)
            held = expected[slot]
            expected[slot] = (held[0], min(held[1], other)) if held and other else None
        elif what == "exchange":
            bases.exchange(slot, other)
            expected[slot], expected[other] = expected[other], expected[slot]
        elif what == "divide":
            keep(store, np.append(prompts[slot % 3][:other], [7, 7]).astype(np.int32), other + 2)
            bases.sync()
        bases.check()
        store.check()
        assert bases.used <= 900
        for slot, held in enumerate(expected):
            assert bases.length(slot) == attention.base_length[slot] == (held[1] if held else 0)
            if held is not None:
                assert read(attention, slot).tolist() == prompts[held[0]][: held[1]].tolist()
    for slot in range(5):
        bases.drop(slot)
    assert bases.used == 0
    assert not any(node.pins for node in store._tree.nodes())


def read(attention: Attention, slot: int) -> Tokens:
    """The tokens that attention.c would read for a slot."""
    found: list[int] = []
    at = attention.base_run[slot]
    while len(found) < attention.base_length[slot]:
        address, tokens = attention._runs[at]
        found.extend(np.ctypeslib.as_array((ctypes.c_int32 * int(tokens)).from_address(int(address))).tolist())
        at += 1
    return np.array(found[: attention.base_length[slot]], np.int32)


def test_what_is_pinned_is_what_is_read_and_is_counted_once() -> None:
    store = new_store()
    bases = Bases(Attention.load(3), store, 3, budget=100_000)
    tokens = np.arange(1900, dtype=np.int32)
    keep(store, tokens, 1900)
    assert bases.take(0, "", tokens, 34) == 34
    assert bases.used == 4 * 34
    assert bases.take(1, "", tokens, 64) == 64
    assert bases.used == 4 * 64
    assert {node.stop: node.pins for node in store._tree.nodes()} == {34: 1, 64: 1, 1900: 0}
    bases.drop(1)
    assert bases.used == 4 * 34


def test_a_base_that_many_slots_use_is_popular() -> None:
    store = new_store()
    bases = Bases(Attention.load(8), store, 8, budget=100_000)
    tokens = np.arange(200, dtype=np.int32)
    keep(store, tokens, 200)
    bases.take(0, "", tokens, 50)
    assert bases.popular("", tokens[:150]) == 0, "one in eight are not many"
    bases.take(1, "", tokens, 50)
    assert bases.popular("", tokens[:150]) == 50
    assert bases.popular("", tokens) == 0, "so many more may be worth another"
    assert bases.popular("", tokens[:49]) == 0
    assert bases.popular("another", tokens[:150]) == 0
    assert bases.popular("", tokens[:150] + 1) == 0


def test_many_tiny_pieces_are_no_base() -> None:
    store = new_store()
    bases = Bases(Attention.load(1), store, 1, budget=1000)
    tokens = np.arange(100, dtype=np.int32)
    for stop in range(4, 101, 4):
        keep(store, tokens, stop)
    assert bases.take(0, "", tokens, 100) == 0
    bases.check()


def test_a_piece_on_disk_is_no_base(tmp_path: Path) -> None:
    store = Store(Rows(), 500, Swap(str(tmp_path), 1000))  # type: ignore[arg-type]
    bases = Bases(Attention.load(1), store, 1, budget=1000)
    one, two = np.arange(100, dtype=np.int32), np.arange(1000, 1100, dtype=np.int32)
    keep(store, one, 100)
    keep(store, two, 100)
    assert bases.take(0, "", one, 90) == 0
    assert bases.take(0, "", two, 90) == 90
    store.close()


def test_what_many_begin_with_is_cut_where_it_saves_most() -> None:
    assert most_shared([]) == 0
    assert most_shared([0, 0]) == 0
    assert most_shared([512] * 60 + [515, 520, 520]) == 512, "not where two go on together by chance"
    assert most_shared([40, 2000, 2000]) == 2000
