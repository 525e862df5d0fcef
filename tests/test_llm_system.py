"""`aios.llm` as an agent uses it: the contract of the SDK, through the whole system, on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tinymodels
from tests.conftest import System, eventually

HEADER = "import errno, json, sys, time\nimport libaios as aios\nllm = aios.llm\n"


@pytest.fixture
def ask(aiosd: System, tmp_path: Path) -> Callable[[str], str]:
    """Run code as an agent; returns its output."""

    def run(code: str) -> str:
        path = tmp_path / "agent.py"
        path.write_text(HEADER + textwrap.dedent(code))
        done = aiosd.run("aios-run", path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    return run


Ask = Callable[[str], str]


def test_a_chat_has_text_tokens_reason_and_usage(ask: Ask) -> None:
    ask("""
        r = llm.chat([{"role": "user", "content": "hi"}], max_tokens=64, temperature=0.0, seed=1)
        assert r.text and r.finish_reason == "stop" and r.tool_calls == [], r
        assert llm.detokenize(r.tokens) == r.text
        u = r.usage
        assert u.completion_tokens in (len(r.tokens), len(r.tokens) + 1) and 0 < u.prompt_tokens, (u, r)
        assert 0 <= u.cached_tokens <= u.prompt_tokens
        assert u.queue_s >= 0 and u.prefill_s > 0 and u.decode_s >= 0 and u.preemptions == 0
    """)


def test_the_same_seed_gives_the_same_text_and_another_another(ask: Ask) -> None:
    ask("""
        def text(seed):
            open = dict(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)  # the model is sure of itself
            return llm.complete("Once upon", max_tokens=30, seed=seed, ignore_eos=True, **open).tokens
        text(1)  # from now on the prompt is cached, which may change a last bit
        assert text(1) == text(1)
        assert len({tuple(text(seed)) for seed in range(5)}) > 1
    """)


def test_pieces_of_a_stream_are_the_text(ask: Ask) -> None:
    ask("""
        options = dict(max_tokens=80, temperature=0.0, ignore_eos=True)
        whole = llm.complete("Hello", **options)
        pieces = list(llm.complete("Hello", stream=True, **options))
        assert len(pieces) > 5  # tokens that are guessed come several at a time
        assert sum((p.tokens for p in pieces), []) == whole.tokens
        assert "".join(p.text for p in pieces) == whole.text
        assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == "length" and pieces[-1].usage.completion_tokens == 80
    """)


def test_max_tokens_and_stop_strings(ask: Ask) -> None:
    ask("""
        r = llm.complete("Hello", max_tokens=0)
        assert (r.text, r.tokens, r.finish_reason) == ("", [], "length")
        r = llm.complete("Hello", max_tokens=7, temperature=0, ignore_eos=True)
        assert len(r.tokens) == 7 and r.finish_reason == "length"
        full = llm.complete("Hello", max_tokens=60, temperature=0, ignore_eos=True).text
        stop = full[10:13]
        r = llm.complete("Hello", max_tokens=60, temperature=0, ignore_eos=True, stop=[stop])
        assert r.finish_reason == "stop" and r.text == full[:full.index(stop)], (r, full)
        streamed = "".join(p.text for p in
            llm.complete("Hello", max_tokens=60, temperature=0, ignore_eos=True, stop=stop, stream=True))
        assert streamed == r.text
    """)


def test_several_results_of_one_prompt(ask: Ask) -> None:
    ask("""
        open = dict(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=20, ignore_eos=True)
        prompt = [40 + i % 100 for i in range(200)]
        r = llm.complete(prompt, n=4, seed=5, **open)
        assert len(r.choices) == 4 and r.choices[0] is r and len({tuple(c.tokens) for c in r.choices}) == 4
        # (Later tokens may differ by a last bit of the logits, as the batch does.)
        assert llm.complete(prompt, seed=7, **open).choices[0].tokens[:5] == r.choices[2].tokens[:5]
        computed = [c.usage.prompt_tokens - c.usage.cached_tokens for c in r.choices]
        assert sum(computed) < 1.2 * len(prompt), computed
        for wrong in (dict(n=0), dict(n=129), dict(n="2"), dict(n=2, stream=True)):
            try:
                llm.complete("x", **wrong)
            except OSError as err:
                assert err.errno == errno.EINVAL and "n:" in err.strerror
            else:
                raise AssertionError(wrong)
    """)


def test_log_probabilities_reach_the_agent_in_results_and_pieces(ask: Ask) -> None:
    ask("""
        options = dict(max_tokens=150, temperature=0.0, ignore_eos=True, top_logprobs=2)
        r = llm.complete("Hello", **options)
        assert [one.token for one in r.logprobs] == r.tokens and len(r.tokens) == 150
        assert all(one.top[0].token == one.token and one.logprob <= 0 and len(one.top) == 2 for one in r.logprobs)
        assert b"".join(one.piece for one in r.logprobs).decode() == r.text
        pieces = list(llm.complete("Hello", stream=True, **options))
        assert [one.token for p in pieces for one in p.logprobs] == r.tokens
        assert all(len(p.logprobs) == len(p.tokens) for p in pieces) and len(pieces) > 10
        assert llm.complete("Hello", max_tokens=2).logprobs is None
    """)


def test_options_of_sampling_reach_the_model(ask: Ask) -> None:
    ask("""
        r = llm.complete("Hello", max_tokens=6, logit_bias={70: 100}, temperature=0)
        assert r.tokens == [70] * 6 and 0.5 < r.usage.context_left < 1
        assert llm.complete("Hello", max_tokens=6, logit_bias={70: 100}, temperature=0, stop_tokens=[70]).tokens == []
        r = llm.complete("Hello", max_tokens=50, grammar='root ::= ("yes" | "no")', seed=1)
        assert r.text in ("yes", "no") and r.finish_reason == "stop"
        for wrong in (dict(grammar="root"), dict(top_logprobs=21), dict(mirostat=3), dict(logit_bias={1: 101})):
            try:
                llm.complete("x", **wrong)
            except OSError as err:
                assert err.errno == errno.EINVAL and next(iter(wrong)).split("_")[0] in err.strerror, err
            else:
                raise AssertionError(wrong)
    """)


def test_token_ids_are_taken_verbatim(ask: Ask) -> None:
    ask("""
        ids = llm.tokenize("The quick brown fox")
        assert llm.detokenize(ids) == "The quick brown fox"
        a = llm.complete(ids, max_tokens=10, temperature=0, ignore_eos=True)
        b = llm.complete("The quick brown fox", max_tokens=10, temperature=0, ignore_eos=True)
        assert a.tokens == b.tokens and a.usage.prompt_tokens == len(ids)
        assert len(llm.tokenize("<|im_end|>", special=True)) == 1 < len(llm.tokenize("<|im_end|>"))
    """)


def test_a_schema_constrains_what_is_generated(ask: Ask) -> None:
    ask("""
        schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5},
                  "age": {"type": "integer"}, "kind": {"enum": ["a", "b"]}}, "required": ["name", "age", "kind"],
                  "additionalProperties": False}
        done = 0
        for seed in range(8):
            r = llm.chat([{"role": "user", "content": "hi"}], schema=schema, max_tokens=300, temperature=1.0, seed=seed)
            if r.finish_reason == "stop":
                value = json.loads(r.text)
                assert set(value) == {"name", "age", "kind"} and len(value["name"]) <= 5
                assert isinstance(value["age"], int) and value["kind"] in ("a", "b")
                done += 1
        assert done
    """)


def test_a_tool_call_is_valid_against_its_schema(ask: Ask) -> None:
    ask("""
        tools = [{"type": "function", "function": {"name": "calc", "description": "Calculate",
                  "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                                 "required": ["expression"], "additionalProperties": False}}}]
        r = llm.chat([{"role": "user", "content": "What is 12 * 7?"}], tools=tools, temperature=0.0, max_tokens=100)
        assert r.finish_reason == "tool_calls", r
        (call,) = r.tool_calls
        assert call.name == "calc" and set(call.arguments) == {"expression"} and call.id
        assert "<tool_call>" not in r.text
    """)


REFUSED = {
    "an empty prompt": ("llm.complete('')", "EINVAL", "empty"),
    "no messages": ("llm.chat([])", "EINVAL", "messages"),
    "a prompt longer than the context": ("llm.complete('word ' * 5000, max_tokens=1)", "EMSGSIZE", "2048"),
    "an unknown model": ("llm.complete('x', model='gpt-9')", "EINVAL", "no model named 'gpt-9'"),
    "a token that is none": ("llm.complete([10**6], max_tokens=1)", "EINVAL", "1000000"),
    "a negative token": ("llm.complete([-1], max_tokens=1)", "EINVAL", "prompt"),
    "a schema that no grammar can express": (
        "llm.complete('x', schema={'$ref': 'http://elsewhere/schema'})",
        "EINVAL",
        "schema",
    ),
    "a tool without a name": ("llm.chat([{'role': 'user', 'content': 'x'}], tools=[{}])", "EINVAL", "tools"),
    "a message without a role": ("llm.chat([{'content': 'x'}])", "EINVAL", "role"),
    "a temperature below zero": ("llm.complete('x', temperature=-1.0)", "EINVAL", "temperature"),
    "a top_p above one": ("llm.complete('x', top_p=1.5)", "EINVAL", "top_p"),
    "negative max_tokens": ("llm.complete('x', max_tokens=-1)", "EINVAL", "max_tokens"),
    "an empty stop string": ("llm.complete('x', stop=[''])", "EINVAL", "stop"),
    "no vocabulary word of that number": ("llm.detokenize([10**6])", "EINVAL", "tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_which_argument(ask: Ask, case: str) -> None:
    call, name, words = REFUSED[case]
    out = ask(f"""
        try:
            {call}
        except OSError as err:
            print(errno.errorcode[err.errno], err.strerror)
    """)
    assert out.startswith(name + " "), out
    assert words in out


def test_a_timeout_ends_the_call(ask: Ask) -> None:
    ask("""
        try: llm.complete("x", max_tokens=2000, ignore_eos=True, timeout=0.02)
        except TimeoutError as err: pass
        else: raise AssertionError
        assert llm.complete("x", max_tokens=1).finish_reason == "length"
    """)


def test_leaving_a_stream_frees_its_slot(aiosd: System, ask: Ask) -> None:
    ask("""
        for piece in llm.complete("x", max_tokens=2000, ignore_eos=True, stream=True):
            break
        del piece
        stream = llm.complete("x", max_tokens=2000, ignore_eos=True, stream=True)
        next(stream)
        stream.close()
        end = time.monotonic() + 30
        mine = lambda: next(p for p in aios.proc.ps() if p.pid == aios.proc.getpid())
        while mine().ctx_tokens and time.monotonic() < end: pass
        assert mine().ctx_tokens == 0
    """)
    assert eventually(lambda: aiosd.status()["models"][0]["stats"]["slots"]["used"] == 0)


def test_many_calls_of_one_agent_run_at_once(ask: Ask) -> None:
    ask("""
        import asyncio
        import libaios.aio as aio
        async def main():
            one = await aio.llm.complete("Tell", max_tokens=40, temperature=0, ignore_eos=True)
            many = [aio.llm.complete("Tell", max_tokens=40, temperature=0, ignore_eos=True) for _ in range(20)]
            results = await asyncio.gather(*many)
            assert all(len(r.tokens) == 40 for r in results)
            pieces = [p async for p in aio.llm.complete("Tell", max_tokens=10, stream=True, ignore_eos=True)]
            assert pieces[-1].finish_reason == "length"
        asyncio.run(main())
    """)


def test_more_calls_than_slots_are_all_served(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd("--slots", "2", "--threads", "1")
    path = tmp_path / "agent.py"
    path.write_text(
        HEADER + "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(12) as pool:\n"
        "    work = lambda n: len(llm.complete(f'Number {n}', max_tokens=20, ignore_eos=True).tokens)\n"
        "    assert list(pool.map(work, range(12))) == [20] * 12\n"
    )
    done = system.run("aios-run", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert system.status()["models"][0]["info"]["n_slots"] == 2


def test_characters_of_several_tokens_are_never_torn(ask: Ask) -> None:
    ask("""
        schema = {"type": "string", "enum": ["äöü→😀" * 3]}
        text = ""
        for piece in llm.complete("x", schema=schema, stream=True, max_tokens=200, temperature=0.0):
            assert "\\ufffd" not in piece.text
            text += piece.text
        assert json.loads(text) == "äöü→😀" * 3, text
    """)


def test_embeddings_are_unit_vectors(ask: Ask) -> None:
    ask("""
        import numpy as np
        v = llm.embed(["one", "two", "one"])
        assert v.dtype == np.float32 and v.shape == (3, llm.models()[0].n_embd)
        assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-4)
        assert np.allclose(v[0], v[2]) and not np.allclose(v[0], v[1])
        assert llm.embed("one").shape == (1, v.shape[1])
    """)


def test_models_are_listed(aiosd: System, ask: Ask) -> None:
    (model,) = json.loads(
        ask("print(json.dumps([[m.name, m.default, m.n_ctx, m.chat, m.tools] for m in llm.models()]))")
    )
    assert model == ["nano", True, 2048, True, True]


def test_guesses_change_neither_a_text_nor_its_bill(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """With a text that repeats itself, as nano's does: whole, in pieces, and cut off by a budget within guesses."""
    whole, short = tmp_path / "whole.py", tmp_path / "short.py"
    ask = 'llm.complete("Once upon a time there was", max_tokens=100, temperature=0.0, ignore_eos=True'
    whole.write_text(
        HEADER
        + f"r, pieces = {ask}), list({ask}, stream=True))\n"
        + "assert ''.join(piece.text for piece in pieces) == r.text, pieces\n"
        + "print(json.dumps([r.tokens, r.text, r.usage.completion_tokens]))\n"
    )
    short.write_text(HEADER + f"{ask})\n")
    found = []
    for how in ("off", "15"):
        system = fresh_aiosd("--threads", "1", "--lookahead", how)
        done = system.run("aios-run", whole, check=True)
        used = []
        for tokens in (40, 47):
            assert system.run("aios-run", "--tokens", str(tokens), short).returncode == 124
            agent = max(system.ps("--dead"), key=lambda one: one["pid"])
            used.append((agent["prompt_tokens"], agent["completion_tokens"]))
        found.append((json.loads(done.stdout), used))
        guessed = system.status()["models"][0]["stats"]["lookahead"]["guessed"]
        assert (guessed > 50) == (how != "off")
    assert found[0] == found[1]


def test_two_models_side_by_side(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    tiny = tinymodels.write(tmp_path / "tiny.gguf")
    system = fresh_aiosd("--model", "nano", "--model", f"second={tiny}", "--threads", "1", "--slots", "2")
    path = tmp_path / "agent.py"
    path.write_text(
        HEADER + "assert [(m.name, m.default) for m in llm.models()] == [('nano', True), ('second', False)]\n"
        "for name in (None, 'nano', 'second'):\n"
        "    assert len(llm.complete('hello', max_tokens=5, ignore_eos=True, model=name).tokens) == 5\n"
    )
    assert system.run("aios-run", path, check=True)
    assert {"llm:nano", "llm:second"} <= {entry["name"] for entry in system.ps()}


def test_a_script_outside_any_agent_may_use_the_sdk(aiosd: System) -> None:
    code = "import libaios as aios; print(aios.proc.getpid(), aios.llm.complete('x', max_tokens=3).usage)"
    done = aiosd.run("python", "-c", code, check=True)
    assert done.stdout.startswith("0 Usage(")


def test_without_a_system_the_sdk_reports_that(tmp_path: Path) -> None:
    code = "import libaios as aios\ntry: aios.proc.getpid()\nexcept ConnectionError as err: print(err)"
    env = {**os.environ, "AIOS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", check=True)
    assert "no aiosd is running" in done.stdout
