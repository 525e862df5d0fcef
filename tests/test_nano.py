"""The embedded model: its tasks, its template, its tokenizer, and the GGUF that is shipped."""

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from aiosd.nano import model_path, phrases
from aiosd.nano.tasks import (
    FAMILIES,
    FRESH,
    HELD,
    HELD_RANGES,
    TRAIN,
    PhraseSource,
    Task,
    check,
    conversation,
    kept_back,
    make,
)
from aiosd.nano.template import CHAT_TEMPLATE, render
from aiosd.nano.tokenizer import CONTROL, SPECIAL, USER_DEFINED, learn, load
from libaios.agents.react import TOOLS

MANY = 600


def solved(task: Task) -> tuple[str, dict[str, str], list[str]]:
    world = task.world()
    dialogue, _ = task.solve(world)
    return dialogue[-1]["content"], world.files, world.notes


# --- tasks


def test_the_same_seed_gives_the_same_task() -> None:
    for seed in range(100):
        one, two = make(seed, HELD), make(seed, HELD)
        assert (one.prompt, one.files, one.notes) == (two.prompt, two.files, two.notes)
        assert conversation(seed) == conversation(seed)
    assert make(1).prompt != make(2).prompt
    assert make(1, TRAIN).prompt != make(1, HELD).prompt


def test_a_task_does_not_change_when_it_is_solved() -> None:
    for seed in range(200):
        task = make(seed)
        before = (dict(task.files), list(task.notes))
        assert solved(task) == solved(task)
        assert (task.files, task.notes) == before


@pytest.mark.parametrize("split", [TRAIN, HELD, FRESH])
def test_reference_solutions_pass_the_checker(split: str) -> None:
    for seed in range(MANY):
        task = make(seed, split)
        assert check(task, *solved(task)) is None, task.prompt


def test_all_families_come_up_with_chains_of_three_calls() -> None:
    tasks = [make(seed, HELD) for seed in range(MANY)]
    assert {t.family for t in tasks} == set(FAMILIES)
    assert {t.calls() for t in tasks} >= {0, 1, 2, 3, 4}


def test_splits_share_no_listed_word() -> None:
    lists = {name: value for name, value in vars(phrases).items() if isinstance(value, list) and name.isupper()}
    pairs = [name for name in lists if name.endswith("_HELD")]
    assert len(pairs) > 8
    for name in pairs:
        train = {str(item) for item in lists[name.removesuffix("_HELD")]}
        held = {str(item) for item in lists[name]}
        assert held
        assert not train & held, name


def test_phrases_that_are_kept_back_are_never_used_but_in_fresh_tasks() -> None:
    lists = [phrases.READ, phrases.WRITE, phrases.CALC, phrases.PROBLEMS, phrases.ON_VALUE, phrases.POLITE]
    for phrase_list in lists:
        taught, kept = kept_back(phrase_list)
        assert len(kept) >= 4
        assert not set(taught) & set(kept)
        assert set(taught) | set(kept) == set(phrase_list)
        for split, among in ((TRAIN, taught), (HELD, taught), (FRESH, kept)):
            source = PhraseSource(random.Random(1), split)
            assert {source.choose(phrase_list) for _ in range(300)} <= set(among)
    for phrase_list in (phrases.PROBLEMS, phrases.WORDED):  # each meaning is taught by a phrase of the training
        taught, kept = kept_back(phrase_list)
        assert {formula for _, formula in kept} <= {formula for _, formula in taught}


def test_splits_share_no_number() -> None:
    def numbers(split: str) -> set[int]:
        texts = []
        for seed in range(MANY * 3 // 2):
            task = make(seed, split)
            if task.family in ("fetch, calc", "fetch two, calc"):
                texts += [*task.files.values(), *(n for n in task.notes if re.search(r" is \d+( \w+)?$", n))]
        return {int(n) for text in texts for n in re.findall(r"(?<![\w.])\d{2,}(?![\w.])", text)}

    inside = {n for low, high in HELD_RANGES for n in range(low, high + 1)}
    train, held = numbers(TRAIN), numbers(HELD)
    assert len(train) > 50
    assert len(held) > 50
    assert not train & inside
    assert held <= inside | {n for n in held if n >= 1000 and n % 1000 == 0} | inside


def test_no_held_out_prompt_is_trained_on() -> None:
    held = {make(seed, split).prompt for seed in range(MANY) for split in (HELD, FRESH)}
    trained = {m["content"] for seed in range(MANY) for m in conversation(seed)[0] if m["role"] == "user"}
    assert not held & trained


# --- the checker


def test_checker_rejects_wrong_work() -> None:
    rejected = 0
    for seed in range(MANY):
        task = make(seed, HELD)
        answer, files, notes = solved(task)
        _, musts = task.solve(task.world())
        if musts:
            assert check(task, "I do not know.", files, notes) is not None
            rejected += 1
        assert check(task, answer, {**files, "extra.txt": "x"}, notes) is not None
        assert check(task, answer, files, [*notes, "an extra note"]) is not None
        if files != task.files:
            assert check(task, answer, task.files, notes) is not None
            rejected += 1
        if notes != task.notes:
            assert check(task, answer, files, task.notes) is not None
            rejected += 1
    assert rejected > MANY // 2


def test_checker_requires_the_whole_number() -> None:
    task = Task("calc", "What is 6 * 7?", lambda do: (do("calc", expression="6 * 7"), ["42"]))
    for answer in ("The answer is 42.", "42", "It's 42, I think.", "(42)"):
        assert check(task, answer, {}, []) is None, answer
    for answer in ("142", "421", "42.5", "4.42", "4 2", ""):
        assert check(task, answer, {}, []) is not None, answer


# --- the chat template

CALL = {"name": "write_file", "arguments": {"path": "a.txt", "content": 'say "hi"\n\\ <b> it\'s é'}}
DIALOGUE: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "I will write.", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "1", "content": "ok"},
    {"role": "assistant", "content": "Done."},
]


def test_template_lists_tools_and_calls() -> None:
    text = render(DIALOGUE[:3], TOOLS, generate=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful agent.\nTools:\ncalc(expression)\n")
    assert "write_file(path, content)<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n" in text
    assert "<|im_start|>tool\n<tool_response>\nok\n</tool_response><|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n")
    said = re.search(r"I will write\.\n<tool_call>\n(.*)\n</tool_call><\|im_end\|>", text)
    assert said is not None
    assert json.loads(said[1]) == CALL
    assert said[1] == json.dumps(CALL, ensure_ascii=False)


def test_template_takes_arguments_as_json_text() -> None:
    call = {"name": CALL["name"], "arguments": json.dumps(CALL["arguments"], ensure_ascii=False)}
    other = [DIALOGUE[0], {**DIALOGUE[1], "tool_calls": [{"type": "function", "id": "1", "function": call}]}]
    assert render(other, TOOLS) == render(DIALOGUE[:2], TOOLS)


def test_template_without_tools_system_or_content() -> None:
    assert render([{"role": "user", "content": "hi"}], None, generate=True) == (
        "<|im_start|>system\nYou are a helpful agent.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|im_start|>system\nBe brief.<|im_end|>" in render([{"role": "system", "content": "Be brief."}], [])
    silent = [{"role": "assistant", "content": None, "tool_calls": DIALOGUE[1]["tool_calls"]}]
    assert "<|im_start|>assistant\n<tool_call>\n" in render(silent, None)


# --- the tokenizer

HOSTILE = [
    "", " ", "\n\n\n", "  two  spaces ", "don't 's 'm 'll", "1234567890", "3.14 * (2 + 2)", "größe café naïve",
    "日本語", "中文 字", "😀👍🏽", "\u200b\u00a0\ufeff", "a\r\nb\tc", '": ", "}}{"name": "',
    "<tool_call>x</tool_call>", "<|im_end|>", "<|im_end", "x" * 500, "Tokyo/Paris_a-b", "\x00\x01", "ẞß ſ K",
]  # fmt: skip


def test_tokenizer_is_lossless_and_keeps_words_whole() -> None:
    tokenizer = load()
    for text in [*HOSTILE, *(make(seed).prompt for seed in range(100))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    inside = [tokenizer.tokens[i] for i in tokenizer.encode("milkshake")]
    for around in ('"milkshake"', "/milkshake.", "(milkshake)", "_milkshake2"):
        pieces = [tokenizer.tokens[i] for i in tokenizer.encode(around)]
        assert any(pieces[i : i + len(inside)] == inside for i in range(len(pieces)))
    assert [tokenizer.tokens[i] for i in tokenizer.encode(" milkshake")] == [b" " + inside[0], *inside[1:]]
    assert len(tokenizer.encode("12345")) == 5


def test_merges_are_learned_from_frequent_words() -> None:
    assert learn(["the then the " * 9, "rare"], 3) == [(b"h", b"e"), (b"t", b"he"), (b"the", b"n")]
    assert learn(["the"] * 9, 100) == [(b"h", b"e"), (b"t", b"he")]


# --- the shipped file


@pytest.fixture(scope="module")
def bare() -> Any:
    """The benchmark's bare llama.cpp with the shipped model."""
    pytest.importorskip("llama_cpp")
    source = Path(__file__).parents[1] / "benchmarks" / "nano.py"
    spec = importlib.util.spec_from_file_location("benchmark_nano", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Bare(model_path())


def test_shipped_model_is_small_and_carries_its_template(bare: Any) -> None:
    assert model_path().stat().st_size < 16_000_000
    assert bare.ll.llama_model_chat_template(bare.model, None).decode() == CHAT_TEMPLATE
    assert bare.ll.llama_model_n_ctx_train(bare.model) >= 2048
    assert not bare.ll.llama_vocab_get_add_bos(bare.vocab)
    for i, special in enumerate(SPECIAL):
        attr = bare.ll.llama_vocab_get_attr(bare.vocab, i)
        wanted = bare.ll.LLAMA_TOKEN_ATTR_CONTROL if special in CONTROL else bare.ll.LLAMA_TOKEN_ATTR_USER_DEFINED
        assert attr & wanted, special
    assert bare.ll.llama_vocab_eos(bare.vocab) == SPECIAL.index("<|im_end|>")
    assert all(bare.piece(SPECIAL.index(s)).decode() == s for s in USER_DEFINED)


def test_llama_cpp_tokenises_as_training_does(bare: Any) -> None:
    tokenizer = load()
    assert bare.ll.llama_vocab_n_tokens(bare.vocab) == len(tokenizer.tokens)
    texts = [render(*conversation(seed, split)) for seed in range(150) for split in (TRAIN, HELD)]
    for text in [*HOSTILE, *texts]:
        assert bare.tokenize(text) == tokenizer.encode(text), text


def test_shipped_model_solves_held_out_tasks(bare: Any, tmp_path: Path) -> None:
    """A lower bound for the shipped model. benchmarks/nano.py measures, and the model card has the figures."""
    judge, held_out = sys.modules["benchmark_nano"].judge, sys.modules["benchmark_nano"].held_out
    problems = [judge(task, bare.solve) for task in held_out(7, 60)]
    assert sum(p is None for p in problems) >= 50, [p for p in problems if p]
