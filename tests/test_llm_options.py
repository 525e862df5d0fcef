"""Sampling options of a call, through the engine: each has its effect, and only on its own call."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from aiosd.ipc.link import Delta, GenerationDone, Step, Submit
from aiosd.kernel.cores import Core
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.generations import Generations
from aiosd.kernel.service import ServiceCall
from aiosd.llm import llama, loading
from aiosd.llm.gbnf import check
from aiosd.llm.picking import Picker
from aiosd.llm.sampling import Drawer
from libaios.wire import Generate, Logprobs, Progress, Sampling
from tests import tinymodels
from tests.pace import cheap
from tests.test_llm_engine import Bench, load

LONG = {"type": "string", "minLength": 30}
OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loading.LoadedModel]:
    llama.start()
    loaded = load(tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", f16=True))
    yield loaded
    loaded.close()


@pytest.fixture
def bench(loaded: loading.LoadedModel) -> Iterator[Bench]:
    loaded.context.clear()
    bench = Bench(loaded)
    yield bench
    bench.run()
    bench.engine.keep([])
    bench.engine._count()


def result(bench: Bench, prompt: str | list[int], **options: Any) -> GenerationDone:
    bench.forget()
    key = bench.submit(prompt, **options)
    bench.run()
    end = bench.end(key)
    logprobs = all_logprobs(bench, key) if options.get("logprobs") else end.logprobs
    return replace(end, tokens=bench.whole(key)[0], logprobs=logprobs)


def all_logprobs(bench: Bench, key: Any) -> Logprobs:
    """The log probabilities of all deltas and of the final message."""
    found: Logprobs = []
    for message in bench.sent:
        parts = (
            message.deltas if isinstance(message, Step) else [message] if isinstance(message, GenerationDone) else []
        )
        for part in parts:
            if part.key == key:
                assert part.logprobs is not None
                assert len(part.logprobs) == len(part.tokens)
                found += part.logprobs
    return found


# ── the batch ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 40, "min_p": 0.05}, {"mirostat": 2}, {"xtc_probability": 0.5}, {"dry_multiplier": 1.0}]
)
def test_a_seeded_text_is_the_same_among_neighbours_and_without_a_compiler(bench: Bench, more: dict[str, Any]) -> None:
    options = {**OPEN, **more}
    expected = bench.alone("seeded", **options)
    bench.forget()
    key = bench.submit("seeded", **options)
    for i, other in enumerate([{}, {"temperature": 2.0}, {"frequency_penalty": 1.0, "logprobs": True}]):
        bench.submit(f"neighbour {i}", **{**OPEN, **other})
    bench.run()
    assert bench.whole(key)[0] == expected
    bench.engine._picker = Picker(Drawer(native=False))
    assert bench.alone("seeded", **options) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_goes_on_after_a_death_as_if_there_had_been_none(bench: Bench, version: int) -> None:
    options: dict[str, Any] = {"mirostat": version, "mirostat_tau": 3.0, "temperature": 1.0, "seed": 3}
    key = bench.submit("once upon a time", max_tokens=40, stream=True, **options)
    bench.run()
    whole = bench.whole(key)[0]
    deltas = [d for message in bench.sent if isinstance(message, Step) for d in message.deltas if d.key == key]
    delta = next(d for d in deltas if d.offset + len(d.tokens) >= 20)
    given = whole[: delta.offset + len(delta.tokens)]
    rest = []
    for mu in (delta.mu, None):
        sampling = Sampling(max_tokens=40, ignore_eos=True, **options)
        request = Generate(prompt="once upon a time", sampling=sampling, given=given)
        bench.engine.submit(Submit((9, len(rest)), request, mu=mu))
        bench.run()
        rest.append(bench.whole((9, len(rest)), len(given))[0])
    assert rest[0] == whole[len(given) :]
    assert rest[1] != rest[0], "it would have begun anew"


def test_the_kernel_gives_a_new_core_mirostats_state() -> None:
    request = Generate(prompt=[1], sampling=Sampling(mirostat=2))
    peer = SimpleNamespace(proc=None)
    call: Any = SimpleNamespace(key=(1, 1), peer=peer, generation=OpenGeneration(request, "m", Progress()))
    kernel: Any = SimpleNamespace(_count_completion=lambda *_: None)
    Generations.on_delta(kernel, call, Delta((1, 1), 0, [5, 6], "ab", mu=3.5))
    kernel.call_budget, kernel.money_left = lambda call: (0, "g", None), lambda call: None
    core: Any = SimpleNamespace(listener=kernel)
    again = Core.fresh(core, ServiceCall(call, Submit((1, 1), request)))
    assert isinstance(again, Submit)
    assert (again.request.given, again.mu) == ([5, 6], 3.5)


@pytest.mark.parametrize("more", [{}, OPEN, {**OPEN, "mirostat": 1}, {"schema": LONG}])
def test_a_row_without_numbers_fails_its_call_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    expected = bench.alone("healthy")
    bench.forget()
    ill, healthy = bench.submit("ill", **more), bench.submit("healthy")
    bench.run(3)
    place = [sequence.key for sequence in bench.engine._rows].index(ill)
    original = llama.LlamaContext.logits

    def spoilt(self: llama.LlamaContext, rows: int) -> llama.Floats:
        logits = original(self, rows)
        if rows == 2:
            logits[place] = np.nan
        return logits

    monkeypatch.setattr(llama.LlamaContext, "logits", spoilt)
    bench.run()
    assert bench.failure(ill).errno == errno.EIO
    assert bench.whole(healthy)[0] == expected


def test_a_prompt_without_numbers_fails_and_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama.LlamaContext.logits

    def spoilt(self: llama.LlamaContext, rows: int) -> llama.Floats:
        logits = original(self, rows)
        logits[:] = np.nan
        return logits

    monkeypatch.setattr(llama.LlamaContext, "logits", spoilt)
    ill = bench.submit("ill")
    bench.run()
    assert bench.failure(ill).errno == errno.EIO
    monkeypatch.undo()
    key = bench.submit("ill")
    bench.run()
    assert bench.end(key).usage.cached_tokens == 0


# ── log probabilities ─────────────────────────────────────────────────────────────────────────────────────


def test_log_probabilities_are_those_of_the_model(bench: Bench) -> None:
    model, context = bench.loaded.model, bench.loaded.context
    prompt = model.tokenize("hello", bos=True, special=True)
    batch = llama.BatchBuffer(64)
    batch.size = n = len(prompt)
    batch.tokens[:n], batch.positions[:n], batch.sequences[:n], batch.wanted[:n] = prompt, range(n), 0, 0
    batch.wanted[n - 1] = 1
    assert context.decode(batch) == llama.OK
    row = context.logits(1)[0].astype(np.float64)
    expected = row - row.max() - math.log(np.exp(row - row.max()).sum())
    context.clear()
    # Whatever changes the row or the draw changes nothing about them.
    options = {**OPEN, "temperature": 2.0, "frequency_penalty": 1.0, "logit_bias": {int(row.argmax()): -50.0}}
    end = result(bench, "hello", max_tokens=3, logprobs=True, top_logprobs=5, **options)
    assert end.logprobs is not None
    assert [one.token for one in end.logprobs if one] == end.tokens
    first = end.logprobs[0]
    assert first is not None
    assert first.logprob == pytest.approx(expected[end.tokens[0]], abs=1e-4)
    assert [other.token for other in first.top] == np.argsort(-row)[:5].tolist()
    assert [other.logprob for other in first.top] == pytest.approx(np.sort(expected)[::-1][:5], abs=1e-4)
    assert first.piece == model.pieces[first.token]


def test_log_probabilities_come_with_the_pieces_of_a_stream_and_change_no_token(bench: Bench) -> None:
    expected = bench.alone("hello", **OPEN)
    bench.forget()
    key = bench.submit("hello", stream=True, logprobs=True, **OPEN)
    bench.run()
    assert [one.token for one in all_logprobs(bench, key) if one] == expected == bench.whole(key)[0]
    assert len([message for message in bench.sent if isinstance(message, Step)]) > 5


def test_of_tokens_given_after_a_death_no_probability_is_known(bench: Bench) -> None:
    tokens = bench.alone("hello")
    bench.forget()
    key = bench.submit("hello", given=tokens[:10], logprobs=True)
    bench.run(3)
    bench.submit("hello", key=key[1], logprobs=True)  # a new kernel that has no token
    bench.sent.clear()
    bench.run()
    found = all_logprobs(bench, key)
    assert found[:10] == [None] * 10
    assert [one.token for one in found[10:] if one] == tokens[10:]


def test_no_call_has_the_cost_of_an_option_that_it_does_not_use(bench: Bench) -> None:
    assert result(bench, "hello").logprobs is None


# ── which tokens ──────────────────────────────────────────────────────────────────────────────────────────


def test_bias_forces_and_forbids_tokens(bench: Bench) -> None:
    assert result(bench, "hello", max_tokens=5, logit_bias={77: 100.0}).tokens == [77] * 5
    likeliest = bench.alone("hello", max_tokens=1)[0]
    assert result(bench, "hello", max_tokens=20, logit_bias={likeliest: -100.0}).tokens.count(likeliest) == 0


def test_a_penalty_counts_what_has_been_generated(bench: Bench) -> None:
    assert result(bench, "hello", logit_bias={50: 20.0}).tokens == [50] * 24
    assert 0 < result(bench, "hello", logit_bias={50: 20.0}, frequency_penalty=2.0).tokens.count(50) < 20


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(bench: Bench) -> None:
    tokens = bench.alone("hello")
    stop = tokens[6]
    end = result(bench, "hello", stop_tokens=[stop])
    assert end.tokens == tokens[: tokens.index(stop)]
    assert end.finish_reason == "stop"


@pytest.mark.parametrize("least", [0, 4, 24])
def test_nothing_ends_a_text_before_its_least_number_of_tokens(bench: Bench, least: int) -> None:
    eos = bench.loaded.model.eos
    options = {"ignore_eos": False, "stop_tokens": [60], "logit_bias": {eos: 100.0, 60: 99.0}, "min_tokens": least}
    end = result(bench, "hello", **options)
    assert (len(end.tokens), end.finish_reason) == (least, "stop" if least < 24 else "length")
    assert not {eos, 60} & set(end.tokens)


@pytest.mark.parametrize("wrong", [{"logit_bias": {1 << 30: 1.0}}, {"stop_tokens": [1 << 30]}])
def test_tokens_outside_of_the_vocabulary_are_refused(bench: Bench, wrong: dict[str, Any]) -> None:
    failed = bench.failure(bench.submit("hello", **wrong))
    assert failed.errno == errno.EINVAL
    assert next(iter(wrong)) in failed.message


def test_usage_has_the_rest_of_the_context(bench: Bench) -> None:
    end = result(bench, "hello", max_tokens=20)
    used = end.usage.prompt_tokens + end.usage.completion_tokens
    assert end.usage.context_left == pytest.approx(1 - used / bench.loaded.ctx)


# ── grammars ──────────────────────────────────────────────────────────────────────────────────────────────

DATE = r"""
root  ::= date (" and " date)?   # one or two
date  ::= [0-9]{4} "-" month "-" [0-3] [0-9]
month ::= "0" [1-9] | "1" [0-2]
"""


def test_a_text_fits_its_grammar(bench: Bench) -> None:
    date = r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"
    for seed in range(4):
        end = result(bench, "hello", grammar=DATE, ignore_eos=False, max_tokens=100, **{**OPEN, "seed": seed})
        text = bench.whole(end.key)[1]
        assert re.fullmatch(rf"{date}( and {date})?", text), text
        assert end.finish_reason == "stop"


def test_a_grammar_goes_on_from_given_tokens(bench: Bench) -> None:
    tokens = bench.alone("hello", grammar=DATE, ignore_eos=False)
    bench.forget()
    key = bench.submit("hello", grammar=DATE, ignore_eos=False, given=tokens[:4])
    bench.run()
    assert bench.whole(key, given=4)[0] == tokens[4:]
    wrong = bench.submit("hello", grammar=DATE, given=[tokens[-1], *tokens])
    assert bench.failure(wrong).errno == errno.EINVAL or tokens[-1] == tokens[0]


REFUSED = {
    "": "root",
    "x ::= [a]": "root",
    "root ::= missing": "no rule named missing",
    'root ::= "a': "line 1",
    "root ::= [a": "line 1",
    'root = "a"': "::=",
    'root ::= "a" )': "line 1",
    'root ::= ("a"': ") is missing",
    'root ::= "\\q"': "line 1",
    'root ::= "a"{5,2}': "{5,2}",
    'root ::= "a"{99999999999999999999}': "1000",
    "root ::= *": "nothing to repeat",
    'root ::= ("a"*)*': "empty",
    'root ::= w*\nw ::= v | "a"\nv ::= "b"?': "empty",
    'root ::= (("a"{1,24}){1,24}){1,24}': "13824",
    'root ::= b{1,24}\nb ::= c{1,24}\nc ::= "a"{1,24}': "13824",
    "root ::= " + "(" * 40 + '"a"' + ")" * 40: "deep",
    "root ::= a\n" + "\n".join(f"a{i} ::= [a]" for i in range(2000)): "rules",
    'root ::= root "a" | "a"': "llama.cpp",
    "root ::= <[12]>": "line 1",
}


@pytest.mark.parametrize("grammar", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_grammar_is_refused_with_its_place(bench: Bench, grammar: str) -> None:
    failed = bench.failure(bench.submit("hello", grammar=grammar))
    assert failed.errno == errno.EINVAL
    assert failed.message.startswith("grammar: ")
    assert REFUSED[grammar] in failed.message


TAKEN = [
    'root ::= "a" | "b"',
    "root ::= [^\\]a-z\\x41]+ . (\"x\" | root2)?\nroot2 ::= 'a'".replace("'a'", '"\\"\\u00e4\\n"'),
    'root ::= object\nvalue ::= object | "1"\nobject ::= "{" (pair ("," pair){0,5})? "}"\npair ::= "k:" value',
    'root ::= (\n  "a"   # first\n  | "b"\n)+ "c"{3} "d"{0,900}\n',
    'root ::= ws "x"\nws ::= [ \\t]*',
    'root ::=\n  "a" |\n  ""',
]


@pytest.mark.parametrize("grammar", TAKEN, ids=range(len(TAKEN)))
def test_usual_grammars_are_taken_by_us_and_by_llama_cpp(bench: Bench, grammar: str) -> None:
    end = result(bench, "hello", grammar=grammar, ignore_eos=False, max_tokens=30)
    assert end.finish_reason in ("stop", "length")


def test_the_largest_grammar_is_read_in_no_time() -> None:
    chain = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(1000)) + 'r1000 ::= "a"\n'
    wide = "root ::= " + " | ".join(f'"a{i}"' for i in range(6000))

    def read() -> None:
        for grammar in (chain, chain.replace("\n", "?\n"), wide[: 1 << 16]):
            with suppress(OSError):
                check(grammar)

    cheap(2, read)


@pytest.mark.parametrize("other", [{"schema": True}, {"tools": [{"name": "f"}], "messages": [], "prompt": None}])
def test_a_grammar_stands_alone(bench: Bench, other: dict[str, Any]) -> None:
    request = {"prompt": "x", **other}
    if request.get("messages") is not None:
        request["messages"] = [{"role": "user", "content": "x"}]
    failed = bench.failure(bench.submit(**request, grammar='root ::= "a"'))
    assert (failed.errno, failed.message[:8]) == (errno.EINVAL, "grammar:")
