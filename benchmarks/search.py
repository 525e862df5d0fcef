#!/usr/bin/env python
"""Search by meaning in the store, in one process, with given vectors of 384 dimensions: one owner with 100,000 notes,
and 2,000 owners with 50 each. chromadb is measured on the same vectors, where `make chroma` has installed it.

The vectors lie in clusters, as those of real texts do, and queries lie near them. A search is all that the store does:
the nearest vectors, conditions and notes from SQLite, and the ranking. Times are CPU milliseconds of one thread,
medians of many searches. `words` is a search by words and meaning together; `10 %` and `1 %` are searches with a tag
that this share of the notes has. Recall is relative to a comparison with all vectors in single precision.

`--filters` measures searches with conditions instead: in 3,000, 30,000 and 100,000 notes of 1 KB (`--sizes`), each of
which contains about half of all words; by words, by meaning and by both; with a tag, metadata and times that some notes
have. The same number of files is searched by folder.

    $ taskset -c 0 python benchmarks/search.py
    what                                     value   bar
    search, p50 CPU ms                        1.60     3  kept
    …
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd.ipc import link  # noqa: E402  the checkout comes first
from aiosd.store.database import Database  # noqa: E402
from aiosd.store.meaning import BATCH, Meaning  # noqa: E402
from aiosd.store.memory import NoteStore  # noqa: E402
from aiosd.store.search import NoteTexts  # noqa: E402
from aiosd.store.storage import Storage  # noqa: E402
from aiosd.store.words import NOTES  # noqa: E402
from benchmarks import harness  # noqa: E402
from libaios import wire  # noqa: E402

K = 10
GROUPS = 1000
LOT = 1000  # notes that get their vectors at a time
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("r", "n", "st", "lk", "m", "nd")]
BARS = {
    "search, p50 CPU ms": 3.0,
    "filtered, 10 %, p50 CPU ms": 5.0,
    "filtered, 1 %, p50 CPU ms": 5.0,
    "adding one, p50 CPU ms": 0.5,
    "reopening, s": 2.0,
    "2,000 owners, p50 CPU ms": 0.2,
}
RECALL = 0.99


def vectors(count: int, dimensions: int, seed: int, groups: Any) -> Any:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, dimensions)).astype(np.float32) / np.float32(dimensions**0.5)
    made = groups[rng.integers(0, len(groups), count)] + np.float32(0.8) * noise
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def groups(dimensions: int) -> Any:
    made = np.random.default_rng(0).normal(size=(GROUPS, dimensions)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


class Given:
    """An embedder that returns given vectors."""

    name = shown = "given"

    def ask(self, texts: list[str], done: Callable[..., None], urgent: bool = False) -> None:
        raise AssertionError("vectors are given")

    def poll(self) -> None:
        pass


class Store:
    def __init__(self, folder: Path) -> None:
        self.database = Database(folder)
        self.database.begin_system("bench")
        self.meaning = Meaning(self.database, Given(), 1 << 30)
        self.memory = NoteStore(self.database, 32 << 20, 1 << 40, meaning=self.meaning)
        self.meaning.begin(NoteTexts(self.database))
        self.finder = self.memory.finder
        self.calls = 0

    def ask(self, owner: str) -> link.Ask:
        self.calls += 1
        caller = link.Caller(7, 1000, owner, True, "default")
        return link.Ask((7, self.calls), caller, 0, wire.raw([]), settled=self.calls)

    def add(self, owner: str, text: str, tags: Sequence[str], metadata: dict[str, Any] | None = None) -> None:
        """A note as an agent adds it."""
        self.memory.add(self.ask(owner), wire.MemAdd(text, tags=list(tags), metadata=metadata or {}))

    def listed(self, owner: str, filters: wire.NoteFilters) -> None:
        self.memory.list(self.ask(owner), wire.MemList(filters, K, 0))

    def embed(self, given: Any) -> None:
        """Index the words of new notes and add their vectors, as the store does when the embedder has answered."""
        while not self.memory.words.work():
            pass
        rows = self.database.rows("SELECT number, kind, item, owner FROM pending ORDER BY number")
        self.meaning._settle(rows, list(given))  # type: ignore[arg-type]

    def owner(self, name: str) -> int:
        row = self.database.row("SELECT id FROM owners WHERE name = ?", f"name/1000/default/{name}")
        assert row is not None
        return int(row[0])

    def load(self, *owners: int) -> None:
        """Load the whole index: a search waits only for a limited time until it is loaded, and else goes without it."""
        while drained(self.meaning.load(NOTES, owners)):
            pass

    def search(self, owner: int, query: str, vector: Any, **more: Any) -> list[int]:
        found = self.finder.ranked([owner], wire.MemSearch(query, K, **more), vector)
        return [one.note.id for one in found]


def drained(loading: Generator[Any, None, str]) -> str:
    """The return value of a generator that is run to its end."""
    while True:
        try:
            next(loading)
        except StopIteration as end:
            return str(end.value)


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=12))


def tags_of(number: int) -> list[str]:
    return ["tenth"] * (number % 10 == 3) + ["hundredth"] * (number % 100 == 7)


def median_ms(acts: Sequence[Callable[[], Any]]) -> float:
    """The median CPU time of this thread for a call, in ms."""
    times = []
    for act in acts:
        began = time.process_time_ns()
        act()
        times.append((time.process_time_ns() - began) / 1e6)
    return statistics.median(times)


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# ── one owner with many ───────────────────────────────────────────────────────────────────────────────────


def one_owner(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    middles = groups(options.dimensions)
    given = vectors(options.notes, options.dimensions, 1, middles)
    queries = vectors(options.queries, options.dimensions, 2, middles)
    rng = random.Random(1)
    single = min(500, options.notes // 2)
    store = Store(folder)
    began = time.process_time()
    for begin in range(0, options.notes - single, LOT):
        lot = range(begin, min(begin + LOT, options.notes - single))
        store.database.begin()  # one commit, as for calls that arrive together
        for number in lot:
            store.add("one", text_of(rng), tags_of(number))
        store.embed(given[lot.start : lot.stop])
        store.database.commit()
    filling = time.process_time() - began
    owner = store.owner("one")
    store.load(owner)
    rest = range(options.notes - single, options.notes)
    texts = [text_of(rng) for _ in rest]
    adding = [
        lambda n=number, t=text: store.add("one", t, tags_of(n)) for number, text in zip(rest, texts, strict=True)
    ]
    wall, cpu = time.monotonic(), time.process_time()
    found = {"adding one, p50 CPU ms": 0.0}
    times = []
    for begin in range(0, single, BATCH):  # in batches, as the store does it
        times.append(median_ms(adding[begin : begin + BATCH]))
        store.embed(given[rest[begin] : rest[begin] + len(adding[begin : begin + BATCH])])
    found["adding one, p50 CPU ms"] = statistics.median(times)
    found["adding one, with its vector, mean CPU ms"] = (time.process_time() - cpu) * 1e3 / single
    found["adding one, with its vector, mean wall ms"] = (time.monotonic() - wall) * 1e3 / single
    found["adding with 1,000 a commit, with its vector, CPU ms each"] = filling * 1e3 / (options.notes - single)
    found |= searching(store, owner, given, queries, rng)
    found["file, bytes a note"] = store.database.stats()["database_bytes"] / options.notes
    store.database.close()
    before, began, cpu = rss(), time.monotonic(), time.process_time()
    store = Store(folder)
    store.load(owner)
    found["reopening, s"] = time.monotonic() - began
    found["reopening, CPU s"] = time.process_time() - cpu
    found["memory, bytes a note"] = store.meaning.stats()["index_bytes"] / options.notes
    found["memory of the process, bytes a note"] = (rss() - before) / options.notes
    store.database.close()
    return found


def searching(store: Store, owner: int, given: Any, queries: Any, rng: random.Random) -> dict[str, float]:
    exact = np.argsort(-(queries @ given.T), axis=1)[:, :K] + 1  # ids begin at 1

    def among(tag: str) -> Any:
        allowed = np.array([tag in tags_of(number) for number in range(len(given))])
        return np.argsort(-np.where(allowed, queries @ given.T, -2), axis=1)[:, :K] + 1

    found = {}
    cases = {"search": ("", exact), "filtered, 10 %": ("tenth", None), "filtered, 1 %": ("hundredth", None)}
    for name, (tag, right) in cases.items():
        filters = wire.NoteFilters([tag] if tag else [])
        got: list[list[int]] = []
        acts = [
            lambda v=vector, f=filters, g=got: g.append(store.search(owner, "-", v, filters=f, by="meaning"))
            for vector in queries
        ]
        found[f"{name}, p50 CPU ms"] = median_ms(acts)
        right = among(tag) if right is None else right
        hits = sum(len(set(mine) & set(theirs.tolist())) for mine, theirs in zip(got, right, strict=True))
        found[f"{name}, recall@10"] = hits / (K * len(queries))
    texts = [" ".join(rng.choices(WORDS, k=3)) for _ in queries]
    both = [lambda v=vector, t=text: store.search(owner, t, v) for vector, text in zip(queries, texts, strict=True)]
    found["words and meaning, p50 CPU ms"] = median_ms(both)
    return found


# ── many owners with few ──────────────────────────────────────────────────────────────────────────────────


def many_owners(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    middles = groups(options.dimensions)
    given = vectors(options.owners * 50, options.dimensions, 3, middles)
    queries = vectors(options.queries, options.dimensions, 4, middles)
    rng = random.Random(2)
    store = Store(folder)
    for begin in range(0, len(given), LOT):
        lot = range(begin, min(begin + LOT, len(given)))
        store.database.begin()
        for number in lot:
            store.add(f"n{number % options.owners}", text_of(rng), tags_of(number))
        store.embed(given[lot.start : lot.stop])
        store.database.commit()
    owners = [store.owner(f"n{number}") for number in range(options.owners)]
    first = [lambda o=owner: store.load(o) for owner in owners]
    found = {f"{options.owners:,} owners, the first search reads, p50 CPU ms": median_ms(first)}
    chosen = [rng.choice(owners) for _ in queries]
    acts = [
        lambda o=owner, v=vector: store.meaning.nearest(NOTES, v, K, {o: None})
        for owner, vector in zip(chosen, queries, strict=True)
    ]
    found[f"{options.owners:,} owners, p50 CPU ms"] = median_ms(acts)
    whole = [
        lambda o=owner, v=vector: store.search(o, "-", v, by="meaning")
        for owner, vector in zip(chosen, queries, strict=True)
    ]
    found[f"{options.owners:,} owners, with its notes, p50 CPU ms"] = median_ms(whole)
    found[f"{options.owners:,} owners, memory, bytes a note"] = store.meaning.stats()["index_bytes"] / len(given)
    store.database.close()
    return found


# ── conditions ────────────────────────────────────────────────────────────────────────────────────────────

#: Conditions of searches, and the share of the notes that fulfils each.
CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tag, 1 %": {"tags": ["t7"]},
    "tag, 10 %": {"tags": ["tenth"]},
    "tag, 50 %": {"tags": ["half"]},
    "metadata, 1 %": {"metadata": {"lot": 7}},
    "metadata, 50 %": {"metadata": {"even": True}},
    "the newest 10 %": {"since": 0.9},
    "all but the newest 10 %": {"until": 0.9},
    "tag, 50 %, of the newest 10 %": {"tags": ["half"], "since": 0.9},
}
COMMON = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en") for c in "nslrtkm"]
FOLDERS = {"none": "", "folder, 1 %": "h7", "folder, 50 %": "even"}


def long_text(number: int) -> str:
    return " ".join(random.Random(number).choices(COMMON, k=400))[:1015]


def conditions(options: argparse.Namespace, count: int, folder: Path) -> dict[str, float]:
    middles = groups(options.dimensions)
    given = vectors(count, options.dimensions, 1, middles)
    store = Store(folder)
    store.memory._clock = lambda: store.calls / count  # the first note was changed at 0, the last one at 1
    for begin in range(0, count, LOT):
        lot = range(begin, min(begin + LOT, count))
        store.database.begin()
        for number in lot:
            tags = [f"t{number % 100}", *["tenth"] * (number % 10 == 3), *["half"] * (number % 2)]
            store.add("one", long_text(number), tags, {"lot": number % 100, "even": number % 2 == 0})
        store.embed(given[lot.start : lot.stop])
        store.database.commit()
    owner = store.owner("one")
    store.load(owner)
    queries = vectors(options.queries, options.dimensions, 2, middles)
    asked = [(" ".join(long_text(-1 - number).split()[:3]), vector) for number, vector in enumerate(queries)]
    found = {}
    for name, condition in CONDITIONS.items():
        filters = wire.NoteFilters(**condition)
        for by, mode in (("words", "words"), ("meaning", "meaning"), ("both", "")):
            more = {"filters": filters, "by": mode}
            acts = [
                lambda q=query, v=None if by == "words" else vector, m=more: store.search(owner, q, v, **m)
                for query, vector in asked
            ]
            found[f"{name}; by {by}"] = median_ms(acts)
        found[f"{name}; the newest 10 listed"] = median_ms([lambda f=filters: store.listed("one", f)] * 20)
    store.database.close()
    return found | files_by_folder(options, count, folder / "files")


def files_by_folder(options: argparse.Namespace, count: int, folder: Path) -> dict[str, float]:
    store = Store(folder)
    storage = Storage(store.database, folder, 1 << 40, 1)
    for begin in range(0, count, LOT):
        store.database.begin()
        for number in range(begin, min(begin + LOT, count)):
            path = f"{'odd' if number % 2 else 'even'}/h{number % 100}/{number}.txt"
            path = f"h7/{number}.txt" if number % 100 == 7 else path
            storage.write(store.ask("one"), wire.StoWrite(path, long_text(number).encode()))
        store.database.commit()
    found = {}
    texts = [" ".join(long_text(-1 - number).split()[:3]) for number in range(options.queries)]
    for name, under in FOLDERS.items():
        wanted = [wire.StoSearch(text, K, under, "") for text in texts]
        acts = [lambda w=one: storage.search(store.ask("one"), w) for one in wanted]
        found[f"files: {name}; by words"] = median_ms(acts)
    store.database.close()
    return found


def with_conditions(options: argparse.Namespace) -> None:
    rows: dict[str, list[float]] = {}
    for count in options.sizes:
        with tempfile.TemporaryDirectory(prefix="aios-bench-") as folder:
            for name, value in conditions(options, count, Path(folder)).items():
                rows.setdefault(name, []).append(value)
    print(f"  {'CPU ms, medians':58}" + "".join(f"{count:>10,}" for count in options.sizes))
    for name, values in rows.items():
        print(f"  {name:58}" + "".join(f"{value:10.2f}" for value in values))
    kept = [{"what": name, "ms": values} for name, values in rows.items()]
    harness.write("filters", kept, harness.RESULTS / "filters.json", sizes=options.sizes)


# ── the peer ──────────────────────────────────────────────────────────────────────────────────────────────

PEER = """
import json, os, sys, time, statistics
import numpy as np
import chromadb
folder, given, queries, k = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3]), int(sys.argv[4])
def ms(acts):
    times = []
    for act in acts:
        began = time.process_time_ns(); act(); times.append((time.process_time_ns() - began) / 1e6)
    return statistics.median(times)
def opened():
    client = chromadb.PersistentClient(folder)
    return client.get_or_create_collection("notes", metadata={"hnsw:space": "cosine"})
notes = opened()
tag = lambda n: {"tag": "tenth" if n % 10 == 3 else "none"}
single = min(100, len(given) // 2)
def add(begin, end):
    notes.add(ids=[str(n + 1) for n in range(begin, end)], embeddings=given[begin:end],
              metadatas=[tag(n) for n in range(begin, end)], documents=["x"] * (end - begin))
began = time.process_time()
for begin in range(0, len(given) - single, 5000):
    add(begin, min(begin + 5000, len(given) - single))
out = {"adding in lots of 5,000, CPU ms each": (time.process_time() - began) * 1e3 / (len(given) - single)}
wall = time.monotonic()
out["adding one, p50 CPU ms"] = ms([lambda n=n: add(n, n + 1) for n in range(len(given) - single, len(given))])
out["adding one, mean wall ms"] = (time.monotonic() - wall) * 1e3 / single
got = []
ask = lambda q, **more: notes.query(query_embeddings=[q], n_results=k, **more)
out["search, p50 CPU ms"] = ms([lambda q=q: got.append(ask(q)["ids"][0]) for q in queries])
exact = np.argsort(-(queries @ given.T), axis=1)[:, :k] + 1
hits = sum(len({int(one) for one in mine} & set(right.tolist())) for mine, right in zip(got, exact))
out["search, recall@10"] = hits / (k * len(queries))
out["filtered, 10 %, p50 CPU ms"] = ms([lambda q=q: ask(q, where={"tag": "tenth"}) for q in queries[:100]])
print(json.dumps(out))
"""


def peer(python: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """chromadb with the first of the same vectors, and its own defaults."""
    middles = groups(options.dimensions)
    given = vectors(options.notes, options.dimensions, 1, middles)[: options.peer_notes]
    np.save(folder / "given.npy", given)
    np.save(folder / "queries.npy", vectors(options.queries, options.dimensions, 2, middles))
    argv = [python, "-c", PEER, str(folder / "chroma"), str(folder / "given.npy"), str(folder / "queries.npy"), str(K)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ── table ─────────────────────────────────────────────────────────────────────────────────────────────────


def line(name: str, value: float, bars: bool = True) -> str:
    recall = name.endswith("recall@10")
    bar = RECALL if recall and bars else BARS.get(name) if bars else None
    shown = f"{value:,.0f}" if "bytes" in name else f"{value:.3f}"
    return f"  {name:<58}{shown:>10}{'' if bar is None else f'{bar:>8g}'}  {harness.verdict(value, bar, recall)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--owners", type=int, default=2000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--peer", metavar="PYTHON", default=harness.chroma(), help="an interpreter with chromadb")
    parser.add_argument("--peer-notes", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "search.json")
    parser.add_argument("--filters", action="store_true", help="measure only searches with conditions")
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 30_000, 100_000], help="of --filters, in notes")
    options = parser.parse_args()
    if options.filters:
        with_conditions(options)
        return
    rows = []
    parts: list[tuple[str, Callable[..., dict[str, float]]]] = [
        ("aiosd", one_owner),
        ("aiosd, many owners", many_owners),
    ]
    if options.peer:
        parts.append((f"chromadb, {options.peer_notes:,} notes", lambda *args: peer(options.peer, *args)))
    for name, part in parts:
        with tempfile.TemporaryDirectory(prefix="aios-bench-") as folder:
            row = part(options, Path(folder))
        rows.append({"system": name, **row})
        print(name)
        for key, value in row.items():
            print(line(key, value, name.startswith("aiosd")), flush=True)
        harness.write("search", rows, options.out, notes=options.notes, dimensions=options.dimensions)
    if not options.peer:
        print("no chromadb beside it: `make chroma` installs it")


if __name__ == "__main__":
    main()
