"""Calls that share a budget do not exceed it together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.ipc.link import PurseShare
from aiosd.llm.purse import KEEP_S, Purses


@given(
    st.integers(0, 60),
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from("opc"), st.integers(0, 4), st.integers(0, 15)), max_size=60),
)
def test_nothing_is_paid_for_or_held_beyond_a_shared_budget(
    limit: int, room: int, acts: list[tuple[str, int, int]]
) -> None:
    """The kernel counts late: its figure is what was left some calls ago."""
    purses = Purses()
    accounts, used, late, told = {}, dict[int, int](), 0, limit
    for kind, who, amount in acts:
        if kind == "o" and who not in accounts:
            account = purses.open((who, 1), [PurseShare(2, told, None), PurseShare(3, None, room)], 0.0)
            assert account is not None
            accounts[who], used[who] = account, 0
        elif kind == "p" and who in accounts:
            if not accounts[who].pay(amount, amount):
                used[who] += amount
                late += amount
        elif kind == "c" and who in accounts:
            purses.close(accounts.pop(who), used.pop(who), 0.0)
            told = limit - late + amount if late > amount else told
        assert late <= limit
        assert sum(used.values()) <= room


def test_what_was_paid_and_not_used_is_given_back() -> None:
    purses = Purses()
    first = purses.open((1, 1), [PurseShare(2, 10, None)], 0.0)
    assert first is not None
    assert first.pay(8, 8) == ""
    assert first.pay(3, 3) == "tokens"
    purses.close(first, 5, 0.0)
    second = purses.open((1, 2), [PurseShare(2, 10, None)], 0.0)
    assert second is not None
    assert second.pay(6, 6) == "tokens"
    assert second.pay(5, 5) == ""


def test_an_unused_purse_is_filled_by_the_kernels_figure_after_a_while() -> None:
    purses = Purses()
    for now, left, expected in ((0.0, 10, ""), (KEEP_S / 2, 10, "tokens"), (2 * KEEP_S, 10, "")):
        account = purses.open((1, 1), [PurseShare(2, left, None)], now)
        assert account is not None
        assert account.pay(8, 8) == expected
        purses.close(account, 0 if expected else 8, now)


def test_what_no_budget_limits_has_no_account() -> None:
    assert Purses().open((1, 1), [], 0.0) is None


def test_what_is_computed_in_one_go_is_paid_or_refused() -> None:
    purses, shares = Purses(), [PurseShare(2, 10, 3)]
    purses.spend((1, 1), shares, 7, 0.0)
    with pytest.raises(OSError, match="4 tokens, of which the token budget has 3 left"):
        purses.spend((1, 2), shares, 4, 0.0)
    purses.spend((1, 3), shares, 3, 0.0)
