#!/usr/bin/env python
"""What notes cost: reading one, and writing them durably from many agents at once, compared with SQLite and chromadb.

    $ python benchmarks/store.py
    one agent, µs                                       p50      p99   × getpid
    getpid                                             27.1     61.0
    mem.get of 1 KB by id, read before                 81.0    130.2       2.99
    …

Reading: one agent calls getpid, reads a note of 1 KB by id and by key, and a file of 1 KB, again and again: what it has
read before, and has not changed, the kernel answers itself. It reads notes and files that it has just written, each for
the first time. And it reads 100 notes in turn, and 100 files, which are more than the kernel keeps: each comes from the
store, as what another process wrote does when it is read for the first time. The calls alternate in rounds, and a ratio
is the median of the ratios of the rounds.

Writing: 32 agents add notes of 1 KB, with one call in flight each. A call returns when the note is on the disk, can be
found by its words, is counted in its owner's quota, and its reply is recorded. For comparison: SQLite alone, in one
process that commits each row of 1 KB by itself into a table without an index, with WAL and `synchronous=FULL`, once
with a new WAL and once with one that has its full size already; and 32 processes with a connection of their own each.
All use the same disk, in alternating rounds.

The limits are shown, too: how long the disk takes for `fdatasync`, and how many calls per second the 32 agents make
that need none (reads). The words of notes are indexed in the background; the rate of notes including this is shown.
With `--sync-ms` each wait for the disk takes longer by that time, on both sides (by a preloaded library that sleeps):
disks without a protected cache take 1 to 10 ms.

chromadb (`make chroma`): adding, searching and reopening --notes given vectors of 384 dimensions, compared with the
same for notes, by words.

Results go to benchmarks/results/store.json. Exit status 1 when a bar is missed.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import AGENT, Aiosd, makespan, model_path, percentile, race, verdict, write  # noqa: E402
from benchmarks.harness import chroma as chroma_there  # noqa: E402

READ_BAR, WRITE_BAR = 4.5, 5.0
READS = {
    "getpid": "getpid",
    "get": "mem.get of 1 KB by id, read before",
    "key": "mem.get of 1 KB by key, read before",
    "file": "sto.read of 1 KB, read before",
    "own": "mem.get of 1 KB by key, just written",
    "own file": "sto.read of 1 KB, just written",
    "other": "mem.get of 1 KB from the store, 100 in turn",
    "others": "sto.read of 1 KB from the store, 100 in turn",
}
OWN = ("own", "own file")
KEPT = ("get", "key", "file", *OWN)  # by the kernel

#: An agent's order: what to do, how often, and the number of the first text.
SCRIPT = (
    AGENT
    + """
import itertools, random
WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en") for c in "nslrtkm"]
def text_of(number):
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=400))[:1015] + f" {number:08}"
texts = []
def run(order):
    what, calls, first = order["what"], order["calls"], order.get("first", 0)
    if what == "prepare":  # so that no time of what is measured goes into texts
        texts[:] = [text_of(number) for number in range(first, first + calls)]
        return {}
    if what == "write":
        for number, text in enumerate(texts, first):
            aios.mem.add(text, tags=[f"t{number % 100}"])
        return {}
    call = {"getpid": lambda text: aios.proc.getpid(),
            "get": lambda text: aios.mem.get(note),
            "key": lambda text: aios.mem.get("key"),
            "file": lambda text: aios.sto.read("file"),
            "own": lambda text: aios.mem.get("own"),
            "own file": lambda text: aios.sto.read("own"),
            "other": lambda text: aios.mem.get(next(many)),
            "others": lambda text: aios.sto.read(next(files)),
            "add": lambda text: aios.mem.add(text, tags=["t7"]),
            "search": lambda text: aios.mem.search(text, k=10),
            "filtered": lambda text: aios.mem.search(text, k=10, tags=["t7"])}[what]
    given = {"add": texts, "search": [" ".join(text.split()[:3]) for text in texts]}
    before = {"own": lambda text: aios.mem.add(text_of(next(fresh)), key="own"),
              "own file": lambda text: aios.sto.write("own", text_of(next(fresh)).encode())}.get(what)
    took = []
    for text in given.get("search" if what == "filtered" else what, [""] * calls):
        if before is not None:
            before(text)
        began = time.perf_counter()
        call(text)
        took.append((time.perf_counter() - began) * 1e6)
    return {"took": took}
note = aios.mem.add(text_of(0), key="key")
aios.sto.write("file", text_of(0).encode())
fresh = itertools.count()
many = itertools.cycle([aios.mem.add(text_of(number)) for number in range(100)])
files = itertools.cycle([aios.sto.write(f"file{number}", text_of(number).encode()).path for number in range(100)])
serve(run)
"""
)


# ── SQLite alone ──────────────────────────────────────────────────────────────────────────────────────────


def text() -> str:
    return "".join(random.choices("abcdefghij ", k=1024))


def connect(path: Path) -> Any:
    import apsw

    db = apsw.Connection(str(path))
    db.set_busy_timeout(60_000)
    db.pragma("journal_mode", "WAL")
    db.pragma("synchronous", "FULL")
    db.execute("CREATE TABLE IF NOT EXISTS notes(id INTEGER PRIMARY KEY, text TEXT)")
    return db


SLOWER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define SLOWER(name) int name(int fd) { \
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, #name); \
    usleep(SLEEP_US); \
    return real(fd); }
SLOWER(fsync)
SLOWER(fdatasync)
"""


def slow_down(milliseconds: float) -> None:
    """Execute this program again, with a slower disk."""
    folder = Path(tempfile.mkdtemp(prefix="aios-slower-"))
    (folder / "slower.c").write_text(SLOWER)
    out = folder / "slower.so"
    argv = ["cc", "-shared", "-fPIC", "-O2", f"-DSLEEP_US={milliseconds * 1000:.0f}", "-o", str(out)]
    subprocess.run([*argv, str(folder / "slower.c"), "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(out)})


def sync_us(folder: Path) -> list[float]:
    """Microseconds of `fdatasync` after 4 KB were overwritten."""
    took = []
    with open(folder / "sync", "w+b", buffering=0) as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
        for number in range(300):
            os.pwrite(file.fileno(), os.urandom(4096), number * 4096 % (1 << 20))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - began) * 1e6)
    return took


def sqlite_alone(folder: Path, writes: int, warm: bool) -> float:
    """Durable writes per second of one process that commits each by itself."""
    db = connect(folder / "alone.db")
    if warm:
        with db:
            db.execute("INSERT INTO notes(text) VALUES(?)", ("x" * (8 << 20),))
        db.execute("DELETE FROM notes")
        db.pragma("wal_checkpoint(RESTART)")
    texts = [text() for _ in range(writes)]
    began = time.monotonic()
    for one in texts:
        db.execute("INSERT INTO notes(text) VALUES(?)", (one,))
    took = time.monotonic() - began
    db.close()
    return writes / took


PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from benchmarks.store import connect, text
db = connect(Path(sys.argv[2]))
texts = [text() for _ in range(int(sys.argv[3]))]
print("ready", flush=True)
sys.stdin.readline()
for one in texts:
    db.execute("INSERT INTO notes(text) VALUES(?)", (one,))
print(time.monotonic(), flush=True)
"""


def sqlite_together(folder: Path, processes: int, writes: int) -> float:
    """The same by many processes at once, each with a connection of its own."""
    connect(folder / "together.db").close()
    argv = [sys.executable, "-c", PROCESS, str(ROOT), str(folder / "together.db"), str(writes)]
    running = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for one in running:
        assert one.stdout is not None
        one.stdout.readline()
    began = time.monotonic()
    for one in running:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    ended = max(float(one.communicate()[0]) for one in running)
    return processes * writes / (ended - began)


# ── aiosd ─────────────────────────────────────────────────────────────────────────────────────────────────


def reading(system: Aiosd, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Durations in µs, and their ratios to getpid."""
    (agent,) = system.start(1, SCRIPT, options=("--name", "reader"))
    took: dict[str, list[list[float]]] = {what: [] for what in READS}
    for what in took:
        race([agent], [{"what": what, "calls": 300}])
    for number in range(rounds):
        order = list(took)
        random.Random(number).shuffle(order)
        for what in order:
            count = min(calls, 500) if what in OWN else calls  # because each waits for a durable write, too
            took[what].append(race([agent], [{"what": what, "calls": count}])[0]["took"])
    base = [statistics.median(one) for one in took["getpid"]]
    found = {}
    for what, all_rounds in took.items():
        ratios = [statistics.median(one) / other for one, other in zip(all_rounds, base, strict=True)]
        flat = [value for one in all_rounds for value in one]
        found[what] = {
            "p50": statistics.median(flat),
            "p99": percentile(flat, 0.99),
            "ratio": statistics.median(ratios),
        }
    return found


def writing(system: Aiosd, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Durable writes per second, for each kind and round."""
    agents = system.start(options.agents, SCRIPT)
    through_aiosd(agents, 5, 0)
    found: dict[str, list[float]] = {"aiosd": [], "new": [], "warm": [], "together": [], "reads": []}
    for number in range(options.rounds):
        scratch = folder / f"round-{number}"
        for name in ("new", "warm", "together"):
            (scratch / name).mkdir(parents=True)
        sides = {
            "aiosd": lambda number=number: through_aiosd(agents, options.writes, number),
            "new": lambda scratch=scratch: sqlite_alone(scratch / "new", options.alone, warm=False),
            "warm": lambda scratch=scratch: sqlite_alone(scratch / "warm", options.alone, warm=True),
            "together": lambda scratch=scratch: sqlite_together(
                scratch / "together", options.agents, max(3, options.alone // options.agents)
            ),
            "reads": lambda: through_aiosd(agents, options.writes, 0, "get"),
        }
        for name in random.Random(number).sample(list(sides), len(sides)):
            found[name].append(sides[name]())
    found["with words"] = [with_words(system, agents, options.writes, options.rounds)]
    return found


def through_aiosd(agents: list[Any], calls: int, number: int, what: str = "write") -> float:
    """Calls per second of all agents together."""
    if what == "write":
        race(agents, orders("prepare", len(agents), calls, number))
    return len(agents) * calls / makespan(race(agents, orders(what, len(agents), calls, number)))


def orders(what: str, agents: int, calls: int, number: int) -> list[dict[str, Any]]:
    return [{"what": what, "calls": calls, "first": (number * agents + place) * calls} for place in range(agents)]


def with_words(system: Aiosd, agents: list[Any], calls: int, number: int) -> float:
    """Notes per second, until the words of all are indexed."""
    race(agents, orders("prepare", len(agents), calls, number))
    began = time.monotonic()
    race(agents, orders("write", len(agents), calls, number))
    while store_stats(system)["wordless"]:
        time.sleep(0.01)
    return len(agents) * calls / (time.monotonic() - began)


def store_stats(system: Aiosd) -> dict[str, Any]:
    return dict(next(one for one in system.status()["services"] if one["name"] == "store")["stats"])


def as_chroma(system: Aiosd, notes: int) -> dict[str, float]:
    """The same operations as of chromadb, with searches by words, in ms."""
    (agent,) = system.start(1, SCRIPT, options=("--name", "many"))

    def took(what: str, calls: int, first: int) -> list[float]:
        order = {"what": what, "calls": calls, "first": first}
        race([agent], [order | {"what": "prepare"}])
        return race([agent], [order])[0].get("took", [])

    took("write", notes, 1_000_000)
    found = {"add": statistics.median(took("add", 200, 2_000_000)) / 1e3}
    for what in ("search", "filtered"):
        found[what] = statistics.median(took(what, 100, 1_000_100)) / 1e3
    store = next(int(process["ospid"]) for process in system.processes() if process["name"] == "store")
    began = time.monotonic()
    os.kill(store, signal.SIGKILL)
    took("search", 1, 1_000_100)
    return found | {"reopen": (time.monotonic() - began) * 1e3}


# ── chromadb ──────────────────────────────────────────────────────────────────────────────────────────────

CHROMA = """
import json, random, statistics, sys, time
import chromadb, numpy
from chromadb.config import Settings
notes, folder = int(sys.argv[1]), sys.argv[2]
vectors = numpy.random.default_rng(1).standard_normal((notes + 400, 384), dtype="float32")
vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
def meta(i): return {"tag": f"t{i % 100}"}
def open_():
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    return client.get_or_create_collection("notes", embedding_function=None)
made = open_()
for i in range(0, notes, 1000):
    made.add(ids=[str(j) for j in range(i, i + 1000)], embeddings=vectors[i:i + 1000], documents=["x" * 1024] * 1000,
             metadatas=[meta(j) for j in range(i, i + 1000)])
def timed(call, numbers):
    took = []
    for i in numbers:
        began = time.perf_counter()
        call(i)
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)
found = {
    "add": timed(lambda i: made.add(ids=[str(i)], embeddings=[vectors[i]], documents=["x" * 1024], metadatas=[meta(i)]),
                 range(notes, notes + 200)),
    "search": timed(lambda i: made.query(query_embeddings=[vectors[i]], n_results=10), range(100)),
    "filtered": timed(lambda i: made.query(query_embeddings=[vectors[i]], n_results=10, where={"tag": "t7"}),
                      range(100)),
}
print(json.dumps(found))
"""

REOPEN = """
import sys, time
import chromadb, numpy
from chromadb.config import Settings
vector = numpy.random.default_rng(1).standard_normal(384, dtype="float32")
began = time.monotonic()
client = chromadb.PersistentClient(sys.argv[1], settings=Settings(anonymized_telemetry=False))
client.get_collection("notes", embedding_function=None).query(query_embeddings=[vector], n_results=10)
print((time.monotonic() - began) * 1e3)
"""


def chroma(python: str, notes: int, folder: Path) -> dict[str, float]:
    """The operations of chromadb, in ms."""
    done = subprocess.run([python, "-c", CHROMA, str(notes), str(folder)], capture_output=True, text=True, check=True)
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    again = subprocess.run([python, "-c", REOPEN, str(folder)], capture_output=True, text=True, check=True)
    return found | {"reopen": float(again.stdout.splitlines()[-1])}


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def show(reads: dict[str, Any], writes: dict[str, list[float]], peers: dict[str, Any], agents: int) -> list[str]:
    """Print the tables; returns the bars that were missed."""
    missed = []
    print(f"{'one agent, µs':48}{'p50':>8}{'p99':>9}{'× getpid':>11}")
    for what, row in reads.items():
        bar = READ_BAR if what in KEPT else None
        word = verdict(row["ratio"], bar)
        print(f"{READS[what]:48}{row['p50']:8.1f}{row['p99']:9.1f}{row['ratio']:11.2f}  {word}")
        missed += [what] if word == "MISSED" else []
    print(f"\n{'durable writes of 1 KB a second':48}{'median':>8}{'worst':>8}{'best':>8}{'aiosd ×':>9}")
    names = {
        "aiosd": f"aiosd, {agents} agents",
        "new": "SQLite, a commit each",
        "warm": "SQLite, a commit each, its WAL at full size",
        "together": f"SQLite, {agents} processes",
        "reads": f"aiosd, {agents} agents that read, no disk",
        "with words": "aiosd, until their words are indexed, too",
    }
    for name, values in writes.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(writes["aiosd"], values, strict=False))
        bar = WRITE_BAR if name == "warm" else None
        word = verdict(ratio, bar, at_least=True)
        row = f"{names[name]:48}{statistics.median(values):8.0f}{min(values):8.0f}{max(values):8.0f}"
        print(row + ("" if name == "aiosd" else f"{ratio:9.1f}  {word}"))
        missed += [name] if word == "MISSED" else []
    if peers:
        print(f"\n{'ms':24}" + "".join(f"{what:>10}" for what in next(iter(peers.values()))))
        for name, row in peers.items():
            print(f"{name:24}" + "".join(f"{value:10.2f}" for value in row.values()))
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000, help="calls of each kind in a round, by one agent")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--writes", type=int, default=100, help="writes of each agent in a round")
    parser.add_argument("--alone", type=int, default=400, help="writes of SQLite in a round")
    parser.add_argument("--notes", type=int, default=10_000, help="compared with chromadb; 0: leave this out")
    parser.add_argument("--chroma", metavar="PYTHON", default=chroma_there(), help="an interpreter with chromadb")
    parser.add_argument("--sync-ms", type=float, default=0.0, help="make each wait for the disk longer by this")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.sync_ms and "LD_PRELOAD" not in os.environ:
        slow_down(options.sync_ms)
    if options.folder:
        tempfile.tempdir = str(options.folder)
    with tempfile.TemporaryDirectory(prefix="aios-store-") as scratch:
        disk = sync_us(Path(scratch))
        with Aiosd(model_path("nano"), "--threads", "1", "--note-quota", "1G") as system:
            reads = reading(system, options.rounds, options.calls)
            writes = writing(system, Path(scratch), options)
            stats = store_stats(system)
            peers = {"aiosd, by words": as_chroma(system, options.notes)} if options.notes else {}
        if options.notes and options.chroma:
            peers["chromadb, by vectors"] = chroma(options.chroma, options.notes, Path(scratch) / "chroma")
        elif options.notes:
            print("chromadb is left out: `make chroma` installs it\n")
    missed = show(reads, writes, peers, options.agents)
    print(f"\ncalls in a commit: {stats['calls'] / max(1, stats['commits']):.1f}")
    print(f"fdatasync, µs: p50 {statistics.median(disk):.0f}, p99 {percentile(disk, 0.99):.0f}")
    rows = [{"reading": what, **row} for what, row in reads.items()]
    rows += [{"writing": name, "per_s": values} for name, values in writes.items()]
    rows += [{"peer": name, "ms": row} for name, row in peers.items()]
    about = {"agents": options.agents, "notes": options.notes, "sync_us": statistics.median(disk)}
    write("store", rows, options.out, missed=missed, **about)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
