#!/usr/bin/env python
"""Kills parts of the system at random moments while agents write; then checks each acknowledged write.

    $ python benchmarks/crash.py --kills 500 --seed 1
    killed                    number   without answers (s): p50     max
    store                        296                       0.21    0.84
    …
    acknowledged writes        48211
    lost 0, doubled 0, torn 0, removed and still there 0

Each agent adds notes (most of them several at a time), updates one note with a counter, and removes its oldest notes.
In a journal of its own it records each write before it starts, and again when it is acknowledged. A write that was
under way when everything died may have been done or not, but never twice and never in part. The text of a note follows
from its number, so a torn one is detected. The version of the note with the counter must be the number of updates.

A kill is drawn from the seed: of the store, the kernel, both at once, or everything (supervisor and guardian), after
which the system and its agents are started again, under the same names. At the end the system is stopped, `aiosd fsck`
must find nothing, and `aiosd export` is compared with the agents' journals.

A call that was under way at several deaths gets EIO by design; it is counted as given up, and its result as unknown.

Agents run without a sandbox. Results go to benchmarks/results/crash.json. Exit status 1 when anything is wrong.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

AT_ONCE = 4  # notes that an agent adds at a time
KEPT = 100  # notes that an agent keeps; older ones are removed
BOOT_S, PATIENCE_S = 120.0, 60.0
TARGETS = {"store": 60, "kernel": 20, "store and kernel": 15, "everything": 5}  # percent of the kills


# ── an agent ──────────────────────────────────────────────────────────────────────────────────────────────


def text_of(agent: int, number: int) -> str:
    body = f"{agent}:{number}:" + f"{number * 7919 % 100_003} " * (10 + number * 31 % 300)
    return f"{body}{zlib.crc32(body.encode())}"


def act(agent: int, folder: Path) -> None:
    """Write until the file `stop` exists. `journal`: gets a line before each write, and one after its answer."""
    from libaios.agent import connection
    from libaios.wire import MemAdd, MemGet, MemUpdate, Sys

    conn, journal = connection(), Journal(folder / f"agent-{agent}")
    counter = journal.counter(lambda: conn.call(Sys.MEM_ADD, MemAdd("0", key="counter"), int))
    stop, mine = folder / "stop", list(journal.last_ids)
    while not stop.exists():
        numbers = [journal.begin("add") for _ in range(AT_ONCE)]
        calls = [conn.submit(Sys.MEM_ADD, MemAdd(text_of(agent, number))) for number in numbers]
        for number, call in zip(numbers, calls, strict=True):
            note = journal.end("add", number, lambda call=call: conn.result(call, int))
            mine += [] if note is None else [note]
        number = journal.begin("update")
        journal.end(
            "update", number, lambda number=number: conn.call(Sys.MEM_UPDATE, MemUpdate(counter, str(number)), int)
        )
        while len(mine) > KEPT and not stop.exists():
            number = journal.begin("remove", gone := mine.pop(0))
            journal.end("remove", number, lambda gone=gone: conn.call(Sys.MEM_REMOVE, MemGet(gone), None))


class Journal:
    """Lines `begin KIND NUMBER [NOTE]`, `end KIND NUMBER RESULT` and `lost KIND NUMBER`."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line.split() for line in lines if line.endswith(".")]
        self._number = max((int(words[2]) for words in whole), default=0)
        self.last_ids = [int(words[3]) for words in whole if words[:2] == ["end", "add"]][-AT_ONCE:]
        gone = {int(words[3]) for words in whole if words[:2] == ["begin", "remove"]}
        self.last_ids = [note for note in self.last_ids if note not in gone]
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open until the agent's end

    def _line(self, *words: object) -> None:
        self._file.write((" ".join(map(str, words)) + " .\n").encode())

    def counter(self, make: Any) -> int:
        """The id of the note with the counter. `make` adds it with the same key at each start of the agent, which is an
        update of it from the second time on."""
        number = self.begin("update")
        note = self.end("update", number, make)
        assert note is not None
        return int(note)

    def begin(self, kind: str, *also: object) -> int:
        self._number += 1
        self._line("begin", kind, self._number, *also)
        return self._number

    def end(self, kind: str, number: int, do: Any) -> Any:
        try:
            result = do()
        except OSError as err:
            self._line("lost", kind, number, err.errno)
            return None
        self._line("end", kind, number, result if result is not None else 0)
        return result


# ── the system ────────────────────────────────────────────────────────────────────────────────────────────


class System:
    def __init__(self, folder: Path) -> None:
        self.home, self.folder = folder / "home", folder
        os.environ["AIOS_HOME"] = str(self.home)
        self.home.mkdir(exist_ok=True)
        self.log = folder / "stderr"

    def start(self, agents: int) -> None:
        with open(self.log, "ab") as log:
            began = log.tell()
            argv = [sys.executable, str(ROOT / "bin" / "aiosd"), "--threads", "1", "--sandbox", "none"]
            self.daemon = subprocess.Popen(argv, stderr=log, start_new_session=True)
        if not eventually(lambda: b"aiosd: ready" in self.log.read_bytes()[began:], BOOT_S):
            raise SystemExit(f"aiosd did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
        for agent in range(agents):
            self._spawn(agent)

    def _spawn(self, agent: int) -> None:
        from libaios import wire
        from libaios.client import Client

        args = ["--agent", str(agent), str(self.folder)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        spec = wire.Spawn("file", __file__, args, env, str(ROOT), name=f"w{agent}", detached=True)
        with Client() as client:
            client.call(wire.Sys.SPAWN, spec, wire.Spawned, timeout=PATIENCE_S)

    def part(self, name: str) -> int:
        """The Linux pid of a part; 0: it does not run. It comes from /proc, because the kernel may be dead."""
        for supervisor in children(self.daemon.pid):
            if name == "supervisor":
                return supervisor
            for child in children(supervisor):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == f"aios:{name}":
                        return child
        return 0

    def kill(self, what: str) -> None:
        names = {"store": ["store"], "kernel": ["kernel"], "store and kernel": ["store", "kernel"]}
        targets = [eventually(lambda name=name: self.part(name), BOOT_S) for name in names.get(what, ["supervisor"])]
        if what == "everything":
            targets.append(self.daemon.pid)
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)
        if what == "everything":
            self.daemon.wait()
            eventually(lambda: not left(self.home), PATIENCE_S)

    def stop(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(PATIENCE_S)

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "bin" / "aiosd"), *argv], capture_output=True, text=True)


def children(ospid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{ospid}/task/{ospid}/children").read_text().split()]
    return []


def left(home: Path) -> list[int]:
    """Processes of this system that are left."""
    mark, found = f"AIOS_HOME={home}".encode(), []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            own = entry == str(os.getpid())
            if not own and entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def eventually(holds: Any, timeout: float) -> Any:
    end = time.monotonic() + timeout
    while not (value := holds()) and time.monotonic() < end:
        time.sleep(0.01)
    return value


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def storm(options: argparse.Namespace, system: System) -> list[tuple[str, float]]:
    """The kills, each with the time until the agents got answers again."""
    draw, done = random.Random(options.seed), []
    for number in range(options.kills):
        before = progress(system.folder)
        what = draw.choices(list(TARGETS), list(TARGETS.values()))[0]
        eventually(lambda before=before: progress(system.folder) > before, PATIENCE_S)
        time.sleep(draw.uniform(0, options.gap))
        began, before = time.monotonic(), progress(system.folder)
        system.kill(what)
        if what == "everything":
            system.start(options.agents)
        if not eventually(lambda before=before: progress(system.folder) > before, PATIENCE_S):
            raise SystemExit(f"no answers for {PATIENCE_S:g} s after kill {number} ({what})")
        done.append((what, time.monotonic() - began))
    return done


def progress(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("agent-*"))


def verify(folder: Path, agents: int, rows: list[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    """Compare the agents' journals with the content of the store."""
    found: dict[str, Any] = {"acknowledged": 0, "lost": [], "doubled": [], "torn": [], "still_there": [], "given_up": 0}
    for agent in range(agents):
        own = [row for row in rows if names[row["owner"]].endswith(f"/w{agent}")]
        _verify_one(agent, (folder / f"agent-{agent}").read_text(), own, found)
    return found


def _verify_one(agent: int, journal: str, rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    lines = [line.split() for line in journal.splitlines() if line.endswith(".")]
    begun = {(words[1], int(words[2])): words for words in lines if words[0] == "begin"}
    ended = {(words[1], int(words[2])): int(words[3]) for words in lines if words[0] == "end"}
    found["acknowledged"] += len(ended)
    failed = [words for words in lines if words[0] == "lost"]
    found["given_up"] += sum(int(words[3]) == errno.EIO for words in failed)
    known = (errno.EIO, errno.ENOTCONN)  # the system has ended, and the agent is about to
    found["lost"] += [f"w{agent}: {' '.join(words)}" for words in failed if int(words[3]) not in known]
    maybe_gone = {int(words[3]) for (kind, _), words in begun.items() if kind == "remove"}
    gone = {int(begun[key][3]) for key in ended if key[0] == "remove"}
    notes = [row for row in rows if row["key"] is None]
    copies = Counter(row["text"] for row in notes)
    ids = {row["id"]: row["text"] for row in notes}
    for (kind, number), note in ended.items():
        if kind == "add" and note not in maybe_gone and ids.get(note) != text_of(agent, number):
            found["lost"].append(f"w{agent}: note {note} of write {number}")
    expected = {text_of(agent, number) for kind, number in begun if kind == "add"}
    found["doubled"] += [f"w{agent}: {text[:30]!r}" for text, number in copies.items() if number > 1]
    found["torn"] += [f"w{agent}: {text[:30]!r}" for text in copies if text not in expected]
    found["still_there"] += [f"w{agent}: note {note}" for note in gone if note in ids]
    versions = [row["version"] for row in rows if row["key"] == "counter"]
    least = sum(kind == "update" for kind, _ in ended)
    most = sum(kind == "update" for kind, _ in begun)
    if len(versions) != 1 or versions[0] < least:
        found["lost"].append(f"w{agent}: the counter has {versions}, {least} updates were acknowledged")
    elif versions[0] > most:
        found["doubled"].append(f"w{agent}: the counter has {versions}, {most} updates were begun")


def read_export(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    with tarfile.open(path) as tar:
        notes, owners = (
            [json.loads(line) for line in tar.extractfile(f"{name}.jsonl") or []] for name in ("notes", "owners")
        )
    return notes, {owner["id"]: owner["name"] for owner in owners}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    system = System(folder)
    system.start(options.agents)
    try:
        kills = storm(options, system)
        (folder / "stop").touch()
        eventually(lambda: not any(b"crash.py" in command(pid) for pid in left(system.home)), PATIENCE_S)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            system.stop()
    checked = system.command("fsck")
    system.command("export", str(folder / "export.tar"))
    found = verify(folder, options.agents, *read_export(folder / "export.tar"))
    found["fsck"] = [] if checked.returncode == 0 else (checked.stdout + checked.stderr).splitlines()
    log = system.log.read_text(errors="replace")
    found["tracebacks"] = tracebacks(log)
    found["kills"] = {
        what: {
            "number": len(took := [seconds for kind, seconds in kills if kind == what]),
            "p50_s": statistics.median(took) if took else 0.0,
            "max_s": max(took, default=0.0),
        }
        for what in TARGETS
    }
    if options.log:
        options.log.write_text(log)
    return found


def tracebacks(log: str) -> list[str]:
    """The tracebacks in the log, each with its error and the line before it, which names the process."""
    return re.findall(r"^.*\n?Traceback \(most recent call last\):\n(?:[ \t].*\n)*.*$", log, re.MULTILINE)


def command(ospid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{ospid}/cmdline").read_bytes()
    return b""


def show(found: dict[str, Any]) -> int:
    """Print the table; returns the number of failures."""
    print(f"{'killed':24}{'number':>8}{'without answers, s: p50':>28}{'max':>8}")
    for what, row in found["kills"].items():
        print(f"{what:24}{row['number']:8}{row['p50_s']:28.2f}{row['max_s']:8.2f}")
    print(f"\nacknowledged writes {found['acknowledged']}, given up with EIO by design {found['given_up']}")
    bad = 0
    for what in ("lost", "doubled", "torn", "still_there", "fsck", "tracebacks"):
        print(f"{what.replace('_', ' '):20}{len(found[what]):8}")
        for line in found[what][:5]:
            print(textwrap.indent(line, "    "))
        bad += len(found[what])
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--gap", type=float, default=0.3, help="longest wait before a kill, seconds")
    parser.add_argument("--log", type=Path, help="keep the log of aiosd here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--agent", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agent:
        act(int(options.agent[0]), Path(options.agent[1]))
        return
    from benchmarks import harness

    print(f"seed {options.seed}, {options.agents} agents, {options.kills} kills\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="aios-", dir="/var/tmp") as folder:  # a disk, not memory
        found = run(options, Path(folder))
    bad = show(found)
    settings = {name: getattr(options, name) for name in ("seed", "agents", "gap")}
    harness.write(
        "crash", [{"killed": what, **row} for what, row in found.pop("kills").items()], options.out, **settings, **found
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
