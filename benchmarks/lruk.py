#!/usr/bin/env python
"""Hit rates of caches of notes: the store's LRU-K and other policies, on the same references.

FIFO, LRU, LRU-2 and LRU-3 (`aiosd/store/lruk.py`) with several correlated reference periods, S3-FIFO, W-TinyLFU, and
Belady's optimal policy, which needs the future and is the upper limit. All entries have the same size. The traces:
Zipf; Zipf with scans of entries that are read once; a working set that moves; and three of agents. An agent works on
one note at a time (reads it, and reads it again some references later), returns most often to some notes, sometimes
lists all its notes, and shares some with its group. The references of all agents that work at the same time are
interleaved.

    $ python benchmarks/lruk.py
    trace             fifo   lru  lru-2 …  belady
    zipf              …
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd.store.lruk import LruK  # noqa: E402  the checkout comes first
from benchmarks import harness  # noqa: E402

REFERENCES = 60_000
Trace = list[int]


# ── traces ────────────────────────────────────────────────────────────────────────────────────────────────


def zipf_weights(count: int, power: float) -> list[float]:
    total = 0.0
    weights = []
    for rank in range(1, count + 1):
        total += rank**-power
        weights.append(total)
    return weights


def zipf(rng: random.Random, references: int, count: int = 10_000, power: float = 1.0) -> Trace:
    return rng.choices(range(count), cum_weights=zipf_weights(count, power), k=references)


def scans(rng: random.Random, references: int) -> Trace:
    """After every 1,000 references 1,000 to entries that are read only once."""
    trace, fresh = [], 10_000_000
    for begin in range(0, references, 2000):
        trace += zipf(rng, 1000, 5000, 0.8)
        trace += range(fresh + begin, fresh + begin + 1000)
    return trace[:references]


def moving(rng: random.Random, references: int) -> Trace:
    """A working set of about 900 entries that moves by one entry every 20 references."""
    return [number // 20 + int(abs(rng.gauss(0, 300))) for number in range(references)]


def agents(rng: random.Random, references: int, count: int, working: int, notes: int = 60) -> Trace:
    """`count` agents with `notes` notes each. `working` of them work at a time; their references are interleaved."""
    favourites = [rng.sample(range(notes), notes) for _ in range(count)]
    own, shared = zipf_weights(notes, 1.0), zipf_weights(200, 1.0)

    def task() -> Trace:
        agent = rng.randrange(count)
        base = 1000 + agent * notes
        note = base + favourites[agent][rng.choices(range(notes), cum_weights=own)[0]]
        steps = [note] * rng.randint(1, 4)  # reads it several times
        if rng.random() < 0.3:
            steps.append(rng.choices(range(200), cum_weights=shared)[0])
        if rng.random() < 0.05:
            steps += range(base, base + notes)  # lists all its notes
        return steps

    tasks = [task() for _ in range(working)]
    trace: Trace = []
    while len(trace) < references:
        number = rng.randrange(working)
        trace.append(tasks[number].pop(0))
        tasks[number] = tasks[number] or task()
    return trace


#: By name: references, and the number of entries that fit into the cache.
TRACES: dict[str, Callable[[random.Random, int], tuple[Trace, int]]] = {
    "zipf": lambda rng, n: (zipf(rng, n), 1000),
    "zipf+scans": lambda rng, n: (scans(rng, n), 500),
    "moving set": lambda rng, n: (moving(rng, n), 500),
    "200 agents": lambda rng, n: (agents(rng, n, 200, 16), 3000),
    "40 agents, tight": lambda rng, n: (agents(rng, n, 40, 8), 300),
    "40, 3 at a time": lambda rng, n: (agents(rng, n, 40, 3), 300),
}


# ── policies: each function returns the number of hits ────────────────────────────────────────────────────


def fifo(trace: Trace, size: int) -> int:
    return _ordered(trace, size, move=False)


def lru(trace: Trace, size: int) -> int:
    return _ordered(trace, size, move=True)


def _ordered(trace: Trace, size: int, move: bool) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            if move:
                held.move_to_end(key)
        else:
            if len(held) >= size:
                held.popitem(last=False)
            held[key] = None
    return hits


def lruk(k: int, correlated: int) -> Callable[[Trace, int], int]:
    def run(trace: Trace, size: int) -> int:
        cache: LruK[int] = LruK(size, k=k, correlated=correlated)
        for key in trace:
            if cache.get(key) is None:
                cache.put(key, 1, 1, None)
        return cache.hits

    return run


def s3fifo(trace: Trace, size: int) -> int:
    """A small queue, from which most entries are evicted, a main queue, and the keys that left the small queue."""
    small: OrderedDict[int, int] = OrderedDict()
    main: OrderedDict[int, int] = OrderedDict()
    ghosts: OrderedDict[int, None] = OrderedDict()
    most_small = max(1, size // 10)
    hits = 0

    def evict() -> None:
        if len(small) >= most_small or not main:
            while small:
                key, uses = small.popitem(last=False)
                if uses > 1:
                    main[key] = 0
                    continue
                ghosts[key] = None
                while len(ghosts) > size:
                    ghosts.popitem(last=False)
                return
        while main:
            key, uses = main.popitem(last=False)
            if uses:
                main[key] = uses - 1
            else:
                return

    for key in trace:
        if key in small:
            hits += 1
            small[key] = min(3, small[key] + 1)
        elif key in main:
            hits += 1
            main[key] = min(3, main[key] + 1)
        else:
            while len(small) + len(main) >= size:
                evict()
            if key in ghosts:
                del ghosts[key]
                main[key] = 0
            else:
                small[key] = 0
    return hits


def tinylfu(trace: Trace, size: int) -> int:
    """A window of 1 % with LRU. An entry that leaves it is kept only if it is used more often than its victim."""
    window: OrderedDict[int, None] = OrderedDict()
    probation: OrderedDict[int, None] = OrderedDict()
    protected: OrderedDict[int, None] = OrderedDict()
    uses: Counter[int] = Counter()
    most_window = max(1, size // 100)
    most_main = size - most_window
    most_protected = max(1, most_main * 4 // 5)
    hits = 0
    for number, key in enumerate(trace, 1):
        uses[key] = min(15, uses[key] + 1)
        if number % (10 * size) == 0:
            uses = Counter({key: count // 2 for key, count in uses.items() if count > 1})
        if key in window:
            hits += 1
            window.move_to_end(key)
        elif key in protected:
            hits += 1
            protected.move_to_end(key)
        elif key in probation:
            hits += 1
            del probation[key]
            protected[key] = None
            if len(protected) > most_protected:
                probation[protected.popitem(last=False)[0]] = None
        else:
            window[key] = None
            if len(window) > most_window:
                candidate = window.popitem(last=False)[0]
                if len(probation) + len(protected) < most_main:
                    probation[candidate] = None
                else:
                    victim = next(iter(probation or protected))
                    if uses[candidate] > uses[victim]:
                        (probation if victim in probation else protected).pop(victim)
                        probation[candidate] = None
    return hits


def belady(trace: Trace, size: int) -> int:
    """Evict the entry whose next use is farthest in the future."""
    following, last = [0] * len(trace), dict[int, int]()
    for number in range(len(trace) - 1, -1, -1):
        following[number] = last.get(trace[number], len(trace))
        last[trace[number]] = number
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for number, key in enumerate(trace):
        if key in held:
            hits += 1
        elif len(held) >= size:
            while True:
                wanted, victim = heapq.heappop(heap)
                if held.get(victim) == -wanted:
                    del held[victim]
                    break
        held[key] = following[number]
        heapq.heappush(heap, (-following[number], key))
    return hits


POLICIES: dict[str, Callable[[Trace, int], int]] = {
    "fifo": fifo,
    "lru": lru,
    "lru-2": lruk(2, 0),
    "lru-2, crp 30": lruk(2, 30),
    "lru-3, crp 4": lruk(3, 4),
    "lru-3, crp 30": lruk(3, 30),
    "s3-fifo": s3fifo,
    "w-tinylfu": tinylfu,
    "belady": belady,
}
OURS = "lru-2, crp 30"


# ── table and plot ────────────────────────────────────────────────────────────────────────────────────────


def rates(trace: Trace, size: int) -> dict[str, float]:
    """Hit rates in the second half of the references; the first half fills the caches."""
    half = len(trace) // 2
    found = {}
    for name, policy in POLICIES.items():
        found[name] = (policy(trace, size) - policy(trace[:half], size)) / (len(trace) - half)
    return found


def measure(name: str, references: int, seed: int) -> dict[str, Any]:
    trace, size = TRACES[name](random.Random(seed), references)
    began = time.process_time()
    return {"trace": name, "size": size, "distinct": len(set(trace)), **rates(trace, size),
            "cpu_s": time.process_time() - began}  # fmt: skip


def head() -> str:
    return f"{'trace':<18}" + "".join(f"{name:>15}" for name in POLICIES)


def line(row: dict[str, Any]) -> str:
    return f"{row['trace']:<18}" + "".join(f"{100 * row[name]:>14.1f}%" for name in POLICIES)


def against_lru(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The hit rate minus LRU's, in points, on average over all traces. The default is chosen by this."""
    return {name: 100 * sum(row[name] - row["lru"] for row in rows) / len(rows) for name in POLICIES}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    plt = harness.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(11, 4))
    width = 0.8 / len(POLICIES)
    for number, name in enumerate(POLICIES):
        places = [row + number * width for row in range(len(rows))]
        axes.bar(
            places, [100 * row[name] for row in rows], width, label=name, edgecolor="black" if name == OURS else "none"
        )
    axes.set_xticks([row + 0.4 for row in range(len(rows))], [row["trace"] for row in rows])
    axes.set_ylabel("hits, %")
    axes.legend(ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--references", type=int, default=REFERENCES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "lruk.json")
    options = parser.parse_args()
    print(head(), flush=True)
    rows = []
    for name in TRACES:
        rows.append(measure(name, options.references, options.seed))
        print(line(rows[-1]), flush=True)
    mean = against_lru(rows)
    print(f"{'against lru':<18}" + "".join(f"{mean[name]:>+14.1f} " for name in POLICIES))
    path = harness.write("lruk", rows, options.out, references=options.references, seed=options.seed, mean=mean)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
