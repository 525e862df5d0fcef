"""Restart policies: how they are written, and what they decide."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.init.restart import HEALTHY_S, LONGEST_WAIT_S, RestartPolicy, Restarts, When, parse


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("no", RestartPolicy()),
        ("always", RestartPolicy(When.ALWAYS)),
        ("on-failure", RestartPolicy(When.ON_FAILURE)),
        ("On-Failure:3", RestartPolicy(When.ON_FAILURE, 3)),
        ("always:1", RestartPolicy(When.ALWAYS, 1)),
    ],
)
def test_reads_what_people_write(text: str, policy: RestartPolicy) -> None:
    assert parse(text) == policy
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", "never", "on-failure:", "on-failure:0", "on-failure:-1", "on-failure:x", "no:3", "always:²", "always:1:2"],
)
def test_refuses_the_rest_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is no restart policy"):
        parse(text)


def waits(policy: str, statuses: list[int], lived_s: float = 0.0) -> list[float | None]:
    restarts = Restarts(parse(policy))
    return [restarts.after(status, lived_s) for status in statuses]


def test_no_is_never() -> None:
    assert waits("no", [0, 1, -9]) == [None, None, None]


def test_on_failure_goes_by_the_status() -> None:
    assert waits("on-failure", [1, 0, -9]) == [0.1, None, 0.2]


def test_always_goes_by_nothing() -> None:
    assert waits("always", [0, 1, -15]) == [0.1, 0.2, 0.4]


def test_an_intended_end_is_final() -> None:
    restarts = Restarts(parse("always"))
    assert restarts.after(-15, 1.0, meant=True) is None
    assert restarts.total == 0


def test_waits_double_up_to_a_limit() -> None:
    found = waits("always", [1] * 2000)
    assert found[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert found[9:] == [LONGEST_WAIT_S] * (len(found) - 9)


def test_tries_are_counted_in_a_row() -> None:
    assert waits("on-failure:2", [1, 1, 1, 1]) == [0.1, 0.2, None, None]


def test_a_long_life_resets_the_count() -> None:
    restarts = Restarts(parse("on-failure:2"))
    assert [restarts.after(1, 0.5), restarts.after(1, HEALTHY_S), restarts.after(1, 9.9)] == [0.1, 0.1, 0.2]
    assert restarts.exhausted
    assert restarts.after(1, HEALTHY_S + 1) == 0.1
    assert (restarts.in_row, restarts.total) == (1, 4)


@given(st.lists(st.tuples(st.integers(-64, 255), st.floats(0, 100), st.booleans())), st.integers(1, 5))
def test_never_more_in_a_row_than_allowed(ends: list[tuple[int, float, bool]], tries: int) -> None:
    restarts = Restarts(RestartPolicy(When.ON_FAILURE, tries))
    for status, lived_s, meant in ends:
        wait_s = restarts.after(status, lived_s, meant)
        assert restarts.in_row <= tries
        assert wait_s is None or (status != 0 and not meant and 0.1 <= wait_s <= LONGEST_WAIT_S)


def test_its_state_is_plain_data() -> None:
    restarts = Restarts(parse("always:9"))
    restarts.after(1, 0.0)
    assert pickle.loads(pickle.dumps(restarts)).after(1, 0.0) == 0.2
