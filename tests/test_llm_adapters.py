"""LoRA adapters: chosen by each call, never mixed in a batch, and never with another one's cached state."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiosd.errors import AiosdError
from aiosd.llm import adapters, llama, loading
from aiosd.llm.adapters import STEPS, AdapterTurns
from aiosd.llm.lookahead import ROWS, Guesser
from aiosd.llm.saved import Saved
from aiosd.llm.spec import Lora, ModelSpec
from tests import tinymodels
from tests.conftest import System
from tests.test_llm_engine import Bench, play
from tests.test_llm_guesses import FREE

PROMPT = "the same beginning of a prompt, for every adapter there is: "


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    llama.start()
    folder = tmp_path_factory.mktemp("lora")
    model = tinymodels.write(folder / "m.gguf", d=64, heads=2)
    loras = {name: tinymodels.write_lora(folder / f"{name}.gguf", model, seed=i) for i, name in enumerate("ab")}
    return {"model": model, **loras}


def load(files: dict[str, Path], *loras: Lora, **options: Any) -> loading.LoadedModel:
    spec = ModelSpec("m", str(files["model"]), lora=loras, **{"threads": 1, "slots": 4, "ctx": 512, **options})
    return loading.load(spec, lambda what, fraction: None)


@pytest.fixture
def bench(files: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Bench]:
    loras = [Lora(name, str(files[name])) for name in "ab"]
    loaded = load(files, *loras, exact=getattr(request, "param", False))
    bench = Bench(loaded, ram=16 << 20)
    yield bench
    bench.engine.cache.close()
    loaded.close()


def ask(bench: Bench, lora: str | None, peer: int = 1, prompt: str = PROMPT, tokens: int = 24) -> Any:
    return bench.submit(prompt, peer=peer, lora=lora, max_tokens=tokens)


@pytest.mark.parametrize("bench", [False, True], indirect=True, ids=["", "exact"])
def test_beside_others_each_call_gives_what_its_adapter_gives_alone(bench: Bench) -> None:
    alone = {}
    for lora in (None, "a", "b"):
        key = ask(bench, lora)
        bench.run()
        alone[lora] = bench.whole(key)[0]
    assert len({tuple(tokens) for tokens in alone.values()}) == 3, "an adapter without effect"
    keys = {ask(bench, lora, peer, prompt=PROMPT): lora for peer, lora in enumerate([None, "a", "b", "a"], 2)}
    bench.run()
    assert {key: bench.whole(key)[0] for key in keys} == {key: alone[lora] for key, lora in keys.items()}


def test_no_batch_holds_two_adapters(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    by_slot: set[tuple[str, str]] = set()
    decode = bench.loaded.context.decode

    def watched(batch: llama.BatchBuffer) -> int:
        owners = [bench.engine.slots.owner(int(slot)) for slot in set(batch.sequences[: batch.size])]
        by_slot.update((bench.loaded.context._adapter, owner.lora) for owner in owners if owner is not None)
        return decode(batch)

    monkeypatch.setattr(bench.loaded.context, "decode", watched)
    for peer, lora in enumerate([None, "a", "b", "a"], 1):
        ask(bench, lora, peer, tokens=3 * STEPS)
    bench.run()
    assert by_slot == {("", ""), ("a", "a"), ("b", "b")}


def test_state_of_one_adapter_serves_only_that_one(bench: Bench) -> None:
    cached = []
    for lora in (None, "a", "b", "a", None):
        key = ask(bench, lora, tokens=2)
        bench.run()
        cached.append(bench.end(key).usage.cached_tokens)
    assert cached[:3] == [0, 0, 0]
    assert min(cached[3:]) > 20


def test_a_prompt_that_is_being_computed_serves_its_adapter_alone(bench: Bench) -> None:
    long = PROMPT * 5
    keys = [ask(bench, lora, peer, long, tokens=1) for peer, lora in enumerate([None, "a", None, "a"], 1)]
    bench.run()
    cached = [bench.end(key).usage.cached_tokens for key in keys]
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) > 200


def test_an_adapter_that_is_not_there(bench: Bench) -> None:
    failed = bench.failure(ask(bench, "c"))
    assert failed.errno == errno.EINVAL
    assert failed.message == "lora: this model has no adapter 'c'; there are: a, b"


def test_a_scale_changes_the_effect(files: dict[str, Path]) -> None:
    texts = set()
    loaded = load(files, *(Lora(f"x{scale}", str(files["a"]), scale) for scale in (1.0, 0.25, 1e-6)))
    bench = Bench(loaded)
    for lora in (None, "x1.0", "x0.25", "x1e-06"):
        key = ask(bench, lora)
        bench.run()
        texts.add(tuple(bench.whole(key)[0]))
    loaded.close()
    assert len(texts) == 3, "with hardly any of it as without"


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda path, model: None, "no such file"),
    "text": (lambda path, model: path.write_text("no gguf" * 99), "not a GGUF"),
    "model": (lambda path, model: path.write_bytes(model.read_bytes()), "no LoRA adapter but a model"),
    "control vector": (
        lambda path, model: tinymodels.write_lora(path, model, kind="cvec"), "an adapter of another kind (cvec)"
    ),
    "another architecture": (
        lambda path, model: tinymodels.write_lora(path, model, arch="gemma3"), "made for a model of type gemma3, not"
    ),
    "another width": (lambda path, model: tinymodels.write_lora(path, model, width=32), "incorrect shape"),
    "one half": (lambda path, model: tinymodels.write_lora(path, model, halves="a"), "missing one component"),
    "cut off": (
        lambda path, model: path.write_bytes(tinymodels.write_lora(path, model).read_bytes()[:-600]), "incomplete"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_one_line(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    make, why = BAD[kind]
    path = tmp_path / "bad.gguf"
    make(path, files["model"])
    with pytest.raises(AiosdError) as caught:
        load(files, Lora("sql", str(path))).close()
    assert why in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_take_turns() -> None:
    calls: list[Any] = [SimpleNamespace(lora=lora) for lora in ("", "", "a", "b")]
    turns = AdapterTurns()
    taken = []
    for _ in range(6 * STEPS):
        taken.append([call.lora for call in turns.of(calls)])
        turns.done(len(taken[-1]), len(taken[-1]))
    assert all(taken.count(names) == 2 * STEPS for names in (["", ""], ["a"], ["b"]))
    assert sum(a != b for a, b in pairwise(taken)) == 5
    assert turns.of(calls[:2]) == calls[:2], "whose calls are gone has no turn"


def test_right_guesses_do_not_make_a_turn_longer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that copies its prompt gets many tokens in a step; one with another adapter gets as many in its turn."""
    copied = [(13 * i) % 200 + 20 for i in range(100)]
    monkeypatch.setattr(bench.engine, "guesser", Guesser(FREE, bench.engine.mixed))
    play(monkeypatch, copied[4:])
    copying = bench.submit([*copied, *copied[:4]], peer=1, lora="a", max_tokens=90)
    other = bench.submit([230, 231, 232], peer=2, lora="b", max_tokens=90)
    calls = [bench.engine._calls[key] for key in (copying, other)]
    got: list[tuple[int, int]] = []  # by step: the call, and how many tokens it got
    while bench.engine.num_calls == 2:
        before = [len(call.out) for call in calls]
        bench.engine.step()
        got += [(i, len(call.out) - had) for i, (call, had) in enumerate(zip(calls, before, strict=True))]
    turns = [
        (i, sum(tokens for _, tokens in turn)) for i, turn in groupby((one for one in got if one[1]), itemgetter(0))
    ]
    assert len(turns) > 8
    assert max(tokens for i, tokens in turns[3:] if i == 0) < STEPS + ROWS
    assert {tokens for i, tokens in turns[3:-1] if i == 1} == {STEPS}
    bench.run()
    assert bench.engine.guesser.right > 60
    assert bench.whole(copying)[0] == bench.whole(other)[0] == copied[4:94]


def test_scopes_of_adapters_are_apart() -> None:
    scopes = {adapters.scope(group, lora) for group in ("g", "ga", "*") for lora in ("", "a", "b")}
    assert len(scopes) == 9


def test_saved_state_is_bound_to_the_adapter_it_was_computed_with(tmp_path: Path) -> None:
    from tests.test_context import MESSAGES, TOKENS, piece

    def saved(**known: str) -> Saved:
        return Saved(str(tmp_path), {"model": "m"}, adapters=known)

    saved(sql="1", chat="2").write("g", "n", MESSAGES, TOKENS, piece(), "sql")
    assert saved(sql="1").read("g", "n").piece is not None
    assert saved(sql="1").read("g", "n").lora == "sql"
    refused = [saved(sql="3").read("g", "n"), saved(chat="1").read("g", "n")]
    assert [opened.piece for opened in refused] == [None, None]
    assert [opened.refused for opened in refused] == [
        "it was saved under another adapter", "the adapter 'sql' is not loaded"
    ]  # fmt: skip


AGENT = """
import libaios as aios
hello = [{"role": "user", "content": "Hello! Who are you? " * 4}]
plain, other = (aios.llm.chat(hello, max_tokens=8, temperature=0.0, lora=lora) for lora in (None, "odd"))
assert plain.text != other.text
assert other.usage.cached_tokens == 0, other.usage
ctx = aios.llm.context(hello, lora="odd")
assert ctx.chat(max_tokens=8, temperature=0.0).text == other.text
ctx.save("odd-one")
print(aios.llm.models()[0].loras)
"""

AFTER = """
import libaios as aios
ctx = aios.llm.restore("odd-one")
r = ctx.fork().chat("And you?", max_tokens=4)
print(ctx.lora, r.usage.cached_tokens > 20)
"""


def test_agents_choose_adapters_and_find_their_contexts_again(
    fresh_aiosd: Callable[..., System], tmp_path: Path
) -> None:
    from aiosd.models.found import find

    lora = tinymodels.write_lora(tmp_path / "odd.gguf", Path(find("nano", "/").path), strength=1.0)
    system = fresh_aiosd("--lora", f"odd={lora}", "--slots", "2")
    assert said(system, AGENT, tmp_path) == "['odd']"
    assert f"odd × 1 ({lora})" in system.run("aiosd", "status", "-v").stdout
    system.stop()
    system.start()
    assert said(system, AFTER, tmp_path) == "odd True"


def said(system: System, code: str, tmp_path: Path) -> str:
    (tmp_path / "agent.py").write_text(code)
    done = system.run("aios-run", str(tmp_path / "agent.py"))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
