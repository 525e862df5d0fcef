"""Bytes to shown text: nothing lost, nothing doubled, nothing shown too early, however the tokens are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.text import TextStream

texts = st.text(alphabet=st.sampled_from("ab<é€🙂"), max_size=40)
stops = st.lists(st.text(alphabet=st.sampled_from("ab<é"), min_size=1, max_size=5), max_size=4)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def expected(text: str, needles: list[str]) -> tuple[str, bool]:
    """Cut at the needle that is complete first; of two complete at once the longer one."""
    for end in range(1, len(text) + 1):
        hits = [needle for needle in needles if text[:end].endswith(needle)]
        if hits:
            return text[: end - len(max(hits, key=len))], True
    return text, False


@given(texts, stops, st.lists(st.integers(min_value=0)))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, needles: list[str], cuts: list[int]) -> None:
    stream = TextStream(needles)
    shown = ""
    for chunk in chunks(text.encode(), cuts):
        stream.feed(chunk)
        shown += stream.take()
        assert not any(needle in shown for needle in needles)
    stream.finish()
    shown += stream.take()
    assert (shown, stream.stopped) == expected(text, needles)


@given(st.binary(max_size=30), stops, st.lists(st.integers(min_value=0)))
def test_what_is_shown_depends_on_the_bytes_alone(data: bytes, needles: list[str], cuts: list[int]) -> None:
    whole, cut = TextStream(needles), TextStream(needles)
    whole.feed(data)
    for chunk in chunks(data, cuts):
        cut.feed(chunk)
    assert (whole.shown, whole.take()) == (cut.shown, cut.take())


@given(st.text(alphabet="aé€🙂", max_size=20), st.lists(st.integers(min_value=0)))
def test_a_split_character_is_never_shown_in_halves(text: str, cuts: list[int]) -> None:
    stream = TextStream()
    for chunk in chunks(text.encode(), cuts):
        stream.feed(chunk)
        assert "\ufffd" not in stream.take()


def test_half_a_character_at_the_end_is_replaced() -> None:
    stream = TextStream()
    stream.feed("é".encode()[:1])
    assert stream.take() == ""
    stream.finish()
    assert stream.take() == "\ufffd"


def test_trigger_ends_the_text_and_the_rest_is_gathered() -> None:
    stream = TextStream(["stop"], "<tool_call>")
    for piece in (b"ok <too", b"l_call>\n{", b'"a": "stop"}'):
        stream.feed(piece)
    stream.finish()
    assert stream.triggered
    assert not stream.stopped
    assert stream.take() == "ok "
    assert stream.rest == '\n{"a": "stop"}'


def test_beginning_of_a_trigger_that_comes_to_nothing_is_shown() -> None:
    stream = TextStream([], "<tool_call>")
    stream.feed(b"a <tool")
    assert stream.take() == "a "
    stream.feed(b"box>")
    assert stream.take() == "<toolbox>"


LETTERS = st.text(alphabet="ab<>", max_size=12)


@given(LETTERS, LETTERS, st.text("ab<", min_size=1, max_size=4), st.booleans())
def test_triggers_foretells_feed(before: str, text: str, needle: str, inside: bool) -> None:
    stream = TextStream(["bbb"], needle, ("<", ">"), inside)
    stream.feed(before.encode())
    if stream.stopped or stream.triggered:
        return
    found = stream.triggers(text)
    assert stream.triggers(text) == found, "asking changes nothing"
    stream.feed(text.encode())
    if not stream.stopped:
        assert bool(found) == stream.triggered
        assert not found or stream.rest == text[found:]


@pytest.mark.parametrize(
    ("text", "inside", "shown"),
    [
        ("<think>a <call> b</think> c <call>d", False, "<think>a <call> b</think> c "),
        ("a <call> b</think><call>d", True, "a <call> b</think>"),
        ("a <call> b", True, "a <call> b"),
        ("</think>a<call>", False, "</think>a"),
        ("<think>x</think><think><call></think><call>", False, "<think>x</think><think><call></think>"),
        ("<thi<call>nk>", False, "<thi"),
    ],
)
def test_no_call_begins_within_thoughts(text: str, inside: bool, shown: str) -> None:
    stream = TextStream([], "<call>", ("<think>", "</think>"), inside)
    stream.feed(text.encode())
    stream.finish()
    assert stream.take() == shown
    assert stream.triggered == text.startswith(shown + "<call>")


def test_thoughts_may_begin_and_end_with_control_tokens() -> None:
    stream = TextStream([], "<call>", ("<think>", "</think>"))
    stream.mark("</think>")
    assert not stream.inside
    stream.mark("<think>")
    stream.feed(b"<call>")
    stream.mark("</think>")
    stream.feed(b"a<call>b")
    assert (stream.take(), stream.rest) == ("<call>a", "b")


def test_a_stop_string_counts_within_thoughts_too() -> None:
    stream = TextStream(["stop"], "<call>", ("<think>", "</think>"), True)
    stream.feed(b"a stop b")
    assert stream.stopped
    assert stream.take() == "a "


@given(texts, st.integers(min_value=0, max_value=50))
def test_skip_leaves_what_the_reader_does_not_have(text: str, have: int) -> None:
    stream = TextStream()
    stream.feed(text.encode())
    stream.take()
    stream.skip(have)
    assert stream.take() == text[have:]
