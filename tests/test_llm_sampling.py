"""Drawing a token from a row of logits: the same for the same (seed, index) in numpy and in C, and always one that the
filters leave."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm import llama
from aiosd.llm.arrays import LogitRow
from aiosd.llm.mirostat import Mirostat
from aiosd.llm.options import SamplerFactory
from aiosd.llm.penalties import Dry, Edits, penalise, repeats
from aiosd.llm.sampling import NOTHING, Drawer, Sampler, draws, exponential, uniform
from libaios.wire import Sampling
from tests import tinymodels

seeds = st.integers(0, (1 << 63) - 1)


def sampler(**changes: float) -> Sampler:
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    return Sampler(**{**plain, **changes})  # type: ignore[arg-type]


def row(seed: int, n: int = 300) -> LogitRow:
    return np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)


@pytest.fixture(scope="module")
def native() -> Drawer:
    drawer = Drawer()
    assert drawer.native, "the part in C was not compiled"
    return drawer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Model]:
    llama.start()
    model = llama.Model(str(tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")), 0, lambda done: None)
    yield model
    model.close()


# ── chance and the filters ────────────────────────────────────────────────────────────────────────────────


@given(seeds, st.integers(0, 1 << 20))
def test_uniform_is_in_range_and_repeatable(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)


def test_uniform_is_flat_and_neighbours_are_independent() -> None:
    values = np.array([[uniform(seed, index) for index in range(100)] for seed in range(100)])
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert counts.min() > 400
    assert counts.max() < 600
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.05


def test_the_exponential_is_good_to_the_last_bits() -> None:
    x = np.concatenate([-np.logspace(-12, 2.85, 2000), [0.0, -708.0]])
    assert np.allclose(exponential(x), np.exp(x), rtol=1e-14, atol=0)
    assert list(exponential(np.array([-708.5, -1e9, -np.inf]))) == [0, 0, 0]


@given(seeds, st.integers(0, 1000), st.integers(0, 20))
def test_same_seed_and_index_same_token(seed: int, index: int, data: int) -> None:
    a, b = sampler(seed=seed, top_k=40, top_p=0.9), sampler(seed=seed, top_k=40, top_p=0.9)
    assert a.draw(row(data), index) == b.draw(row(data).copy(), index)


#: Tokens of an older sampler, which worked on single rows: its texts must stay the same.
OLD = {
    (0.8, 40, 0.95, 0.05): [219, 273, 256, 9, 292, 58, 170, 103, 57, 23, 295, 117],
    (1.0, 0, 0.5, 0.0): [219, 273, 105, 9, 292, 185, 170, 103, 57, 63, 295, 117],
    (2.0, 5, 1.0, 0.0): [270, 183, 220, 9, 292, 58, 152, 103, 57, 23, 111, 117],
}


@pytest.mark.parametrize("parameters", OLD)
def test_seeds_give_the_tokens_that_they_gave_before(parameters: tuple[float, int, float, float]) -> None:
    temperature, k, p, least = parameters
    drawn = [
        sampler(temperature=temperature, top_k=k, top_p=p, min_p=least, seed=4711).draw(row(data), data)
        for data in range(12)
    ]
    assert drawn == OLD[parameters]


@given(st.integers(0, 50), st.integers(1, 400), st.integers(0, 100))
def test_top_k_leaves_the_k_likeliest(data: int, k: int, index: int) -> None:
    logits = row(data)
    ids, _ = sampler(top_k=k).candidates(logits)
    assert len(ids) == min(k, len(logits))
    assert set(ids) == set(np.argsort(-logits)[:k])
    assert sampler(top_k=k).draw(logits, index) in ids


@given(st.integers(0, 50), st.floats(0.01, 0.999))
def test_top_p_leaves_the_smallest_head_that_reaches_p(data: int, p: float) -> None:
    logits = row(data)
    weights = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    weights /= weights.sum()
    ids, _ = sampler(top_p=p).candidates(logits)
    assert weights[: len(ids)].sum() >= p - 1e-9
    assert weights[: len(ids) - 1].sum() < p + 1e-9


@given(st.integers(0, 50), st.floats(0.001, 1.0))
def test_min_p_leaves_what_is_likely_enough(data: int, p: float) -> None:
    logits = row(data)
    ids, _ = sampler(min_p=p).candidates(logits)
    relative = exponential(logits.astype(np.float64) - float(logits.max()))
    assert set(ids) == set(np.flatnonzero(relative >= p))


def test_ties_at_the_edge_of_top_k_are_broken_by_id() -> None:
    ids, _ = sampler(top_k=3).candidates(np.array([1, 2, 1, 1, 2], np.float32))
    assert list(ids) == [1, 4, 0]


def test_temperature_zero_is_the_likeliest_and_forbidden_tokens_are_never_drawn() -> None:
    logits = row(3)
    assert sampler(temperature=0).draw(logits, 0) == logits.argmax()
    logits[10:] = -np.inf
    assert all(sampler(top_k=40).draw(logits, index) < 10 for index in range(200))


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    drawn = np.bincount([sampler().draw(logits, index) for index in range(5000)], minlength=3) / 5000
    assert np.allclose(drawn, [0.7, 0.2, 0.1], atol=0.03)


# ── in C, for all rows at once ────────────────────────────────────────────────────────────────────────────


def hostile_rows(kind: int, rng: np.random.Generator, rows: int, n: int) -> LogitRow:
    """Rows as of a model; with many equal logits; with forbidden tokens; with hardly any usable token."""
    logits: LogitRow = rng.normal(0, 3, (rows, n)).astype(np.float32)
    if kind == 1:
        logits = np.round(logits)
    if kind == 2:
        logits[rng.random(logits.shape) < 0.3] = -np.inf
        logits[rng.random(logits.shape) < 0.05] = np.nan
    if kind == 3:
        logits[0], logits[1], logits[3] = np.nan, -np.inf, 0
        logits[2, rng.integers(n)] = np.inf
        logits[3, ::2] = -0.0
    return logits


@pytest.mark.parametrize("kind", range(4))
def test_c_and_numpy_draw_the_same(native: Drawer, kind: int) -> None:
    rng = np.random.default_rng(kind)
    for _ in range(60):
        logits = hostile_rows(kind, rng, 5, int(rng.integers(1, 3000)))
        wanted = draws(
            [
                (
                    Sampler(
                        float(rng.choice([0, 0.1, 0.8, 1, 5e-324, 100])),
                        int(rng.choice([0, 1, 5, 40, 500, 700, 2999])),
                        float(rng.choice([1, 0.95, 0.5, 1e-300])),
                        float(rng.choice([0, 0.05, 0.5, 1])),
                        int(rng.integers(1 << 62)),
                        float(rng.choice([0, 0.5, 1])),
                        float(rng.choice([0.1, 0.01, 0.4])),
                    ),
                    int(rng.integers(1000)),
                    int(rng.integers(5)),
                )
                for _ in range(30)
            ]
        )
        assert native.draw(logits, wanted) == Drawer(native=False).draw(logits, wanted)


def test_narrow_and_wide_vectors_draw_the_same(native: Drawer) -> None:
    spec = importlib.util.find_spec("aiosd.llm._sampling")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    logits = hostile_rows(2, np.random.default_rng(9), 40, 2111)
    wanted = draws([(sampler(top_k=k, top_p=0.9, seed=row), row, row) for row in range(40) for k in (0, 7, 600)])
    wide = native.draw(logits, wanted)
    library.aios_sampling_start(0)
    try:
        assert native.draw(logits, wanted) == wide
    finally:
        library.aios_sampling_start(1)


def test_neighbours_in_the_batch_change_nothing(native: Drawer) -> None:
    logits = hostile_rows(0, np.random.default_rng(5), 32, 1000)
    several = [(sampler(top_k=40, seed=row, temperature=row % 3 / 2), 3 * row, row) for row in range(32)]
    together = native.draw(logits, draws(several))
    for (each, index, row), token in zip(several, together, strict=True):
        assert native.one(logits[row], each, index) == token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which", ["C", "numpy"])
def test_a_row_without_numbers_gives_nothing_and_its_neighbours_their_tokens(temperature: float, which: str) -> None:
    logits = np.stack([row(1), np.full(300, np.nan, np.float32), row(2), np.full(300, -np.inf, np.float32)])
    drawer = Drawer(native=which == "C")
    drawn = drawer.draw(logits, draws([(sampler(temperature=temperature), 0, row) for row in range(4)]))
    assert [token == NOTHING for token in drawn] == [False, True, False, True]


# ── what changes a row before ─────────────────────────────────────────────────────────────────────────────

NO_PROMPT = np.zeros(0, np.int32)


def test_penalty_makes_recent_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    penalise(logits, [0, 1, 1], 2.0)
    assert list(logits) == [1.0, -4.0, 1.0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 0.5, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 100.0])
@pytest.mark.parametrize("recent", [[0], [1], [0, 1, 2], [3]])
def test_any_penalty_and_temperature_draw_a_token(penalty: float, temperature: float, recent: list[int]) -> None:
    logits = np.array([50.0, -50.0, 1.0, -np.inf], dtype=np.float32)
    penalise(logits, recent, penalty)
    assert sampler(temperature=temperature, top_p=1e-300).draw(logits, 0) in (0, 1, 2)


def test_a_penalty_of_next_to_nothing_makes_a_recent_token_certain() -> None:
    logits = np.array([5.0, -5.0, 1.0], dtype=np.float32)
    penalise(logits, [2], 5e-324)
    assert {sampler().draw(logits, index) for index in range(100)} == {2}


def test_presence_counts_once_frequency_each_time_and_the_prompt_not_at_all() -> None:
    logits = np.zeros(5, np.float32)
    edits = Edits(presence_penalty=0.5, frequency_penalty=0.25)
    edits.apply(logits, np.array([4, 4], np.int32), [0, 1, 1, 1])
    assert list(logits) == [-0.75, -1.25, 0, 0, 0]


def test_bias_is_added_and_ends_wait_for_the_least_number_of_tokens() -> None:
    edits = Edits(
        bias_ids=np.array([1, 3]), bias=np.array([100, -100], np.float32), min_tokens=2, ends=np.array([0, 4])
    )
    for out, expected in (([7], [-np.inf, 100, 0, -100, -np.inf]), ([7, 7], [0, 100, 0, -100, 0])):
        logits = np.zeros(5, np.float32)
        edits.apply(logits, NO_PROMPT, out)
        assert list(logits) == expected


@given(st.lists(st.integers(0, 2), max_size=60))
def test_repeats_are_those_found_by_comparing(tokens: list[int]) -> None:
    def common(start: int) -> int:
        return next((i for i in range(len(tokens) - start) if tokens[i] != tokens[start + i]), len(tokens) - start)

    assert repeats(tokens) == [common(start) for start in range(len(tokens))]


# ── against llama.cpp's own ───────────────────────────────────────────────────────────────────────────────


class Theirs:
    """One of llama.cpp's samplers: accepts tokens, and is applied to a row."""

    def __init__(self, sampler: Any, tokens: list[int] | None = None) -> None:
        self._sampler = sampler
        for token in tokens or []:
            llama.C.llama_sampler_accept(sampler, token)

    def apply(self, logits: LogitRow) -> dict[int, float]:
        """Apply it; returns the remaining logits by token."""
        data = np.zeros(len(logits), np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        data["id"], data["logit"] = np.arange(len(logits)), logits
        array = llama.C.llama_token_data_array()
        array.data = data.ctypes.data_as(type(array.data))
        array.size, array.selected, array.sorted = len(logits), -1, False
        llama.C.llama_sampler_apply(self._sampler, ctypes.byref(array))
        self.selected = int(array.data[array.selected].id) if array.selected >= 0 else None
        return {int(array.data[i].id): float(array.data[i].logit) for i in range(array.size)}

    def close(self) -> None:
        llama.C.llama_sampler_free(self._sampler)


def dry_of(model: llama.Model, breakers: list[str], **changes: Any) -> tuple[Dry, Any]:
    """Our DRY penalty, and llama.cpp's."""
    sampling = Sampling(**{"dry_multiplier": 0.8, "dry_breakers": breakers, **changes})
    edits = SamplerFactory(model).chain(sampling, constrained=False).edits
    assert edits is not None
    assert edits.dry is not None
    texts = (ctypes.c_char_p * len(breakers))(*[text.encode() for text in breakers])
    theirs = llama.C.llama_sampler_init_dry(
        model._vocab, sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, sampling.dry_last_n,
        texts, len(breakers),
    )  # fmt: skip
    return edits.dry, theirs


@pytest.mark.parametrize("breakers", [[], [":"], ["he"], ["the", "\n"]])
@pytest.mark.parametrize("allowed", [0, 2, 5])
def test_dry_is_as_in_llama_cpp(model: llama.Model, breakers: list[str], allowed: int) -> None:
    rng = np.random.default_rng(allowed)
    letters = [model.tokenize(text, bos=False, special=False)[0] for text in ("a", "h", "e", "t", ":", "he", "th")]
    penalised = 0
    for trial in range(40):
        tokens = rng.choice(letters[: 2 + trial % 6], size=int(rng.integers(1, 100))).tolist()
        ours, sampler = dry_of(model, breakers, dry_allowed_length=allowed)
        theirs = Theirs(sampler, tokens)
        expected = theirs.apply(np.zeros(model.n_vocab, np.float32))
        theirs.close()
        logits = np.zeros(model.n_vocab, np.float32)
        ours.apply(logits, tokens)
        assert np.allclose(logits, [expected[token] for token in range(model.n_vocab)], rtol=1e-4)
        penalised += bool(logits.min() < 0)
    assert penalised > 5, "this compares nothing"


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.6])
def test_xtc_leaves_what_llama_cpp_leaves(threshold: float) -> None:
    for data in range(20):
        logits = row(data, 50)
        theirs = Theirs(llama.C.llama_sampler_init_xtc(1.0, threshold, 1, 0))
        expected = theirs.apply(logits)
        theirs.close()
        ids, _ = sampler(xtc_probability=1.0, xtc_threshold=threshold).candidates(logits)
        assert set(ids) == set(expected)


def test_xtc_comes_as_often_as_it_should() -> None:
    logits = np.log(np.array([0.55, 0.4, 0.05], np.float32))
    half = sampler(xtc_probability=0.5)
    excluded = sum(len(half.candidates(logits, index)[0]) == 2 for index in range(2000))
    assert 900 < excluded < 1100


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_draws_as_llama_cpp_does(version: int) -> None:
    """The random numbers differ, so frequencies of tokens are compared."""
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], np.float32))
    ours = Mirostat(version, 1.0, 0.1, 1.0, 11)
    init = llama.C.llama_sampler_init_mirostat_v2 if version == 2 else llama.C.llama_sampler_init_mirostat
    theirs = Theirs(init(11, 1.0, 0.1) if version == 2 else init(6, 11, 1.0, 0.1, 100))
    counts = np.zeros((2, 6))
    for index in range(6000):
        counts[0, ours.draw(logits, index)] += 1
        ours.learn()
        theirs.apply(logits)
        counts[1, theirs.selected] += 1
    theirs.close()
    assert np.abs(counts[0] - counts[1]).max() / 6000 < 0.03
    assert counts[1, 2] > 0


def test_mirostat_keeps_the_surprise_near_its_target() -> None:
    rng = np.random.default_rng(0)
    mirostat, surprises = Mirostat(2, 3.0, 0.1, 1.0, 5), []
    for index in range(800):
        logits = rng.normal(0, 4, 500).astype(np.float32)
        mirostat.draw(logits, index)
        surprises.append(mirostat._surprise)
        mirostat.learn()
    assert abs(np.mean(surprises[200:]) - 3.0) < 0.25


def test_mirostat_takes_nothing_from_a_row_without_numbers() -> None:
    assert Mirostat(2, 5.0, 0.1, 1.0, 0).draw(np.full(4, np.nan, np.float32), 0) == NOTHING


def test_breakers_are_looked_up_once(model: llama.Model, tmp_path: Path) -> None:
    options = SamplerFactory(model)
    assert options._breakers_of((":",)) is options._breakers_of((":",))
