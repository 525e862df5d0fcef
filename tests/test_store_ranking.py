"""How well notes are found: 100 notes, each by a question about it that shares few words with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiosd.llm import llama  # imported here, because its binding opens descriptors
from aiosd.llm.embed import EmbeddingEngine
from aiosd.models.places import ours
from aiosd.store import static
from tests.pairs import PAIRS
from tests.test_store_meaning import Store

NAME = "all-MiniLM-L6-v2"


class OfModel:
    """The embedding model, run in this process."""

    name = shown = NAME

    def __init__(self, path: Path) -> None:
        llama.start()
        self._model = llama.Model(str(path), 0, lambda fraction: None)
        self._embedder = EmbeddingEngine(self._model, 1)
        self._known: dict[str, Any] = {}

    def ask(self, texts: list[str], done: Callable[..., None], urgent: bool = False) -> None:
        new = [text for text in texts if text not in self._known]
        if new:
            made = self._embedder.embed(new)
            self._known |= zip(new, np.frombuffer(made.data, "<f4").reshape(made.n, made.d), strict=True)
        done([self._known[text] for text in texts])

    def poll(self) -> None:
        pass


def embedder_from(file: str) -> Any:
    path = ours() / file
    if not path.exists():
        pytest.skip(f"{path} is not there: `make embedder` makes it")
    return static.read(path) if file.endswith(".vectors") else OfModel(path)


def recall(store: Store, k: int, **how: Any) -> float:
    return sum(note in store.found(question, k, **how) for note, question in PAIRS) / len(PAIRS)


def filled(folder: Path, embedder: Any) -> Store:
    store = Store(folder, embedder)
    store.add(*(note for note, _ in PAIRS))
    return store


def test_words_alone_find_few(tmp_path: Path) -> None:
    """So these pairs test meaning: pairs that words find would show nothing."""
    store = filled(tmp_path, None)
    assert recall(store, 1) <= 0.1
    store.database.close()


@pytest.mark.parametrize(("file", "first", "five"), [(f"{NAME}.vectors", 0.22, 0.5), (f"{NAME}.gguf", 0.8, 0.93)])
def test_meaning_finds_most(tmp_path: Path, file: str, first: float, five: float) -> None:
    """And the search by words does no harm. A note ranks first for its own text, whatever its vector."""
    store = filled(tmp_path, embedder_from(file))
    assert recall(store, 1) >= first
    assert recall(store, 5) >= five
    assert recall(store, 5) >= recall(store, 5, by="meaning") - 0.03
    assert all(store.found(note, 1) == [note] for note, _ in PAIRS)
    store.database.close()
