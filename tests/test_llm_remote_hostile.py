"""A hostile endpoint: nothing that it sends hangs, crashes or fills the core, or affects more than one call."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.ipc import link
from aiosd.llm.remote import attempts, bill, exchange, limits
from aiosd.llm.remote.answer import BadAnswer, StreamedAnswer, loosely, parsed, safe_line, sentence
from tests.fakeendpoint import Deed, Handler, answers, cut, garbage, hangs, raw, status, whole
from tests.remotebench import KEY, TOOL, USER, Make, make, short_pauses

__all__ = ["make", "short_pauses"]  # fixtures

FIELDS = [
    "choices", "delta", "message", "content", "tool_calls", "function", "name", "arguments", "index", "id", "usage",
    "prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", "error", "finish_reason", "text",
    "reasoning", "reasoning_content",
]  # fmt: skip
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def of_type(kind: str, **headers: str) -> Deed:
    def deed(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    return deed


NONSENSE = {
    "nested": garbage("[" * 100_000),
    "nested in what is skipped": garbage('{"more": ' * 50_000),
    "usage nested": garbage('{"usage": ' + "[" * 5000 + "]" * 5000 + "}"),
    "error nested": garbage('{"error": ' + "[" * 900 + "]" * 900 + "}"),
    "half a character": garbage('{"choices": [{"delta": {"content": "\\ud800"}}]}'),
    "a list for a text": garbage('{"choices": [{"delta": {"content": 7}}]}'),
    "a line without end": raw(EVENTS, b"data: " + b"x" * 65536),
    "lines without sense": raw(EVENTS, b"x" * 65535 + b"\n"),
    "headers without end": raw(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "no HTTP": raw(b"\x00\xff" * 40000),
    "a chunk of a wrong size": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "a length that lies": raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n{}"
    ),
    "a page": of_type("text/html"),
    "compressed": of_type("application/json", Content_Encoding="gzip"),
    "whole and large": raw(WHOLE + b"\r\n", b" " * 65536),
    "a date that is none": status(503, headers={"Retry-After": "Fri, 31 Dec 0000 99:99:99 GMT"}),
}


@pytest.mark.parametrize("deed", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_costs_one_attempt(make: Make, monkeypatch: pytest.MonkeyPatch, deed: Deed) -> None:
    monkeypatch.setattr(exchange, "MOST_WHOLE", 1 << 20)
    monkeypatch.setattr(exchange, "MOST_STREAM", 4 << 20)
    bench = make(deed, answers("Hel", "lo"))
    assert bench.text(bench.submit()) == "Hello"
    assert len(bench.endpoint.asked) == 2


NO_PROGRESS = {
    "continue": raw(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01),
    "empty events": raw(EVENTS, b'data: {"choices": []}\n', pause=0.01),
    "usage again and again": raw(EVENTS, b'data: {"usage": {"prompt_tokens": 1}}\n', pause=0.01),
    "comments": hangs(),
    "not a byte": raw(b"", b"", pause=0.01),
    "trailers": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n0\r\n",
        b"A: b\r\n",
        pause=0.01,
    ),
}


@pytest.mark.parametrize("deed", NO_PROGRESS.values(), ids=NO_PROGRESS)
def test_bytes_without_content_count_as_silence(make: Make, monkeypatch: pytest.MonkeyPatch, deed: Deed) -> None:
    monkeypatch.setattr(attempts, "SILENT_S", 0.1)
    bench = make(deed, answers("x"))
    assert bench.text(bench.submit()) == "x"


def test_a_fast_endpoint_fills_no_memory(make: Make) -> None:
    """The core does not take pieces, so little is read, and the endpoint must wait."""
    all_written = threading.Event()

    def floods(handler: Handler) -> None:
        handler.stream()
        for _ in range(512):
            handler.event(json.dumps({"choices": [], "padding": "x" * (1 << 16)}))
        all_written.set()
        handler.chunk("stop", content="there")
        handler.event("[DONE]")

    bench = make(floods)
    key = bench.submit()
    bench.remote.step()
    assert not all_written.wait(0.5)
    assert bench.remote._attempts._events.qsize() < 2 * exchange.MOST_UNREAD >> 16
    assert bench.text(key) == "there"


@pytest.mark.parametrize("after", ["nan", "-5", "inf", "1e400", "soon", "", "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_requested_pauses_are_bounded(after: str) -> None:
    found = exchange.seconds(after)
    assert 0 <= found < float("inf")


#: Valid and invalid values in answers of endpoints.
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=5).map(lambda value: json.dumps(value).encode()))
def test_a_chunk_of_any_kind_is_taken_or_wrong(data: bytes) -> None:
    answer = StreamedAnswer()
    with contextlib.suppress(BadAnswer):
        assert isinstance(answer.take(data), str)
        answer.calls({"f": {}}, "x")
    usage = answer.usage
    assert usage is None or 0 <= usage.cached_tokens <= usage.prompt_tokens


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_taken_or_wrong(data: bytes) -> None:
    with contextlib.suppress(BadAnswer):
        StreamedAnswer().take(data)
    assert isinstance(sentence(loosely(data)), str)


@given(st.text(max_size=40))
def test_a_retry_after_of_any_kind_is_a_time(text: str) -> None:
    assert 0 <= exchange.seconds(text) < float("inf")


def test_an_invalid_pause_delays_nothing(make: Make) -> None:
    bench = make(status(503, headers={"Retry-After": "nan"}), answers("x"))
    assert bench.text(bench.submit()) == "x"


# ── tool calls ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text", ["{" * 5000, '{"x": ' + "9" * 30 + "}", '{"x": NaN}', '{"x": "\\ud800"}', '{"x": ' * 70 + "1" + "}" * 70]
)
def test_arguments_that_cannot_travel(text: str) -> None:
    with pytest.raises(BadAnswer):
        parsed(text, "arguments")
    assert parsed('{"x": [1, {"y": 18446744073709551615}]}', "arguments") == {"x": [1, {"y": (1 << 64) - 1}]}


def pieces(*calls: dict[str, Any]) -> Deed:
    def deed(handler: Handler) -> None:
        handler.stream()
        for call in calls:
            handler.chunk(tool_calls=[call])
        handler.chunk("tool_calls")
        handler.event("[DONE]")

    return deed


def part(arguments: Any = "", name: str = "", **more: Any) -> dict[str, Any]:
    return {**more, "function": {"arguments": arguments, **({"name": name} if name else {})}}


SEVERAL = {
    "as it should be": [
        part('{"x":', "f", index=0, id="a"),
        part("1}", index=0),
        part('{"x": 2}', "f", index=1, id="b"),
    ],
    "no index": [part('{"x":', "f", id="a"), part("1}"), part('{"x": 2}', "f", id="b")],
    "neither index nor id": [part('{"x":', "f"), part("1}"), part('{"x": 2}', "f")],
    "one index for all": [part('{"x": 1}', "f", index=0, id="a"), part('{"x": 2}', "f", index=0, id="b")],
    "an object": [part({"x": 1}, "f", index=0), part({"x": 2}, "f", index=1)],
    "id in each piece": [
        part('{"x":', "f", index=0, id="a"),
        part("1}", index=0, id="a"),
        part('{"x":2}', "f", index=3),
    ],
}


@pytest.mark.parametrize("calls", SEVERAL.values(), ids=SEVERAL)
def test_calls_in_pieces_of_all_kinds(make: Make, calls: list[dict[str, Any]]) -> None:
    bench = make(pieces(*calls))
    found = bench.end(bench.submit(tools=[TOOL])).tool_calls
    assert [call.arguments for call in found] == [{"x": 1}, {"x": 2}]
    assert len({call.id for call in found}) == 2


def test_a_name_of_any_length_ends_one_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(pieces(part("{}", "f" * 1_000_000)), pieces(*[part("{}", "f", id=str(n)) for n in range(200)]))
    failed = bench.end(bench.submit(tools=[TOOL]))
    assert failed.errno in (errno.EIO, errno.EPROTO)
    assert len(failed.message) < 1000


def test_a_schema_fetches_nothing(make: Make) -> None:
    """Even if an agent names an address in it, and the answer is checked against it."""
    bench = make(answers('{"x": 1}'))
    got = threading.Event()
    bench.endpoint.RequestHandlerClass = type("Spy", (Handler,), {"do_GET": lambda self: got.set()})
    schema = {"properties": {"x": {"$ref": bench.endpoint.url + "/schema.json"}}}
    bench.end(bench.submit(schema=schema, stream=False))
    assert not got.is_set()


def test_an_answer_that_cannot_be_checked_is_refused(make: Make) -> None:
    bench = make(answers("[" * 300 + "]" * 300))
    failed = bench.end(bench.submit(schema={"type": "array"}, stream=False))
    assert failed.errno == errno.EPROTO


def test_a_check_is_announced_so_that_only_its_call_is_blamed_for_a_death(make: Make) -> None:
    bench = make(answers('{"x": 1}'))
    key = bench.submit(schema=TOOL["parameters"], stream=False)
    bench.end(key)
    assert [one.key for one in bench.channel.sent if isinstance(one, link.Working)] == [key, None]


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("usage", "prompt", "completion"),
    [
        (None, 30, 2),
        ({"prompt_tokens": -4, "completion_tokens": True}, 30, 2),
        ({"prompt_tokens": "many", "completion_tokens": None, "prompt_tokens_details": None}, 30, 2),
        ({"prompt_tokens": 1 << 60, "completion_tokens": 5}, 30, 5),
        ({"prompt_tokens": 1 << 39, "completion_tokens": 5}, bill.MOST_TEMPLATE, 5),
        ({"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1 << 30}}, 7, 5),
    ],
)
def test_usage_is_limited_to_what_is_possible(make: Make, usage: Any, prompt: int, completion: int) -> None:
    bench = make(answers("Hel", "lo", usage=usage))
    key = bench.submit()
    found = bench.end(key).usage
    assert found.completion_tokens == bench.charged(key) == completion
    assert prompt <= found.prompt_tokens <= 2 * prompt + 100
    assert found.cached_tokens <= found.prompt_tokens


def test_usage_that_comes_twice_counts_once(make: Make) -> None:
    def twice(handler: Handler) -> None:
        handler.stream()
        for number in (1, 2):
            usage = {"prompt_tokens": 9, "completion_tokens": number}
            handler.event(json.dumps({"choices": [{"delta": {"content": "x"}}], "usage": usage}))
        handler.chunk("stop")
        handler.event(json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}))
        handler.event("[DONE]")

    bench = make(twice)
    key = bench.submit()
    assert (bench.end(key).usage.prompt_tokens, bench.charged(key)) == (9, 2)


def test_an_end_without_a_reason_is_one(make: Make) -> None:
    bench = make(answers("all of it", reason=None))
    assert bench.end(bench.submit()).finish_reason == "stop"


# ── what people and agents get to see ─────────────────────────────────────────────────────────────────────


def test_control_characters_of_an_endpoint_reach_no_terminal(make: Make) -> None:
    bench = make(status(400, "\x1b]0;owned\x07\r\nok"))
    assert bench.end(bench.submit()).message.isprintable()
    assert safe_line("a\x1b[2J\nb") == "a\ufffd[2J b"


def test_a_key_that_comes_back_is_not_passed_on(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    echo = f"your key is {KEY}"
    bench = make(
        status(503, "x" * 290 + KEY),
        garbage(json.dumps({"error": {"message": echo}})),
        cut(),
        answers(echo),
        key_file=str(file),
    )
    text = bench.text(bench.submit())
    assert "your key is" in text
    assert KEY[:8] not in text + repr(bench.channel.sent) + bench.remote.stats()["last_failure"]


# ── agents ────────────────────────────────────────────────────────────────────────────────────────────────


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("content", [msgspec.msgpack.Ext(5, b"x"), {b"k": 1, (1,): 2}, nested(2000)], ids=range(3))
def test_messages_that_are_no_json_end_their_call_alone(make: Make, content: Any) -> None:
    bench = make(answers("x"))
    assert bench.end(bench.submit(messages=[{"role": "user", "content": content}])).errno == errno.EINVAL
    turn = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": content}}]}
    assert bench.end(bench.submit(messages=[*USER, turn])).errno == errno.EINVAL
    assert bench.text(bench.submit()) == "x"


def test_calls_that_are_cancelled_at_once_leave_no_threads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "SPARE_THREADS", 4)
    go = threading.Event()
    ask = exchange.Exchange._ask

    def stuck(self: exchange.Exchange, *args: Any) -> Any:  # as in a name server that does not answer
        go.wait(20)
        return ask(self, *args)

    monkeypatch.setattr(exchange.Exchange, "_ask", stuck)
    bench = make(answers("x"), concurrency=2)
    before = threading.active_count()
    for _ in range(50):
        key = bench.submit()
        bench.remote.step()
        bench.send(link.CancelCall(key))
    assert threading.active_count() - before <= 7
    last = bench.submit()
    go.set()
    assert bench.text(last) == "x"


def test_after_a_trial_without_failure_or_success_others_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The circuit is open, and the trial's answer is invalid, which counts neither as failure nor as success."""
    monkeypatch.setattr(limits, "PAUSE_S", 0.05)
    bench = make(cut("one "), answers("other"), answers("x"))
    key = bench.submit()
    for _ in range(4):
        bench.remote._pace.breaker.failed("x", time.monotonic())
    assert bench.end(key).errno == errno.EIO
    assert bench.text(bench.submit()) == "x"


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────


def chunked(handler: Handler) -> None:
    body = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    handler.server.ports.append(handler.client_address[1])


def hangs_up_after(handler: Handler) -> None:
    chunked(handler)
    handler.close_connection = True


def test_a_connection_serves_again(make: Make) -> None:
    bench = make(chunked, whole({"content": "y"}), chunked)
    texts = []
    for _ in range(3):
        texts.append(bench.text(bench.submit()))
        bench.until(lambda: not bench.remote._attempts._exchanges)
    assert texts == ["x", "y", "x"]
    assert len(set(bench.endpoint.ports)) == 1


def test_a_connection_that_was_closed_meanwhile_is_no_failure(make: Make) -> None:
    bench = make(hangs_up_after, chunked)
    for _ in range(2):
        assert bench.text(bench.submit()) == "x"
        bench.until(lambda: not bench.remote._attempts._exchanges)
    assert len(set(bench.endpoint.ports)) == 2
    assert bench.remote.stats()["retries"] == 0
