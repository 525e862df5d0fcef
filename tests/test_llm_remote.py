"""A remote model: whatever its endpoint does, a call ends once, and no piece of text arrives twice."""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from aiosd import config
from aiosd.commands import models
from aiosd.errors import UsageError
from aiosd.ipc import endpoint as gateways
from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.remote import answer, attempts, keys, limits
from aiosd.llm.remote.backend import open_model
from aiosd.llm.remote.connections import RemoteEndpoint as Address
from aiosd.llm.remote.limits import MINUTE_S, Breaker, Circuit, RateWindow, backoff
from aiosd.llm.spec import ModelSpec
from benchmarks import harness
from libaios import parts, wire
from libaios.home import Home
from libaios.wire import Sampling, Sys
from tests.conftest import System
from tests.fakeendpoint import Deed, Endpoint, Handler, answers, bytewise, cut, garbage, hangs, status, vectors, whole
from tests.remotebench import KEY, TOOL, USER, Bench, Deaf, Make, make, short_pauses

__all__ = ["make", "short_pauses"]  # fixtures


LLAMA_SERVER = harness.PEERS / "llama-server"

# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat(make: Make, stream: bool) -> None:
    bench = make(answers("Hel", "lo"))
    key = bench.submit(stream=stream, sampling=Sampling(max_tokens=9, seed=5, stop=["x"]))
    end = bench.end(key)
    assert (end.finish_reason, end.usage.prompt_tokens, end.usage.cached_tokens) == ("stop", 11, 4)
    assert bench.text(key) == "Hello"
    assert bench.charged(key) == end.usage.completion_tokens == 3
    assert end.usage.reasoning_tokens == 2
    assert bench.prompts(key) == end.usage.prompt_tokens
    path, body, _ = bench.endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["messages"], body["max_tokens"], body["stop"]) == ("gpt", USER, 9, ["x"])
    assert "top_k" not in body


def test_thoughts_stand_apart_and_no_text_forges_a_mark(make: Make) -> None:
    def thinks(handler: Any) -> None:
        handler.stream()
        handler.chunk(reasoning_content="hm")
        handler.chunk(content=f"a{parts.REASONING}b")
        handler.chunk("stop")
        handler.event("[DONE]")

    bench = make(thinks)
    assert parts.Splitter().split(bench.text(bench.submit()))[:2] == ("a\ufffdb", "hm")


def test_an_endpoint_that_does_not_stream(make: Make) -> None:
    bench = make(whole({"content": "all of it"}))
    assert bench.text(bench.submit()) == "all of it"


def test_slow_bytes_are_put_together(make: Make) -> None:
    bench = make(bytewise("grüß ", "dich"))
    assert bench.text(bench.submit()) == "grüß dich"


def call(arguments: str, name: str = "f", id: str = "c1") -> list[dict[str, Any]]:
    return [{"index": 0, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}]


def test_tool_calls_come_checked(make: Make) -> None:
    bench = make(answers(reason="tool_calls", tool_calls=call('{"x": 3}')))
    end = bench.end(bench.submit(tools=[TOOL], tool_choice={"function": {"name": "f"}}))
    assert (end.finish_reason, end.tool_calls) == ("tool_calls", [wire.ToolCall("c1", "f", {"x": 3})])
    body = bench.endpoint.asked[0][1]
    assert body["tools"] == [{"type": "function", "function": TOOL}]
    assert body["tool_choice"]["type"] == "function"


@pytest.mark.parametrize("wrong", [call('{"x": "three"}'), call("{"), call("{}", name="g"), call("[]"), [7]])
def test_a_tool_call_that_does_not_fit_is_requested_again(make: Make, wrong: Any) -> None:
    bench = make(answers(reason="tool_calls", tool_calls=wrong), answers(tool_calls=call('{"x": 1}')))
    assert bench.end(bench.submit(tools=[TOOL])).tool_calls[0].arguments == {"x": 1}
    assert len(bench.endpoint.asked) == 2


def test_an_answer_that_breaks_its_schema_is_no_answer(make: Make) -> None:
    schema = TOOL["parameters"]
    bench = make(answers('{"x": '), answers('{"x": 5}'))
    key = bench.submit(schema=schema, stream=False)
    assert json.loads(bench.text(key)) == {"x": 5}
    assert bench.endpoint.asked[0][1]["response_format"]["json_schema"]["schema"] == schema
    never = make(answers("no"))
    failed = never.end(never.submit(schema=schema, stream=False))
    assert failed.errno == errno.EPROTO
    assert "no JSON" in failed.message
    given_out = make(answers('{"x": '))
    assert given_out.end(given_out.submit(schema=schema)).errno == errno.EPROTO
    assert len(given_out.endpoint.asked) == 1


def test_tool_calls_are_sent_in_the_form_of_the_api(make: Make) -> None:
    bench = make(answers("x"))
    turn = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": {"x": 1}}]}
    bench.end(bench.submit(messages=[*USER, turn, {"role": "tool", "tool_call_id": "c1", "content": "2"}]))
    (sent,) = bench.endpoint.asked[0][1]["messages"][1]["tool_calls"]
    assert sent == {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    "args",
    [
        {"sampling": Sampling(top_k=3)},
        {"grammar": "root ::= x"},
        {"messages": None, "prompt": [1, 2]},
        {"given": [1]},
        {"messages": None, "prompt": "x", "schema": {}},
        {"template_args": {"enable_thinking": True}},
        {"template_args": {"reasoning_effort": "low", "enable_thinking": False}},
        {"messages": None, "prompt": "x", "template_args": {"reasoning_effort": "low"}},
    ],
)
def test_what_cannot_be_passed_on_is_refused_by_name(make: Make, args: dict[str, Any]) -> None:
    bench = make(answers("x"))
    assert bench.end(bench.submit(**args)).errno == errno.EINVAL
    assert not bench.endpoint.asked


def chances(text: str, log: float = -0.5, **more: Any) -> dict[str, Any]:
    return {"token": text, "logprob": log, "bytes": list(text.encode()), "top_logprobs": [], **more}


def likely(*words: str, form: str = "content", log: float = -0.5) -> Deed:
    """An answer to a chat or completion with log probabilities of its words."""

    def deed(handler: Handler) -> None:
        handler.stream()
        for word in words:
            top = [chances(word, log, id=7), chances("else", -9999.0)]
            found: dict[str, Any] = {"content": [chances(word, log, id=7, top_logprobs=top)]}
            if form == "tokens":
                found = {"tokens": [word], "token_logprobs": [log], "top_logprobs": [{word: log, "else": -9999.0}]}
            body = {"delta": {"content": word}} if handler.path.endswith("chat/completions") else {"text": word}
            handler.event(json.dumps({"choices": [{"index": 0, **body, "logprobs": found}]}))
        handler.chunk("stop")
        handler.event("[DONE]")

    return deed


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("form", ["content", "tokens"])
def test_log_probabilities(make: Make, form: str, stream: bool) -> None:
    bench = make(likely("grüß", " dich", form=form))
    asked: dict[str, Any] = {"messages": None, "prompt": "x"} if form == "tokens" else {}
    key = bench.submit(stream=stream, sampling=Sampling(logprobs=True, top_logprobs=1), **asked)
    assert bench.end(key).finish_reason == "stop"
    number = 7 if form == "content" else -1
    found = bench.logprobs(key)
    assert [(one.piece.decode(), one.logprob, one.token) for one in found] == [
        ("grüß", -0.5, number),
        (" dich", -0.5, number),
    ]
    assert [[other.piece.decode() for other in one.top] for one in found] == [["grüß"], [" dich"]]
    body = bench.endpoint.asked[0][1]
    assert (body["logprobs"], body.get("top_logprobs")) == ((True, 1) if form == "content" else (1, None))


def test_log_probabilities_that_were_not_requested_are_ignored(make: Make) -> None:
    bench = make(likely("x", log=7.0))
    key = bench.submit()
    assert bench.text(key) == "x"
    assert not bench.logprobs(key)
    assert "logprobs" not in bench.endpoint.asked[0][1]


def test_an_endpoint_without_log_probabilities_is_named(make: Make) -> None:
    bench = make(answers("x"))
    failed = bench.end(bench.submit(stream=False, sampling=Sampling(logprobs=True)))
    assert (failed.errno, failed.elsewhere) == (errno.EINVAL, True)
    assert failed.message.startswith("logprobs: ")
    assert len(bench.endpoint.asked) == 1


def test_a_log_probability_above_0_is_refused(make: Make) -> None:
    bench = make(likely("x", log=0.5), likely("y", log=1e-9))
    key = bench.submit(stream=False, sampling=Sampling(logprobs=True))
    assert bench.text(key) == "y"
    assert [(one.logprob, one.top) for one in bench.logprobs(key)] == [(0.0, [])]


def test_log_probabilities_without_end_end_their_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "MOST_CHANCES", 1000)
    monkeypatch.setattr(attempts, "MOST_TRIES", 1)
    bench = make(likely(*"x" * 100))
    failed = bench.end(bench.submit(sampling=Sampling(logprobs=True)))
    assert "more than 1000 bytes of log probabilities" in failed.message


def test_log_probabilities_come_once_after_a_loss_and_again_for_a_new_kernel(make: Make) -> None:
    def breaks(handler: Handler) -> None:
        handler.stream()
        found = {"content": [chances("one")]}
        handler.event(json.dumps({"choices": [{"delta": {"content": "one"}, "logprobs": found}]}))

    bench = make(breaks, likely("one", " two"))
    asked: dict[str, Any] = {"sampling": Sampling(logprobs=True)}
    key = bench.submit(**asked)
    bench.end(key)
    assert [one.piece for one in bench.logprobs(key)] == [b"one", b" two"]
    bench.channel.sent.clear()
    bench.again(key, given="one", **asked)
    assert [one.piece for one in bench.logprobs(key)] == [b" two"]
    assert len(bench.endpoint.asked) == 2


def test_other_calls_are_refused_and_closing_a_context_is_nothing(make: Make) -> None:
    bench = make(answers("x"))
    for number, sys in enumerate((Sys.TOKENIZE, Sys.RERANK, Sys.CTX_CLOSE, Sys.CTX_LIST)):
        bench.send(link.Ask((1, number), link.Caller(1, 0, "x", False, ""), sys, Raw(msgspec.msgpack.encode([]))))
    kinds = [type(message).__name__ for message in bench.channel.sent]
    assert kinds == ["Failed", "Failed", "Answered", "Answered"]


# ── vectors ───────────────────────────────────────────────────────────────────────────────────────────────


def embed(bench: Bench, *texts: str) -> link.CallKey:
    bench.number += 1
    args = Raw(msgspec.msgpack.encode(wire.Embed(list(texts))))
    bench.send(link.Ask((1, bench.number), link.Caller(1, 0, "x", False, ""), Sys.EMBED, args))
    return 1, bench.number


def answered(bench: Bench, key: link.CallKey) -> Any:
    kinds = (link.Answered, link.Failed)
    return bench.until(lambda: next((m for m in bench.channel.sent if isinstance(m, kinds) and m.key == key), None))


def test_vectors_have_unit_length_and_the_order_of_their_texts(make: Make) -> None:
    first, second = {"index": 1, "embedding": [0.0, 2.0]}, {"index": 0, "embedding": "AABAQAAAgEA="}  # 3, 4
    bench = make(vectors(first, second))
    reply = answered(bench, embed(bench, "a", "b"))
    found = msgspec.msgpack.decode(reply.body, type=wire.Embedded)
    assert (found.n, found.d, found.prompt_tokens, reply.prompt_tokens) == (2, 2, 5, 5)
    assert list(memoryview(found.data).cast("f")) == pytest.approx([0.6, 0.8, 0.0, 1.0])
    path, body, _ = bench.endpoint.asked[0]
    assert (path, body) == ("/v1/embeddings", {"model": "gpt", "input": ["a", "b"]})
    assert [type(message).__name__ for message in bench.channel.sent] == ["Answered"]
    assert bench.remote.stats()["running"] == bench.remote.stats()["waiting"] == 0


def test_many_texts_go_in_several_requests_and_each_is_tried_again(make: Make) -> None:
    bench = make(status(503), vectors(), cut(), vectors(tokens=7), concurrency=1)
    reply = answered(bench, embed(bench, *map(str, range(70))))
    found = msgspec.msgpack.decode(reply.body, type=wire.Embedded)
    assert (found.n, found.prompt_tokens) == (70, 12)
    assert [len(body["input"]) for _, body, _ in bench.endpoint.asked] == [64, 64, 6, 6]


@pytest.mark.parametrize(
    "wrong",
    [
        vectors([1.0]),
        vectors([1.0], [1.0, 2.0]),
        vectors([0.0], [1.0]),
        vectors([], []),
        vectors("AAA=", "AAA="),
        vectors({"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}),
        vectors({"index": 0}, {"index": 1}),
        whole({"content": "no vectors"}),
        garbage("{"),
    ],
)
def test_invalid_vectors_are_requested_again(make: Make, wrong: Deed) -> None:
    bench = make(wrong, vectors())
    reply = answered(bench, embed(bench, "a", "b"))
    assert msgspec.msgpack.decode(reply.body, type=wire.Embedded).n == 2
    assert len(bench.endpoint.asked) == 2


def test_an_endpoint_without_vectors_is_named(make: Make) -> None:
    bench = make(status(501, "start it with --embeddings"))
    failed = answered(bench, embed(bench, "a"))
    assert failed.errno == errno.ENOSYS
    assert failed.message.startswith("EMBED: it makes no vectors: ")
    assert failed.message.endswith("start it with --embeddings")


def test_a_cancel_ends_a_request_for_vectors(make: Make) -> None:
    bench = make(hangs())
    key = embed(bench, "a")
    bench.until(lambda: bench.endpoint.asked)
    bench.send(link.CancelCall(key))
    bench.until(lambda: bench.remote.stats()["slots"]["used"] == 0)
    assert bench.endpoint.hung_up.wait(30)
    assert not bench.channel.sent


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────

FAULTS = [
    status(429, "slow down"),
    status(500),
    status(503),
    cut(),
    cut("Hel"),
    garbage("{"),
    garbage("[1]"),
    garbage('{"error": {"message": "overloaded"}}'),
    garbage('{"choices": 5}'),
    whole({"content": None}, reason=""),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_survived_and_every_piece_comes_once(make: Make, fault: Deed, stream: bool) -> None:
    bench = make(fault, fault, answers("Hel", "lo"))
    key = bench.submit(stream=stream)
    assert bench.text(key) == "Hello"
    assert len(bench.endpoint.asked) == 3
    with_text = fault is FAULTS[4]  # the text so far and its prompt are charged
    with_usage = fault is FAULTS[-1]
    assert bench.charged(key) == 3 + 2 * with_text + 2 * 3 * with_usage
    assert bench.prompts(key) >= 11
    assert bench.remote.stats()["retries"] == 2


def test_an_endpoint_that_is_not_there(make: Make) -> None:
    bench = make(answers("x"), url="http://127.0.0.1:9/v1")
    failed = bench.end(bench.submit())
    assert failed.errno == errno.EIO
    assert failed.elsewhere
    assert failed.message.endswith("5 attempts failed; the last: Connection refused")
    assert bench.remote.stats()["circuit"] == "open"


def test_another_answer_is_never_joined_to_the_first(make: Make) -> None:
    bench = make(cut("Hel"), answers("Good ", "day"))
    key = bench.submit()
    failed = bench.end(key)
    assert failed.errno == errno.EIO
    assert "answers otherwise" in failed.message
    whole_only = make(cut("Hel"), answers("Good ", "day"))
    assert whole_only.text(whole_only.submit(stream=False)) == "Good day"


def test_a_completion_goes_on_from_its_text(make: Make) -> None:
    def first(handler: Any) -> None:
        handler.stream()
        handler.event(json.dumps({"choices": [{"text": "two "}]}))

    bench = make(first, answers("three"))
    assert bench.text(bench.submit(messages=None, prompt="one ")) == "two three"
    assert bench.endpoint.asked[1][1]["prompt"] == "one two "


@pytest.mark.parametrize(
    ("deed", "code"),
    [
        (status(400, "bad"), errno.EINVAL),
        (status(400, "long", code="context_length_exceeded"), errno.EMSGSIZE),
        (status(400, "long", code=400, type="exceed_context_size_error"), errno.EMSGSIZE),  # llama-server
        (status(400, "This model's maximum context length is 8 tokens", code=400), errno.EMSGSIZE),  # vLLM
        (status(401), errno.EACCES),
        (status(404), errno.ENOENT),
        (status(429, code="insufficient_quota"), errno.EDQUOT),
        (status(501), errno.EIO),
        (status(302), errno.EINVAL),
    ],
)
def test_a_refusal_is_not_tried_again(make: Make, deed: Deed, code: int) -> None:
    bench = make(deed)
    assert bench.end(bench.submit()).errno == code
    assert len(bench.endpoint.asked) == 1
    assert bench.remote.stats()["circuit"] == "closed"


def test_retry_after_holds_back_every_call(make: Make) -> None:
    bench = make(status(429, headers={"Retry-After": "0.3"}), answers("x"), concurrency=1)
    keys = [bench.submit(peer) for peer in (1, 2)]
    for key in keys:
        assert bench.text(key) == "x"
    first, second = bench.endpoint.times[:2]
    assert second - first >= 0.29


def test_newer_models_use_another_name_for_the_limit(make: Make) -> None:
    bench = make(status(400, "use max_completion_tokens instead"), answers("x"))
    assert bench.text(bench.submit(sampling=Sampling(max_tokens=7))) == "x"
    assert bench.endpoint.asked[1][1]["max_completion_tokens"] == 7


def test_fields_that_the_caller_did_not_set_are_left_out_where_they_are_refused(make: Make) -> None:
    refusals = [
        status(400, f"Unsupported value: '{name}' does not support this.", param=name, code="unsupported_value")
        for name in ("temperature", "top_p")
    ]
    bench = make(*refusals, answers("x"), answers("y"), refusals[0])
    assert bench.text(bench.submit()) == "x"
    assert not {"temperature", "top_p"} & set(bench.endpoint.asked[2][1])
    assert bench.text(bench.submit()) == "y"
    asked = bench.endpoint.asked
    assert (len(asked), "temperature" in asked[3][1]) == (4, False)
    assert bench.end(bench.submit(sampling=Sampling(temperature=0.0))).errno == errno.EINVAL
    assert (len(asked), asked[4][1]["temperature"]) == (5, 0.0)


def test_a_bias_is_passed_on(make: Make) -> None:
    bench = make(answers("x"))
    assert bench.text(bench.submit(sampling=Sampling(logit_bias={7: -100.0}))) == "x"
    assert bench.endpoint.asked[0][1]["logit_bias"] == {"7": -100}


@pytest.mark.parametrize("effort", ["none", "low"])
def test_an_effort_is_passed_on(make: Make, effort: str) -> None:
    bench = make(answers("x"))
    args = {"reasoning_effort": effort, "enable_thinking": effort != "none"}  # as the gateway sends it
    assert bench.text(bench.submit(template_args=args)) == "x"
    assert bench.endpoint.asked[0][1]["reasoning_effort"] == effort


# ── parking, cancel, budget, a new kernel ─────────────────────────────────────────────────────────────────


def test_a_cancel_ends_the_request(make: Make) -> None:
    bench = make(hangs("a"))
    key = bench.submit()
    bench.until(lambda: bench.deltas(key))
    bench.send(link.CancelCall(key))
    assert bench.endpoint.hung_up.wait(30)
    assert bench.remote.stats()["slots"]["free"] == 8


def test_a_parked_call_stands_still_and_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def waits(handler: Any) -> None:
        handler.stream()
        handler.chunk(content="one ")
        go.wait(60)
        handler.chunk("stop", content="two")
        handler.event("[DONE]")

    bench = make(waits)
    key = bench.submit()
    bench.until(lambda: bench.deltas(key))
    bench.send(link.Park(1, True, 7))
    assert link.Parked(7) in bench.channel.sent
    go.set()
    count = len(bench.channel.sent)
    for _ in range(5):
        bench.remote.step()
        select.select(bench.remote.fds(), [], [], 0.02)
    assert len(bench.channel.sent) == count
    bench.send(link.Park(1, False))
    assert bench.text(key) == "one two"
    assert len(bench.endpoint.asked) == 1


def test_nothing_is_read_for_a_parked_call(make: Make) -> None:
    """The answer is larger than the buffers of sockets, so the endpoint waits, too, until the call goes on."""
    go, all_written = threading.Event(), threading.Event()

    def floods(handler: Any) -> None:
        handler.stream()
        handler.chunk(content="one ")
        go.wait(60)
        for _ in range(256):
            handler.wfile.write(b": " + b"x" * (1 << 16) + b"\n")
        all_written.set()
        handler.chunk("stop", content="two")
        handler.event("[DONE]")

    bench = make(floods)
    key = bench.submit()
    bench.until(lambda: bench.deltas(key))
    bench.send(link.Park(1, True, 7))
    go.set()
    assert not all_written.wait(1.5)
    bench.send(link.Park(1, False))
    assert bench.text(key) == "one two"


def test_a_call_that_was_parked_for_long_is_sent_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PARK_S", 0.05)
    bench = make(hangs("one "), answers("one ", "two"))
    key = bench.submit()
    bench.until(lambda: bench.deltas(key))
    bench.send(link.Park(1, True, 7))
    bench.until(bench.endpoint.hung_up.is_set)
    bench.send(link.Park(1, False))
    assert bench.text(key) == "one two"


def test_a_budget_is_passed_on_and_held(make: Make) -> None:
    bench = make(answers(*"abcdefgh", reason="length", usage=None))
    bench.end(bench.submit())
    prompt = bench.prompts((1, 1))
    key = bench.submit(budget=prompt + 3)
    assert bench.end(key).finish_reason == "limit"
    assert (bench.prompts(key), bench.charged(key)) == (prompt, 3)
    assert bench.endpoint.asked[1][1]["max_tokens"] == 3
    failed = bench.end(bench.submit(budget=prompt))
    assert (failed.errno, failed.short) == (errno.EDQUOT, "tokens")
    assert len(bench.endpoint.asked) == 2, "nothing was asked that could not be paid for"


def paid(bench: Bench, key: link.CallKey) -> tuple[int, int]:
    """Charged tokens of prompts and of answers, whatever the outcome."""
    return bench.prompts(key), sum(delta.charged or 0 for delta in bench.deltas(key))


def test_an_answer_without_figures_is_counted_by_what_came(make: Make) -> None:
    """The count is the same whether it came in many pieces, in few, or in one."""
    text = "word " * 120
    for deed in (answers(text[:300], text[300:], usage=None), whole({"content": text}, usage=None)):
        bench = make(deed)
        key = bench.submit()
        assert bench.end(key).usage.completion_tokens == bench.charged(key) == 100
    bench = make(answers(*"abcdef", usage=None))
    key = bench.submit()
    assert (bench.end(key).usage.completion_tokens, bench.charged(key)) == (6, 6)


def test_each_attempt_is_paid_for_by_its_own_figures(make: Make) -> None:
    """One attempt is cut off after its usage has arrived; another makes the call fail, although it is complete."""
    used = {"prompt_tokens": 50, "completion_tokens": 7}

    def cut_off(handler: Handler) -> None:
        handler.stream()
        handler.chunk(content="Hel")
        handler.event(json.dumps({"choices": [], "usage": used}))

    bench = make(cut_off, answers("Hel", "lo"))
    key = bench.submit()
    assert bench.text(key) == "Hello"
    assert (bench.prompts(key), bench.charged(key)) == (50 + 11, 7 + 3)

    bench = make(answers("no JSON", usage=used))
    key = bench.submit(schema={"type": "object"}, stream=False)
    assert bench.end(key).errno == errno.EPROTO
    assert paid(bench, key) == (50 * 5, 7 * 5)


def test_what_comes_again_is_paid_for_again_and_counts_against_the_budget(make: Make) -> None:
    """If a stream is cut off again and again, its caller gets the beginning once, but the endpoint works each time."""
    bench = make(cut("Hel", "lo"))
    key = bench.submit()
    assert bench.end(key).errno == errno.EIO
    prompts, tokens = paid(bench, key)
    assert (prompts % 5, tokens) == (0, 2 * 5)
    estimated = prompts // 5
    bench = make(cut("Hel", "lo"))
    key = bench.submit(budget=3 * estimated + 2 + 2 + 1)
    assert bench.end(key).finish_reason == "limit"
    assert bench.prompts(key) + bench.charged(key) == 3 * estimated + 5
    assert [asked[1]["max_tokens"] for asked in bench.endpoint.asked] == [2 * estimated + 5, estimated + 3, 1]


def test_calls_side_by_side_go_beyond_no_budget_together(make: Make) -> None:
    """Each call may exceed it by one piece at most."""
    bench = make(answers(*"abcdefgh", usage=None))
    bench.end(bench.submit())
    estimated = bench.prompts((1, 1))

    def submit(key: int, left: int, context: int | None = None, owner: int = 1) -> link.CallKey:
        share = link.PurseShare(owner, left, context)
        made = wire.Generate(messages=USER, stream=True)
        bench.send(link.Submit((1, key), made, budget=left, shares=[share]))
        return 1, key

    left = 2 * estimated + 3
    keys = [submit(key, left) for key in (11, 12, 13)]
    ends = [bench.end(key) for key in keys]
    used = sum(sum(paid(bench, key)) for key in keys) + sum(end.charged for end in ends if hasattr(end, "charged"))
    assert used <= left + 2, "of each that ran, the piece that could not be paid for"
    assert [type(end) for end in ends].count(link.Failed) == 1
    failed = next(end for end in ends if isinstance(end, link.Failed))
    assert (failed.errno, failed.short) == (errno.EDQUOT, "tokens")
    (purse,) = bench.remote._attempts.purses._by_owner.values()
    assert purse.left == left - used

    bench = make(answers(*"abcdefgh", usage=None))
    held = bench.end(submit(21, 1 << 20, estimated + 3))
    assert (held.finish_reason, held.short, bench.charged((1, 21))) == ("limit", "context", 4)
    key = submit(22, 1 << 20, estimated, owner=2)
    assert (bench.end(key).errno, bench.end(key).short) == (errno.EDQUOT, "context")


def test_a_new_kernel_gets_the_rest(make: Make) -> None:
    bench = make(hangs("one ", "two "), answers("one ", "two ", "three"))
    key = bench.submit()
    bench.until(lambda: "".join(delta.text for delta in bench.deltas(key)) == "one two ")
    bench.channel.sent.clear()
    bench.send(link.Keep([1]))
    bench.again(key, given="one ")
    (delta,) = bench.until(lambda: bench.deltas(key))
    assert (delta.offset, delta.text, delta.charged) == (4, "two ", 2)
    bench.send(link.Keep([2]))
    assert bench.endpoint.hung_up.wait(30)
    bench.channel.sent.clear()
    bench.again(key, given="one two ")  # as after the core's death
    end = bench.end(key)
    assert "".join(message.text for message in [*bench.deltas(key), end]) == "three"
    bench.channel.sent.clear()
    bench.again(key, given="one two ")
    assert bench.end(key).text == "three", "it is over, and not asked again"
    assert len(bench.endpoint.asked) == 2


def test_calls_wait_for_a_place(make: Make) -> None:
    bench = make(hangs("x"), concurrency=2)
    for peer in range(5):
        bench.submit(peer)
    bench.until(lambda: len(bench.endpoint.asked) == 2)
    figures = bench.remote.stats()
    assert (figures["running"], figures["waiting"], figures["slots"]["free"]) == (2, 3, 0)
    bench.send(link.CancelCall((0, 1)))
    bench.until(lambda: len(bench.endpoint.asked) == 3)


# ── rates, back-off, circuit ──────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 20), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), max_size=60))
def test_a_rate_holds_in_every_minute(limit: int, uses: list[tuple[float, int]]) -> None:
    window, now, used = RateWindow(limit), 0.0, []
    for pause, units in uses:
        now += pause
        wait = window.wait(units, now)
        now += wait
        assert window.wait(units, now + 1e-6) == 0
        now += 1e-6
        window.use(units, now)
        used.append((now, units))
        last = [amount for at, amount in used if now - at < MINUTE_S]
        assert sum(last) <= limit or last == [units], "one that is larger than the limit goes alone"
    assert RateWindow(0).wait(10**9, 0.0) == 0.0


def test_pauses_grow_and_differ() -> None:
    rng = random.Random(3)
    pauses = [[backoff(n, rng) for _ in range(20)] for n in (1, 2, 3, 12)]
    assert all(len(set(some)) > 10 for some in pauses)
    assert max(pauses[0]) <= min(pauses[2]) * 1.001
    assert max(pauses[3]) <= limits.MOST_S


def test_a_circuit_opens_lets_one_through_and_closes() -> None:
    breaker = Breaker()
    for _ in range(limits.FAILURES):
        assert breaker.wait(0.0) == 0.0
        breaker.failed("x", 0.0)
    assert breaker.wait(0.0) == limits.PAUSE_S
    assert breaker.wait(limits.PAUSE_S) == 0.0
    breaker.sent()
    assert breaker.wait(limits.PAUSE_S) > 0, "one at a time"
    breaker.failed("y", 10.0)
    assert breaker.wait(10.0) == 2 * limits.PAUSE_S
    breaker.sent()
    breaker.succeeded()
    assert (breaker.wait(10.0), breaker.circuit) == (0.0, Circuit.CLOSED)


def test_rates_are_kept_on_our_side(make: Make) -> None:
    now = [0.0]
    bench = make(answers("x"), clock=lambda: now[0], rpm=2)
    keys = [bench.submit() for _ in range(3)]
    for key in keys[:2]:
        bench.end(key)
    bench.remote.step()
    assert len(bench.endpoint.asked) == 2
    assert bench.remote._wait() == MINUTE_S
    now[0] += MINUTE_S
    bench.end(keys[2])


# ── keys, settings, a whole system ────────────────────────────────────────────────────────────────────────


def test_a_key_is_sent_and_in_nothing_else(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    bench = make(status(401, f"wrong key {KEY}"), key_file=str(file))
    failed = bench.end(bench.submit())
    assert bench.endpoint.asked[0][2]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in failed.message
    assert KEY not in repr([bench.remote.stats(), bench.remote.info, bench.remote._spec])


def test_a_key_comes_from_the_keyring(make: Make) -> None:
    name = f"aiosd-test-{os.getpid()}".encode()
    try:
        made = keys._call(248 if platform.machine() == "x86_64" else 217, b"user", name, KEY.encode(), len(KEY), -4)
    except OSError as err:
        pytest.skip(f"no keyring: {err}")
    try:
        bench = make(answers("x"), key_file=f"keyring:{name.decode()}")
        bench.end(bench.submit())
        assert bench.endpoint.asked[0][2]["Authorization"] == f"Bearer {KEY}"
    finally:
        keys._call(keys._NUMBERS[platform.machine()][1], 9, made, -4)  # unlink
    with pytest.raises(OSError, match="key"):
        keys.read(f"keyring:{name.decode()}")


@pytest.mark.parametrize("content", [None, "", "a\nb", "ключ"])
def test_a_key_file_without_a_key_is_one_line(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    channel: Any = Deaf()
    with pytest.raises(UsageError, match=r"^key_file .*key: ") as raised:
        open_model(ModelSpec("m", url="http://h/v1", model="x", key_file=str(file)), Line(channel, "m"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["ftp://h/v1", "http://", "https://me:secret@h/v1", "https://h/v1?key=1", "http://h:x/"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        Address.of(url)
    assert "secret" not in str(raised.value)


def test_settings_of_a_model_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    flags = {"model": ["fast=https://host/v1#gpt", "nano"], "rpm": 60}
    fast, nano = config.load(flags, home, environ={}, cwd="/").models
    assert (fast.name, fast.url, fast.model, fast.rpm, fast.path) == ("fast", "https://host/v1", "gpt", 60, "")
    assert fast.backend != nano.backend
    (tmp_path / "aiosd.toml").write_text(
        '[[model]]\nurl = "http://h/v1"\nmodel = "org/m"\nkey_file = "k"\nconcurrency = 3\ntpm = 9\n'
    )
    monkeypatch.setenv("AIOS_HOME", str(tmp_path))
    (row,) = models._elsewhere()
    assert (row["name"], row["url"]) == ("org_m", "http://h/v1#org/m")
    (model,) = config.load({}, home, environ={}, cwd="/").models
    assert (model.name, model.model, model.concurrency, model.tpm) == ("org_m", "org/m", 3, 9)
    assert model.key_file == str(tmp_path / "k")
    with pytest.raises(UsageError, match="its name there"):
        config.load({"model": ["https://host/v1"]}, home, environ={}, cwd="/")
    (tmp_path / "aiosd.toml").write_text('[[model]]\nurl = "http://h/v1"\n')
    with pytest.raises(UsageError, match="belong together"):
        config.load({}, home, environ={}, cwd="/")
    environ = {"AIOSD_MODEL": "https://host/v1#gpt,nano"}
    several = config.load({}, Home(tmp_path / "other"), environ=environ, cwd="/").models
    assert [one.name for one in several] == ["gpt", "nano"]


AGENT = """
import sys
import libaios as aios
for piece in aios.llm.chat([{"role": "user", "content": "hi"}], stream=True):
    print(piece.text, end="", flush=True)
print(piece.usage.prompt_tokens, [one.url for one in aios.llm.models()] != [""])
"""


def test_an_agent_talks_to_a_model_elsewhere(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """The endpoint fails, and the core is killed in the middle: the agent gets its text once."""
    begun = threading.Event()

    def first(handler: Any) -> None:
        handler.stream()
        handler.chunk(content="one ")
        begun.set()
        handler.server.over.wait(60)

    endpoint = Endpoint(status(503), first, answers("one ", "two ", "three "))
    script, key = tmp_path / "agent.py", tmp_path / "key"
    script.write_text(AGENT)
    key.write_text(KEY)
    key.chmod(0o600)
    try:
        system = fresh_aiosd("--model", f"far={endpoint.url}#gpt", "--key-file", str(key))
        job = system.popen("aios-run", script)
        assert begun.wait(30)
        assert job.stdout is not None
        assert job.stdout.read(4) == "one "
        (core,) = (one for one in system.ps() if one["name"] == "llm")
        maps = Path(f"/proc/{core['ospid']}/maps").read_text()
        assert "llama" not in maps
        os.kill(core["ospid"], signal.SIGKILL)
        output, errors = job.communicate(timeout=30)
        assert (output, job.returncode) == ("two three 11 True\n", 0), errors
        shown = system.run("aiosd", "status", "-v", check=True).stdout + system.run("aiosd", "status").stdout
        assert f"{endpoint.url}#gpt" in shown
        assert KEY not in shown + system.log() + system.run("aios-ps", "-ef").stdout
        system.calm_down()
    finally:
        endpoint.close()


BASICS = """
import json
import libaios as aios
say = [{"role": "user", "content": "Hello!"}]
digit = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
print("".join(piece.text for piece in aios.llm.chat(say, stream=True, temperature=0)))
print(list(json.loads(aios.llm.chat(say, schema=digit).text)))
try:
    aios.llm.chat([{"role": "user", "content": "word " * 3000}])
except OSError as err:
    print(err.errno)
likely = aios.llm.chat(say, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0).logprobs
print([(one.piece, round(one.logprob, 2) + 0.0, len(one.top)) for one in likely])
"""

NEIGHBOUR = (
    BASICS
    + """
tool = {"type": "function", "function": {"name": "pick", "parameters": digit}}
call = aios.llm.chat(say, tools=[tool], tool_choice="required").tool_calls[0]
print(call.name, list(call.arguments))
print(aios.llm.complete("Once", max_tokens=5, temperature=0).usage.completion_tokens)
found = aios.llm.embed(["one", "two"])
print(found.shape, [round(float(value), 3) for value in found[1][:5]])
"""
)


@pytest.mark.skipif(not LLAMA_SERVER.exists(), reason="make peers builds it")
def test_llama_server_is_an_endpoint(aiosd: System, fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """It is built from the core's sources and has the embedded model, so it gives the same answers."""
    script = tmp_path / "agent.py"
    script.write_text(BASICS)
    with harness.Server(harness.model_path("nano"), 2, 2048, 1, "--jinja") as server:
        system = fresh_aiosd("--model", f"far=http://127.0.0.1:{server.port}/v1#nano")
        there = system.run("aios-run", script, check=True).stdout.splitlines()
    assert there == aiosd.run("aios-run", script, check=True).stdout.splitlines()
    assert there[1:3] == ["['n']", str(errno.EMSGSIZE)]


@pytest.mark.skipif(not gateways.installed(), reason="the extra `gateway` is not installed")
def test_another_aiosd_is_an_endpoint(aiosd: System, fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    made = aiosd.run("aiosd", "token", "neighbour", check=True)
    url = made.stderr.partition(";")[0].partition(": neighbour: ")[2]
    script, key = tmp_path / "agent.py", tmp_path / "key"
    script.write_text(NEIGHBOUR)
    key.write_text(made.stdout)
    key.chmod(0o600)
    system = fresh_aiosd("--model", f"far={url}#nano", "--key-file", str(key))
    there = system.run("aios-run", script, check=True).stdout.splitlines()
    assert there == aiosd.run("aios-run", script, check=True).stdout.splitlines()
    assert there[1:3] + there[4:6] == ["['n']", str(errno.EMSGSIZE), "pick ['n']", "5"]
    assert there[6].startswith("(2, ")
    (spent,) = (one["completion_tokens"] for one in aiosd.agents() if one["name"] == "neighbour")
    assert spent > 5
    aiosd.run("aiosd", "token", "neighbour", "--revoke", check=True)
