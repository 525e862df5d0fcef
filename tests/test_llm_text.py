"""Bytes to shown text: nothing lost, nothing doubled, nothing shown too early, however the tokens are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.text import Head, TextStream
from libaios.parts import Splitter, control

texts = st.text(alphabet=st.sampled_from("ab<é€🙂"), max_size=40)
stops = st.lists(st.text(alphabet=st.sampled_from("ab<é"), min_size=1, max_size=5), max_size=4)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def expected(text: str, needles: list[str]) -> tuple[str, bool]:
    """Cut the text at the stop string that is complete first; of two that are complete at once, at the longer one."""
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
    found, kept = stream.triggers(text)
    assert stream.triggers(text) == (found, kept), "asking changes nothing"
    assert not kept
    stream.feed(text.encode())
    if not stream.stopped:
        assert bool(found) == stream.triggered
        assert not found or stream.rest == text[found:]


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>a <call> b</think> c <call>d", False, ("c ", "a <call> b", True)),
        ("a <call> b</think><call>d", True, ("", "a <call> b", True)),
        ("a <call> b\n", True, ("", "a <call> b", False)),
        ("\n\n<think>\nhm\n</think>\n\nYes", False, ("Yes", "hm", False)),
        ("</think>a<call>", False, ("</think>a", "", True)),
        ("<think>x</think><think><call></think><call>", False, ("", "x<call>", True)),
        ("The <think> tag <call>", False, ("The <think> tag ", "", True)),
        ("<thi<call>nk>", False, ("<thi", "", True)),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_are_apart_and_no_call_begins_within_them(
    text: str, inside: bool, expected: tuple[str, str, bool], size: int
) -> None:
    stream, splitter = TextStream([], "<call>", ("<think>", "</think>"), inside), Splitter()
    answer = thoughts = ""
    for i in range(0, len(text), size):
        stream.feed(text[i : i + size].encode())
        shown, reasoning, _ = splitter.split(stream.take())
        answer, thoughts = answer + shown, thoughts + reasoning
    stream.finish()
    shown, reasoning, _ = splitter.split(stream.take())
    assert (answer + shown, thoughts + reasoning, stream.triggered) == expected


def test_control_tokens_are_marks_that_no_text_can_write() -> None:
    stream = TextStream([], control("<call>"), (control("<think>"), control("</think>")))
    stream.feed(f"<call><think>{control('<think>')}a".encode())
    assert stream.take() == "<call><think>a", "an answer has begun"
    stream = TextStream(["<think"], control("<call>"), (control("<think>"), control("</think>")))
    stream.feed(f"{control('<think>')}a</think>b{control('</think>')}c{control('<call>')}d".encode())
    assert Splitter().split(stream.take()) == ("c", "a</think>b", [])
    assert stream.rest == "d"


def test_a_model_cannot_write_the_marks_between_parts() -> None:
    stream = TextStream([], None, ("<think>", "</think>"))
    stream.feed("a\ufdd1b\ufdd2c".encode())
    stream.finish()
    assert Splitter().split(stream.take()) == ("a\ufffdb\ufffdc", "", [])


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"name": "f", "parameters": {}}', '{"name": "f", "parameters": {}}'),
        ('\n\n{\n  "name":"g",\n  "parameters":{', '{\n  "name":"g",\n  "parameters":{'),
        ('{"name": "h", "parameters": {}}', None),
        ('{"name": "f", "age": 3}', None),
        ('{"city": "Rome"}', None),
        ('Here: {"name": "f", "parameters": {}}', None),
        ('{  "name": "f", "parameters": {}}', None),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_call_without_a_trigger_is_known_by_its_beginning(text: str, rest: str | None, size: int) -> None:
    heads = ['{"name":"f","parameters":', '{"name":"g","parameters":']
    stream = TextStream(head=Head(heads))
    foretold = False
    for i in range(0, len(text), size):
        foretold = foretold or stream.triggers(text[i : i + size])[0] > 0
        stream.feed(text[i : i + size].encode())
    stream.finish()
    assert stream.triggered == foretold == (rest is not None)
    assert stream.rest == (rest or "")
    assert stream.take() == ("" if rest else text) or text.startswith("\n")


def test_a_stop_string_counts_within_thoughts_too() -> None:
    stream = TextStream(["stop"], "<call>", ("<think>", "</think>"), True)
    stream.feed(b"a stop b")
    assert stream.stopped
    assert Splitter().split(stream.take()) == ("", "a", [])


@given(texts, st.integers(min_value=0, max_value=50))
def test_skip_leaves_the_text_that_the_reader_does_not_have(text: str, have: int) -> None:
    stream = TextStream()
    stream.feed(text.encode())
    stream.take()
    stream.skip(have)
    assert stream.take() == text[have:]
