"""One row of logits, one token: the same for the same (seed, index), and never outside of what the filters leave."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.sampling import Sampler, penalise, uniform

seeds = st.integers(0, (1 << 63) - 1)


def sampler(**changes: float) -> Sampler:
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 7}
    return Sampler(**{**plain, **changes})  # type: ignore[arg-type]


def row(seed: int, n: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)


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


@given(seeds, st.integers(0, 1000), st.integers(0, 20))
def test_same_seed_and_index_same_token(seed: int, index: int, data: int) -> None:
    a, b = sampler(seed=seed, top_k=40, top_p=0.9), sampler(seed=seed, top_k=40, top_p=0.9)
    assert a.draw(row(data), index) == b.draw(row(data).copy(), index)


@given(st.integers(0, 50), st.integers(1, 400), st.integers(0, 100))
def test_top_k_leaves_the_k_likeliest(data: int, k: int, index: int) -> None:
    logits = row(data)
    ids, probabilities = sampler(top_k=k).candidates(logits)
    assert len(ids) == min(k, len(logits))
    assert set(ids) == set(np.argsort(-logits)[:k])
    assert abs(probabilities.sum() - 1) < 1e-9
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
    relative = np.exp(logits.astype(np.float64) - logits.max())
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


def test_penalty_makes_recent_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    assert list(penalise(logits, [0, 1, 1], 2.0)) == [1.0, -4.0, 1.0]
    assert list(logits) == [2.0, -2.0, 1.0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 0.5, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 100.0])
@pytest.mark.parametrize("recent", [[0], [1], [0, 1, 2], [3]])
def test_any_penalty_and_temperature_draw_a_token(penalty: float, temperature: float, recent: list[int]) -> None:
    logits = np.array([50.0, -50.0, 1.0, -np.inf], dtype=np.float32)
    extreme = sampler(temperature=temperature, repeat_penalty=penalty, top_p=1e-300)
    assert extreme.draw(extreme.prepare(logits, recent), 0) in (0, 1, 2)


def test_a_penalty_of_next_to_nothing_makes_a_recent_token_certain() -> None:
    logits = np.array([5.0, -5.0, 1.0], dtype=np.float32)
    extreme = sampler(repeat_penalty=5e-324)
    assert {extreme.draw(extreme.prepare(logits, [2]), index) for index in range(100)} == {2}
