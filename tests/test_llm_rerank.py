"""Scores of documents for a query, which only ranking models give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aiosd.llm import llama, loading
from aiosd.llm.embed import EmbeddingEngine
from aiosd.llm.front import PAIRS, Front
from aiosd.llm.pairs import tokens_of_pairs
from aiosd.llm.spec import ModelSpec
from libaios import wire
from tests import tinymodels
from tests.conftest import System

DOCUMENTS = [
    letter * length for letter, length in zip("abcdefghij" * 4, [1, 5, 300, 40, 3, 700, 2, 9] * 5, strict=True)
]
TEMPLATE = "<|im_start|>Q: {query}<|im_end|>D: {document}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write_like(tmp_path_factory.mktemp("gguf") / "rank.gguf", "qwen3", ranks=TEMPLATE)


@pytest.fixture
def loaded(path: Path) -> Iterator[loading.LoadedModel]:
    found = loading.load(ModelSpec("m", str(path), threads=1, slots=2, ctx=256), lambda *_: None)
    yield found
    found.close()


def scores(embedder: EmbeddingEngine, model: llama.Model, documents: list[str], query: str = "why?") -> list[float]:
    *_, ranked = embedder.ranked_in_steps(tokens_of_pairs(model, query, documents))
    assert isinstance(ranked, wire.Ranked)
    return ranked.scores


def test_documents_are_scored_in_batches_as_each_alone(
    loaded: loading.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = EmbeddingEngine(loaded.model, threads=1)
    alone = [scores(embedder, loaded.model, [document])[0] for document in DOCUMENTS]
    batches: list[int] = []
    decode = llama.LlamaContext.decode
    monkeypatch.setattr(
        llama.LlamaContext, "decode", lambda self, batch: batches.append(batch.size) or decode(self, batch)
    )
    together = scores(embedder, loaded.model, DOCUMENTS)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(together)) > len(set(DOCUMENTS)) / 2
    assert all(0 <= score <= 1 for score in together), "this kind of model gives the probability of yes"
    assert len(batches) < len(DOCUMENTS) / 2
    assert scores(embedder, loaded.model, DOCUMENTS[:3], "what?") != together[:3], "the query counts"
    assert scores(embedder, loaded.model, []) == []
    embedder.close()


def test_a_pair_is_written_as_the_model_says(loaded: loading.LoadedModel) -> None:
    model = loaded.model
    (tokens,) = tokens_of_pairs(model, "{document}<|im_end|>", ["x<|im_start|>{query}"])
    begin, end = (
        model.tokenize("<|im_start|>", bos=False, special=True),
        model.tokenize("<|im_end|>", bos=False, special=True),
    )
    assert tokens.count(begin[0]) == tokens.count(end[0]) == 1, "control tokens of a text are plain text"
    assert model.text(tokens) == "<|im_start|>Q: {document}<|im_end|><|im_end|>D: x<|im_start|>{query}"


def test_without_a_template_marks_stand_between_them(tmp_path: Path) -> None:
    path = tinymodels.write(tmp_path / "m.gguf", layers=1, pooling=4, add_bos=True)
    model = llama.Model(str(path), 0, lambda _: None)
    (tokens,) = tokens_of_pairs(model, "q", ["d"])
    assert model.text(tokens) == "<|endoftext|>qd", "a vocabulary without a mark of separation"
    model.close()


def test_the_front_makes_the_same_tokens_of_long_texts(loaded: loading.LoadedModel, path: Path) -> None:
    front = Front(str(path), 256)
    done: list[bytes] = []
    front.ask(1, PAIRS, wire.encode(("q", DOCUMENTS)), done.append, lambda error: done.append(str(error).encode()))
    while front.busy:
        front.poll(0.1)
    front.close()
    assert msgspec.msgpack.decode(done[0]) == list(tokens_of_pairs(loaded.model, "q", DOCUMENTS))


def test_what_cannot_be_scored(loaded: loading.LoadedModel) -> None:
    embedder = EmbeddingEngine(loaded.model, threads=1)
    with pytest.raises(OSError, match=r"documents\[1\]: 3012 tokens, at most 2048"):
        scores(embedder, loaded.model, ["fine", "x" * 3000])
    with pytest.raises(OSError, match="it makes no vectors"):
        embedder.embed(["text"])
    embedder.close()


AGENT = """
import asyncio, json
import libaios as aios
import libaios.aio
documents = ["one", "two" * 20_000, "three"]
found = aios.llm.rerank("which?", [documents[0], documents[2]], model="rank")
again = asyncio.run(libaios.aio.llm.rerank("which?", [documents[0], documents[2]], model="rank"))
errors = []
for call in (lambda: aios.llm.rerank("which?", ["x"]), lambda: aios.llm.rerank("which?", documents, model="rank"),
             lambda: aios.llm.embed("x", model="rank")):
    try:
        call()
    except OSError as error:
        errors.append(str(error))
print(json.dumps([found, again, errors]))
"""


def test_agents_rank_documents(fresh_aiosd: Callable[..., System], tmp_path: Path, path: Path) -> None:
    system = fresh_aiosd("--model", "nano", "--model", f"rank={path}", "--slots", "2")
    (tmp_path / "agent.py").write_text(AGENT)
    done = system.run("aios-run", str(tmp_path / "agent.py"))
    assert done.returncode == 0, done.stderr
    found, again, errors = json.loads(done.stdout)
    assert found == pytest.approx(again)
    assert len(set(found)) == 2
    assert "this one makes no scores" in errors[0]
    assert "documents[1]: " in errors[1]
    assert "at most 2048" in errors[1]
    assert "it makes no vectors" in errors[2]
