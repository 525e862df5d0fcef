"""Guesses of the next tokens: the same as of a plain search, and made only where they save time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm import llama, lookahead, lookup
from aiosd.llm.lookahead import Guesser, Lookahead
from aiosd.llm.lookup import GRAM, LONGEST, PLACES, Lookup

# ── where the last tokens stood before ────────────────────────────────────────────────────────────────────


def longest(tokens: list[int]) -> tuple[int, int]:
    """Length of the longest match with the end, and the place after it, by a plain search; (0, 0): there is none."""
    end, found = len(tokens), list[tuple[int, int]]()
    gram = tokens[-GRAM:]
    for place in range(end - 1, GRAM - 1, -1):
        if tokens[place - GRAM : place] == gram:
            length = GRAM
            while length < min(LONGEST, place) and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            found.append((length, place))
    return max(found[:PLACES], default=(0, 0)) if end > GRAM else (0, 0)


def follow(prompt: list[int], out: list[int], reach: int) -> list[list[int]]:
    """What a plain search expects before each token of the output."""
    tokens, seen = list(prompt[-reach:]), list[list[int]]()
    matched, place = longest(tokens)
    for i, token in enumerate(out):
        seen.append(tokens[place : place + 4] if matched else [])
        if matched and tokens[place] == token:
            matched, place = matched + 1, place + 1
        else:
            matched = 0
        tokens.append(token)
        if not matched:
            matched, place = longest(tokens)
        if len(tokens) > 2 * reach and i:
            place -= len(tokens) - reach
            tokens = tokens[-reach:]
            if place <= 0:
                matched, place = longest(tokens)
    return seen


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), max_size=120), st.booleans())
def test_a_guess_is_what_a_plain_search_finds(prompt: list[int], out: list[int], short: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reach = 24 if short else lookup.REACH
        patch.setattr(lookup, "REACH", reach)
        one, found = Lookup(np.array(prompt, np.int32)), list[list[int]]()
        for count in range(len(out)):
            one.follow(out[:count])
            found.append(one.guess(4) if one.matched else [])
            assert len(one._tokens) <= 2 * reach
        for here, there in zip(found, follow(prompt, out, reach), strict=True):
            assert here[: len(there)] == there
            assert bool(here) == bool(there)


def test_a_long_output_that_is_new_costs_what_a_prompt_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its last tokens are read, so that a call that is followed again after a long time delays no other call."""
    one, text = Lookup(np.array([1, 2, 3], np.int32)), [token % 5000 for token in range(7 * lookup.REACH)]
    added: list[int] = []
    monkeypatch.setattr(Lookup, "_add", lambda self, token: added.append(token))
    one.follow(text)
    monkeypatch.undo()
    assert len(added) <= lookup.REACH
    two = Lookup(np.array(text, np.int32))
    assert one.guess(5) == two.guess(5) == [token % 5000 for token in range(len(text), len(text) + 5)]
    text.append(text[-5000])
    one.follow(text)
    assert one.matched == LONGEST + 1


def test_a_text_that_repeats_itself_goes_on_beyond_its_end() -> None:
    one = Lookup(np.array([1, 2, 3, 1, 2, 3, 1, 2, 3], np.int32))
    assert one.guess(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_the_longest_match_counts_and_of_equal_ones_the_last() -> None:
    one = Lookup(np.array([9, 1, 2, 3, 50, 8, 1, 2, 3, 60, 7, 1, 2, 3, 70, 9, 1, 2, 3], np.int32))
    assert (one.matched, one.guess(1)) == (4, [50])
    one = Lookup(np.array([8, 1, 2, 3, 60, 7, 1, 2, 3, 70, 9, 1, 2, 3], np.int32))
    assert (one.matched, one.guess(1)) == (3, [70])


def test_what_is_expected_grows_with_right_guesses_and_shrinks_with_wrong_ones() -> None:
    prompt = list(range(100, 160))
    one = Lookup(np.array(prompt + prompt[:3], np.int32))
    sizes = (1, 3, 7)
    before = one.expected(sizes)
    one.follow(prompt[3:40])
    assert one.expected(sizes)[-1] > before[-1]
    assert all(
        1 < few < many <= 1 + sizes[-1] for few, many in zip(one.expected(sizes), one.expected(sizes)[1:], strict=False)
    )
    two = Lookup(np.array([*prompt, *prompt[:3]], np.int32))
    out: list[int] = []
    for begin in range(3, 50, 4):  # three tokens of the prompt, and then another one, again and again
        two.follow(out := [*out, 7, *prompt[begin : begin + 3]])
    assert two.matched == 3
    assert two.expected(sizes)[-1] < before[-1]


# ── what steps cost ───────────────────────────────────────────────────────────────────────────────────────


class FakeSteps:
    """A context with a fake clock, whose steps take a time that a script computes from their rows."""

    def __init__(self, cost: Callable[[int], float], neighbours: float = 0.0) -> None:
        self.now = self.wall = 0.0
        self.sizes: list[int] = []
        self.cut_at: list[int] = []
        self._cost, self._neighbours = cost, neighbours

    def decode(self, batch: llama.BatchBuffer) -> int:
        self.sizes.append(batch.size)
        assert batch.wanted[: batch.size].all() or batch.positions[0] == 0
        took = self._cost(batch.size)
        self.now += took
        self.wall += took * (1 + self._neighbours)
        return llama.OK

    def logits(self, rows: int) -> None:
        pass

    def cut(self, slot: int, length: int) -> None:
        self.cut_at.append(length)

    def measure(self, asked: int | None = None) -> Lookahead:
        found = lookahead.measure(self, 2, asked, cost=lambda: self.now, clock=lambda: self.wall)  # type: ignore[arg-type]
        assert self.cut_at[-1] == 0
        return found


def test_guesses_are_off_where_a_step_costs_in_proportion_to_its_rows() -> None:
    found = FakeSteps(lambda rows: 0.001 * (0.1 + 0.9 * rows)).measure()
    assert found.most == 0
    why = "a step of 16 tokens costs 14.5 × one of 1 (1.0 ms), so that right guesses would bring 1.10 at most"
    assert found.described == f"does not look ahead: {why}"


@pytest.mark.parametrize(("each", "most"), [(0.1, 15), (0.5, 15)])
def test_the_further_the_cheaper_rows_are(each: float, most: int) -> None:
    found = FakeSteps(lambda rows: 0.001 * (1 - each + each * rows)).measure()
    assert found.most == most
    assert found.described.startswith(f"looks up to {most} tokens ahead: a step of 16 tokens costs")


def test_as_far_as_right_guesses_gain_most() -> None:
    """In this case rows beyond 8 are computed one by one."""
    found = FakeSteps(lambda rows: 0.001 * (1 if rows <= 8 else rows)).measure()
    assert (found.most, found.seconds[8]) == (7, pytest.approx(0.001))


def test_a_requested_lookahead_is_used_whatever_it_costs() -> None:
    found = FakeSteps(lambda rows: 0.001 * rows).measure(asked=5)
    assert found.most == 5
    assert found.described.startswith("looks up to 5 tokens ahead: asked for; ")


@pytest.mark.parametrize(("step", "most"), [(0.001, 60), (0.1, 9), (2.0, 4)])
@pytest.mark.parametrize("neighbours", [0.0, 20.0])
def test_measuring_takes_bounded_time(step: float, most: int, neighbours: float) -> None:
    steps = FakeSteps(lambda rows: step, neighbours)
    found = steps.measure()
    assert len(steps.sizes) <= most
    assert {1, 8} <= set(steps.sizes)
    assert found.seconds[1] == pytest.approx(found.seconds[8]) == pytest.approx(step)


def test_a_number_in_between_costs_as_much_as_the_next_that_was_measured() -> None:
    costs = FakeSteps(lambda rows: {1: 1.0, 2: 2.4, 4: 2.0, 8: 3.0, 16: 5.0}[min(rows, 16)] / 1000).measure().seconds
    assert [round(1000 * cost) for cost in costs] == [0, 1, 2, 2, 2, 3, 3, 3, 3, *[5] * 8]


# ── how many guesses a step has ───────────────────────────────────────────────────────────────────────────


@dataclass
class FakeGuessedCall:
    order: int
    slot: int
    prompt: npt.NDArray[np.int32]
    out: list[int] = field(default_factory=list)
    limit: int = 1000


COPIED = np.array([*range(200), *range(20)], np.int32)  # the end repeats the beginning
PLAIN = np.arange(1000, 1200, dtype=np.int32)


def linear(each: float, most: int = 15) -> Lookahead:
    """A step costs 1, and `each` for each further row."""
    return Lookahead(most, "", (0.0, *(1 + each * rows for rows in range(16))))


def test_a_call_that_copies_has_as_many_guesses_as_pay() -> None:
    call = FakeGuessedCall(1, 0, COPIED)
    assert Guesser(linear(0.0), False).guesses([call]) == [list(range(20, 35))]
    assert Guesser(linear(0.0, 3), False).guesses([call]) == [[20, 21, 22]]
    assert Guesser(linear(2.0), False).guesses([call]) == []
    assert Guesser(Lookahead(0, "off"), False).guesses([call]) == []


def test_no_guesses_beyond_the_end_of_a_call() -> None:
    guesser = Guesser(linear(0.0), False)
    assert guesser.guesses([FakeGuessedCall(1, 0, COPIED, limit=5)]) == [[20, 21, 22]]
    assert guesser.guesses([FakeGuessedCall(2, 0, COPIED, limit=1)]) == []


def test_no_guesses_in_a_crowd_and_none_without_a_match() -> None:
    guesser = Guesser(linear(0.0), False)
    assert guesser.guesses([FakeGuessedCall(i, i, COPIED) for i in range(5)]) == []
    assert guesser.guesses([FakeGuessedCall(9, 0, PLAIN)]) == []
    assert guesser.guesses([]) == []
    guesser = Guesser(linear(0.0), True)
    found = guesser.guesses([FakeGuessedCall(10, 0, PLAIN), FakeGuessedCall(11, 1, COPIED)])
    assert (found[0], len(found[1])) == ([], 7)  # a step has at most 16 rows
    assert [len(guess) for guess in guesser.guesses([FakeGuessedCall(12 + i, i, COPIED) for i in range(4)])] == [
        3,
        3,
        3,
        3,
    ]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("each", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("copying", [1, 2, 3])
def test_calls_that_copy_nothing_do_not_wait_for_those_that_do(mixed: bool, each: float, copying: int) -> None:
    """A step takes at most the time of one step for each call alone."""
    guesser, lengths = Guesser(linear(each), mixed), set[int]()
    calls = [FakeGuessedCall(i, i, COPIED) for i in range(copying)]
    calls.append(FakeGuessedCall(9, copying, PLAIN))
    for turn in range(100):
        guesses = guesser.guesses(calls) or [[] for _ in calls]
        rows = [len(guess) + 1 for guess in guesses]
        assert guesser._seconds([call.slot for call in calls], rows) <= len(calls)
        if max(rows) > 1:
            guesser.verified(len(calls), sum(rows) - len(calls), sum(rows))
        lengths.add(max(rows))
        for call, count in zip(calls, rows, strict=True):
            call.out += [3000 + turn] if call.order == 9 else [(20 + len(call.out) + i) % 200 for i in range(count)]
    if each == 0.1 and (mixed or copying > 1):  # where more rows cost little, the others have guesses
        assert max(lengths) > 2


def test_what_wrong_guesses_cost_is_bounded() -> None:
    """In this text every match ends at once, and a wrong guess is expensive."""
    guesser, call = Guesser(linear(0.5), False), FakeGuessedCall(1, 0, COPIED)
    lost = steps = 0.0
    for turn in range(400):
        guesses = guesser.guesses([call])
        cost = guesser.ahead.seconds[len(guesses[0]) + 1] if guesses else 1.0
        if guesses:
            guesser.verified(1, len(guesses[0]), 1)
        lost, steps = lost + cost - 1, steps + cost
        call.out += [900, *range(turn % 100, turn % 100 + 17)]  # a long match again, so guesses are made
    most = guesser.ahead.seconds[4] - 1
    assert 0 < lost <= most + lookahead.LOSS * steps


def test_guesses_of_a_call_do_not_depend_on_calls_before_it() -> None:
    """So the rounding of its rows does not depend on them either."""
    guesser = Guesser(linear(0.3), False)

    def sizes(order: int) -> list[int]:
        call, found = FakeGuessedCall(order, 0, COPIED), []
        for at in range(20, 160):
            guesses = guesser.guesses([call])
            found.append(len(guesses[0]) if guesses else 0)
            if guesses:
                guesser.verified(1, found[-1], 1 + found[-1] * (at % 7 > 0))
            call.out += [900] if at % 7 == 0 else [call.out[-1] + 1 if call.out and call.out[-1] < 190 else 20]
        return found

    first = sizes(1)
    assert max(first) > 3
    assert 0 in first
    assert sizes(2) == first


def test_calls_that_are_over_are_forgotten() -> None:
    guesser = Guesser(linear(0.0), False)
    for order in range(50):
        guesser.guesses([FakeGuessedCall(order, 0, PLAIN)])
    assert len(guesser._records) == lookahead.REMEMBERED
    guesser.forget(FakeGuessedCall(49, 0, PLAIN))
    assert 49 not in guesser._records
