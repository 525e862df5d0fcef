#!/usr/bin/env python
"""Kills and stops parts of the system at random moments, while fifty agents work and check their results.

    $ python benchmarks/chaos.py --faults 1000 --seed 1 --exact
    fault                 number   pause of calls (s)    of streams (s)
                                     p50      max          p50      max
    kernel killed            312     0.14     0.41         0.15     0.63
    …

Agents generate, stream, send messages and spawn, and check all results: texts (with --exact they must equal those
generated before any fault; without it a stream's text must be the text of its tokens, and none may be missing), the
order of messages, and that each child ran once and ended with the right status. Others only call getpid, to measure
pauses. Victims are agents that exist to be killed; and there are attached `aios-run` commands. All run without a
sandbox, because they write their records into one folder.

A fault is drawn from the seed: `kill -9` or SIGSTOP of the kernel, the LLM core, a victim, or an aios-run. After most
faults the books are checked (`aiosd status --check`); the others are followed by the next fault at once. Deaths of the
whole system (supervisor, guardian) have rounds of their own (--rounds): agents with detached descendants that ignore
signals are started, then the supervisor or guardian is killed or stopped. Ten seconds later no process may be left, and
aiosd must start again.

A kernel or core that is stopped is detected after five seconds without a heartbeat; --hangs is the share of such faults
among those on these two. A generation that was running at two deaths of its core gets EIO by design; such calls are
counted as poisoned, and made again.

Results go to benchmarks/results/chaos.json. Exit status 1: a process was harmed that no fault was aimed at, or a result
was wrong.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPTS = ["Once", "The", "Remember that", "What is", "In the", "I think", "Write", "Please"]
TEMPERATURE = 0.9
END = "<|im_end|>"
GAP_S = 0.03  # shorter gaps are not recorded
MOMENT_S = 0.3  # about the time between two pieces of a stream when all agents are busy
PATIENCE_S = 60.0
MARK = "AIOSD_CHAOS"


# ── inside agents ─────────────────────────────────────────────────────────────────────────────────────────


class Worker:
    """One agent: it works until the file `stop` exists, and writes a report."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.chance = random.Random(number)
        self.found: dict[str, Any] = {"done": 0, "wrong": [], "poisoned": 0, "gaps": []}
        self._since = time.monotonic()

    def on(self) -> bool:
        return not (self.folder / "stop").exists()

    def begin(self) -> None:
        self._since = time.monotonic()

    def beat(self) -> None:
        """A result has arrived; record the time since the last one if it was long."""
        now = time.monotonic()
        if now - self._since > GAP_S:
            self.found["gaps"].append((self._since, now))
        self._since = now

    def wrong(self, what: str) -> None:
        self.found["wrong"].append(what)

    def report(self) -> None:
        path = self.folder / f"report-{self.number}"
        path.with_suffix(".new").write_text(json.dumps(self.found))
        path.with_suffix(".new").rename(path)

    # the kinds of agents

    def task(self) -> tuple[int, dict[str, Any], str | None]:
        reference = json.loads((self.folder / "reference").read_text())
        number = self.chance.randrange(len(reference["tasks"]))
        task = reference["tasks"][number]
        return number, task["options"] | {"prompt": task["prompt"]}, task["text"] if reference["exact"] else None

    def generate(self) -> None:
        import libaios as aios

        while self.on():
            number, options, expected = self.task()
            try:
                result = aios.llm.complete(**options)
            except OSError as err:
                self.poisoned(err)
                continue
            self.check(number, result.text, result.tokens, result.usage, options, expected)

    def stream(self) -> None:
        import libaios as aios

        while self.on():
            number, options, expected = self.task()
            text, tokens, usage = "", [], None
            try:
                for piece in aios.llm.complete(**options, stream=True):
                    if text:
                        self.beat()
                    else:
                        self.begin()
                    text += piece.text
                    tokens += piece.tokens
                    usage = piece.usage
            except OSError as err:
                self.poisoned(err)
                continue
            self.check(number, text, tokens, usage, options, expected)

    def check(
        self, number: int, text: str, tokens: list[int], usage: Any, options: dict[str, Any], expected: str | None
    ) -> None:
        import libaios as aios

        self.found["done"] += 1
        if expected is not None and text != expected:
            self.wrong(f"task {number}: {text!r} instead of {expected!r}")
        if not len(tokens) == usage.completion_tokens == options["max_tokens"]:
            self.wrong(f"task {number}: {len(tokens)} tokens, {usage.completion_tokens} in the books")
        spelled = aios.llm.detokenize(tokens).replace(END, "")  # it has no text
        if spelled != text:
            self.wrong(f"task {number}: {text!r} is not the text of its tokens, {spelled!r}")

    def poisoned(self, err: OSError) -> None:
        if err.errno != errno.EIO or "died twice" not in str(err):
            raise err
        self.found["poisoned"] += 1

    def send(self, peer: int) -> None:
        """Send messages in bursts; the peer acknowledges each burst."""
        import libaios as aios

        number = 0
        while self.on():
            for _ in range(20):
                aios.msg.send(peer, number)
                number += 1
            sender, seen = aios.msg.recv()
            if (sender, seen) != (peer, number):
                self.wrong(f"acknowledged {seen} by {sender} instead of {number} by {peer}")
            self.found["done"] += 20
        aios.msg.send(peer, None)

    def receive(self) -> None:
        import libaios as aios

        expected = 0
        while True:
            sender, number = aios.msg.recv()
            if number is None:
                return
            if number != expected:
                self.wrong(f"message {number} instead of {expected}")
            expected = number + 1
            self.found["done"] += 1
            if expected % 20 == 0:
                aios.msg.send(sender, expected)

    def spawn(self) -> None:
        """Spawn children that write a line: each must run once, and its status must be returned once."""
        import libaios as aios

        book = self.folder / f"children-{self.number}"
        while self.on():
            code, number = self.chance.randrange(100), self.found["done"]
            pid = aios.proc.spawn("sh", "-c", f"echo {number} >> {book}; exit {code}")
            if (ended := aios.proc.wait(pid)) != (pid, code):
                self.wrong(f"child {number}: {ended} instead of {(pid, code)}")
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                self.wrong(f"child {number}: collected twice: {aios.proc.wait(pid)}")
            self.found["done"] += 1
        lines = list(map(int, book.read_text().split()))
        if lines != list(range(self.found["done"])):
            self.wrong(f"children that ran: {len(lines)}, twice: {[n for n, k in Counter(lines).items() if k > 1]}")

    def probe(self) -> None:
        import libaios as aios

        me = aios.proc.getpid()
        self.begin()
        while self.on():
            if aios.proc.getpid() != me:
                self.wrong("another pid")
            self.beat()
            self.found["done"] += 1
            time.sleep(0.002)
            self.begin()

    def idle(self) -> None:
        """A victim: it generates all the time."""
        import libaios as aios

        while True:
            with contextlib.suppress(OSError):
                aios.llm.complete("Once", max_tokens=100, ignore_eos=True)


def act(kind: str, number: int, folder: Path, rest: list[str]) -> None:
    worker = Worker(folder, number)
    getattr(worker, kind)(*map(int, rest))
    worker.report()


# ── the system ────────────────────────────────────────────────────────────────────────────────────────────


class System:
    def __init__(self, home: str, *options: str) -> None:
        os.environ["AIOS_HOME"] = home
        os.environ["PATH"] = os.pathsep.join([str(ROOT / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        os.environ[MARK] = str(os.getpid())
        self.stderr = Path(home) / "stderr"
        with open(self.stderr, "ab") as log:
            began = log.tell()
            argv = [sys.executable, str(ROOT / "bin" / "aiosd"), "--sandbox", "none", *options]
            self.daemon = subprocess.Popen(argv, stderr=log)

        def ready() -> bool:
            return b"aiosd: ready" in self.stderr.read_bytes()[began:] or self.daemon.poll() is not None

        if not eventually(ready, PATIENCE_S) or self.daemon.poll() is not None:
            raise SystemExit(f"aiosd did not start:\n{self.log()}")

    def log(self) -> str:
        return self.stderr.read_text(errors="replace")

    def part(self, name: str) -> int | None:
        """The Linux pid of one of aiosd's own processes, or None. Read from /proc, because the kernel may be dead."""
        if name == "guardian":
            return self.daemon.pid
        for supervisor in children(self.daemon.pid):
            if name == "supervisor":
                return supervisor
            for child in children(supervisor):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == f"aios:{name}" and not dead(child):
                        return child
        return None

    def stop(self) -> int:
        self.daemon.terminate()
        return self.daemon.wait(PATIENCE_S)


def children(ospid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{ospid}/task/{ospid}/children").read_text().split()]
    return []


def dead(ospid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{ospid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def marked() -> list[int]:
    """All other processes with our mark in their environment: all that were started in a system of this run."""
    mark = f"{MARK}={os.getpid()}".encode()
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            pid = int(entry) if entry.isdigit() else os.getpid()
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found += [] if dead(pid) else [pid]
    return found


def eventually(holds: Any, timeout: float) -> Any:
    end = time.monotonic() + timeout
    while not (value := holds()) and time.monotonic() < end:
        time.sleep(0.01)
    return value


# ── faults of single processes ────────────────────────────────────────────────────────────────────────────


class Storm:
    """The agents, and the faults while they work."""

    def __init__(self, options: argparse.Namespace, folder: Path, running: System) -> None:
        self.options, self.folder, self.running = options, folder, running
        self.chance = random.Random(options.seed)
        self.harmed: list[str] = []
        self.unbalanced: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.workers: dict[int, str] = {}  # by pid: its kind and number
        self.victims: list[int] = []
        self.runs: list[tuple[subprocess.Popen[str], Path]] = []
        self.runs_done = 0

    # the agents

    def prepare(self) -> None:
        """Generate the reference texts, before any fault."""
        import libaios as aios

        tasks = []
        for number in range(16):
            options = {"max_tokens": self.chance.randrange(8, 120), "seed": number, "temperature": TEMPERATURE}
            options["ignore_eos"] = True
            prompt = PROMPTS[number % len(PROMPTS)]
            tasks.append({"prompt": prompt, "options": options, "text": aios.llm.complete(prompt, **options).text})
        (self.folder / "reference").write_text(json.dumps({"tasks": tasks, "exact": self.options.exact}))

    def hire(self, kind: str, *rest: int, name: str = "") -> int:
        import libaios as aios

        number = len(self.workers) + 1
        arguments = ["--agent", kind, str(number), str(self.folder), *map(str, rest)]
        pid: int = aios.proc.spawn(__file__, *arguments, name=name or kind)
        if not name:
            self.workers[pid] = f"{kind} {number}"
        return pid

    def crew(self) -> None:
        count = self.options.agents
        shares = {"generate": 0.32, "stream": 0.24, "spawn": 0.12, "probe": 0.08}
        for kind, share in shares.items():
            for _ in range(max(1, round(count * share))):
                self.hire(kind)
        while len(self.workers) < count:
            self.hire("send", self.hire("receive"))
        self.victims = [self.hire("idle", name="victim") for _ in range(self.options.victims)]
        self.start_runs()

    def start_runs(self) -> None:
        """Start attached commands, whose agent streams a text to stdout and exits with 7."""
        while len(self.runs) < self.options.victims:
            path = self.folder / f"run-{self.runs_done}-{len(self.runs)}-{time.monotonic_ns()}"
            with open(path, "w") as out:
                argv = ["aios-run", "--name", "attached", __file__, "--agent", "attached", "0", str(self.folder)]
                self.runs.append((subprocess.Popen(argv, stdout=out, stdin=subprocess.DEVNULL, text=True), path))

    def look_at_runs(self) -> None:
        """Check the commands that have ended: status 7, and with --exact the right text."""
        for run, path in list(self.runs):
            if run.poll() is None:
                continue
            self.runs.remove((run, path))
            self.runs_done += 1
            task = json.loads((self.folder / "reference").read_text())["tasks"][0]
            text = path.read_text()
            if run.returncode != 7:
                if run.returncode != 8:  # 8: its generation was poisoned
                    self.harmed.append(f"aios-run exited {run.returncode}")
            elif self.options.exact and text != task["text"]:
                self.harmed.append(f"aios-run printed {text!r} instead of {task['text']!r}")
            path.unlink()
        self.start_runs()

    # faults

    def draw(self) -> tuple[str, str]:
        who = self.chance.choices(["kernel", "llm", "agent", "aios-run"], [3, 3, 2, 2])[0]
        if who in ("kernel", "llm"):
            return who, "stopped" if self.chance.random() < self.options.hangs else "killed"
        return who, "stopped" if self.chance.random() < 0.4 else "killed"

    def strike(self) -> None:
        who, how = self.draw()
        if who in ("kernel", "llm"):  # wait for it before the random pause, or the fault would always hit its start
            self.find(who)
        time.sleep(self.chance.uniform(0, self.options.gap))
        strike = {"kernel": self.on_part, "llm": self.on_part, "agent": self.on_agent, "aios-run": self.on_run}[who]
        fault = {"who": who, "how": how, "at": time.monotonic()}
        self.faults.append(fault)
        strike(who, how)
        fault["over"] = time.monotonic()
        self.look_at_runs()
        if self.chance.random() < 0.75:  # otherwise the next fault follows at once
            self.books(fault)

    def find(self, who: str) -> int:
        ospid: int | None = eventually(lambda: self.running.part(who), PATIENCE_S)
        if not ospid:
            raise SystemExit(f"no {who} for {PATIENCE_S:.0f} s:\n{self.running.log()[-3000:]}")
        return ospid

    def on_part(self, who: str, how: str) -> None:
        ospid = self.find(who)
        self.faults[-1]["at"] = time.monotonic()
        os.kill(ospid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        if not eventually(lambda: dead(ospid), 20):
            self.harmed.append(f"{who} was {how} and is still there")

    def on_agent(self, who: str, how: str) -> None:
        import libaios as aios
        from libaios.agent import connection
        from libaios.wire import ProcInfo, Ps, Sys

        victim = self.chance.choice(self.victims)
        rows = connection().call(Sys.PS, Ps(pids=[victim]), list[ProcInfo], timeout=PATIENCE_S)
        if len(rows) != 1:
            self.harmed.append(f"victim {victim} is not in the process table")
            self.victims.remove(victim)
            self.victims.append(self.hire("idle", name="victim"))
            return
        self.faults[-1]["at"] = time.monotonic()
        if how == "stopped":
            os.kill(rows[0].ospid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, 0.2))
            os.kill(rows[0].ospid, signal.SIGCONT)
            return
        os.kill(rows[0].ospid, signal.SIGKILL)
        if (ended := aios.proc.wait(victim, timeout=PATIENCE_S)) != (victim, -signal.SIGKILL):
            self.harmed.append(f"victim {victim}: {ended}")
        self.victims.remove(victim)
        self.victims.append(self.hire("idle", name="victim"))

    def on_run(self, who: str, how: str) -> None:
        run, path = self.chance.choice(self.runs)
        if how == "stopped":
            os.kill(run.pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, 0.2))
            os.kill(run.pid, signal.SIGCONT)
            return
        os.kill(run.pid, signal.SIGKILL)
        if run.wait() != -signal.SIGKILL:  # it had ended before the kill
            return
        self.runs.remove((run, path))

    def books(self, fault: dict[str, Any]) -> None:
        """The books must balance, within three seconds: calls may still be on their way."""
        from libaios.agent import connection
        from libaios.wire import Status, Sys

        end = time.monotonic() + 3.0
        while True:
            status = connection().call(Sys.STATUS, Status(check=True), dict[str, Any], timeout=PATIENCE_S)
            if not status["check"]:
                return
            if time.monotonic() > end:
                self.unbalanced += [f"after {fault['who']} {fault['how']}: {line}" for line in status["check"]]
                return
            time.sleep(0.05)

    # the end

    def end(self) -> dict[str, Any]:
        import libaios as aios

        for run, path in self.runs:
            self.finish_run(run, path)
        (self.folder / "stop").touch()
        reports = {}
        for pid, what in self.workers.items():
            try:
                _, status = aios.proc.wait(pid, timeout=PATIENCE_S)
            except TimeoutError:
                self.harmed.append(f"{what} ({pid}): a call never came back")
                continue
            except OSError as err:
                self.harmed.append(f"{what} ({pid}): {err}")
                continue
            if status:
                log = Path(os.environ["AIOS_HOME"], "logs", f"{pid}.log")
                tail = log.read_text(errors="replace")[-600:] if log.exists() else "no log"
                self.harmed.append(f"{what} ({pid}) ended with {status}: {tail}")
                continue
            number = what.split()[1]
            reports[what] = json.loads((self.folder / f"report-{number}").read_text())
        for victim in self.victims:
            aios.proc.kill(victim, signal.SIGKILL)
            if aios.proc.wait(victim, timeout=PATIENCE_S) != (victim, -signal.SIGKILL):
                self.harmed.append(f"victim {victim} had ended by itself")
        self.books({"who": "nobody", "how": "at the end"})
        return self.summary(reports)

    def finish_run(self, run: subprocess.Popen[str], path: Path) -> None:
        try:
            run.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.harmed.append("aios-run: never came back")
            run.kill()
            run.wait()
        if run.returncode not in (7, 8):
            self.harmed.append(f"aios-run exited {run.returncode}")

    def summary(self, reports: dict[str, Any]) -> dict[str, Any]:
        wrong = [f"{what}: {line}" for what, report in reports.items() for line in report["wrong"]]
        done: Counter[str] = Counter()
        for what, report in reports.items():
            done[what.split()[0]] += report["done"]
        gaps = {
            kind: [gap for what, report in reports.items() if what.startswith(kind) for gap in report["gaps"]]
            for kind in ("probe", "stream")
        }
        kinds: dict[str, dict[str, Any]] = {}
        for kind in sorted({f"{fault['who']} {fault['how']}" for fault in self.faults}):
            of_kind = [fault for fault in self.faults if f"{fault['who']} {fault['how']}" == kind]
            pauses = {side: [pause(fault, gaps[side]) for fault in of_kind] for side in gaps}
            kinds[kind] = {
                "number": len(of_kind),
                **{f"{side}_p50_s": statistics.median(values) for side, values in pauses.items()},
                **{f"{side}_max_s": max(values) for side, values in pauses.items()},
            }
        texts = [line for line in wrong if "task" in line]
        return {
            "faults": len(self.faults),
            "kinds": kinds,
            "done": dict(done),
            "poisoned": sum(report["poisoned"] for report in reports.values()),
            "runs_done": self.runs_done,
            "harmed": self.harmed,
            "wrong_texts": texts,
            "lost_or_doubled": [line for line in wrong if line not in texts],
            "unbalanced": self.unbalanced,
        }


def pause(fault: dict[str, Any], gaps: list[tuple[float, float]]) -> float:
    """The longest gap that a fault has caused: one that began at most MOMENT_S before it, or while it lasted. (A gap
    that began earlier was caused by another fault.)"""
    began = [(begin, end) for begin, end in gaps if fault["at"] - MOMENT_S <= begin <= fault["over"] <= end]
    return max((end - begin for begin, end in began), default=0.0)


def attached(folder: Path) -> int:
    """The program of an attached aios-run."""
    import libaios as aios

    task = json.loads((folder / "reference").read_text())["tasks"][0]
    try:
        for piece in aios.llm.complete(task["prompt"], **task["options"], stream=True):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except OSError as err:
        if err.errno == errno.EIO and "died twice" in str(err):
            return 8
        raise
    return 7


def storm(options: argparse.Namespace) -> dict[str, Any]:
    from libaios import agent

    with tempfile.TemporaryDirectory(prefix="aios-") as home, tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        flags = ["--threads", str(options.threads), *(["--exact"] if options.exact else [])]
        running = System(home, *flags)
        try:
            night = Storm(options, Path(folder), running)
            night.prepare()
            night.crew()
            began = time.monotonic()
            for number in range(options.faults):
                night.strike()
                if sys.stderr.isatty():
                    print(f"\r{number + 1} faults, {len(night.harmed)} harmed ", end="", file=sys.stderr, flush=True)
            took = time.monotonic() - began
            found = night.end() | {"took_s": took}
        finally:
            agent.reset()
            code = running.stop()
            if options.log:
                options.log.write_text(running.log())
        if code != 0:
            found["harmed"].append(f"aiosd exited {code}")
        if not eventually(lambda: not marked(), 3):
            found["harmed"].append(f"{len(marked())} processes left")
        found["tracebacks"] = running.log().count("Traceback")
        return found


# ── deaths of the whole system ────────────────────────────────────────────────────────────────────────────

DEAF = "trap '' TERM HUP; (setsid sh -c 'trap \"\" TERM HUP; sleep 1000' &); sleep 1000"


def ends(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the supervisor, kill the guardian, or stop the supervisor, in turn, in a new system each."""
    blows = [("supervisor", signal.SIGKILL), ("guardian", signal.SIGKILL), ("supervisor", signal.SIGSTOP)]
    found: dict[str, Any] = {"rounds": [], "left": 0}
    with tempfile.TemporaryDirectory(prefix="aios-") as home:
        for number in range(options.rounds):
            who, how = blows[number % len(blows)]
            running = System(home)
            try:
                for _ in range(5):
                    subprocess.run(["aios-run", "-d", "--", "sh", "-c", DEAF], check=True, stdout=subprocess.DEVNULL)
                subprocess.run(["aios-run", "-d", __file__, "--agent", "idle", "0", home], check=True, stdout=-3)
                target = running.part(who)
                assert target is not None
                eventually(lambda: len(marked()) >= 3 + 15, 5)
                began = time.monotonic()
                os.kill(target, how)
                running.daemon.wait(PATIENCE_S)
                gone = eventually(lambda: not marked(), 10)
                took = time.monotonic() - began
                found["rounds"].append({"who": who, "how": how.name, "gone_s": took})
                found["left"] += 0 if gone else len(marked())
            finally:
                for pid in marked():
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                running.daemon.wait()
    return found


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def show(found: dict[str, Any]) -> int:
    """Print the tables; returns the number of failures."""
    bad = 0
    if "storm" in found:
        night = found["storm"]
        print(f"{'fault':20}{'number':>8}{'pause of calls, s':>20}{'of streams, s':>18}")
        print(f"{'':28}{'p50':>11}{'max':>9}{'p50':>9}{'max':>9}")
        for kind, row in night["kinds"].items():
            values = [row[key] for key in ("probe_p50_s", "probe_max_s", "stream_p50_s", "stream_max_s")]
            print(f"{kind:20}{row['number']:8}{values[0]:11.2f}{values[1]:9.2f}{values[2]:9.2f}{values[3]:9.2f}")
        print(f"\n{night['faults']} faults in {night['took_s']:.0f} s; meanwhile done: {night['done']},")
        print(f"aios-run: {night['runs_done']}; generations running at two deaths (EIO by design): {night['poisoned']}")
        for what, title in (
            ("harmed", "agents harmed who should not be"),
            ("wrong_texts", "texts wrong"),
            ("lost_or_doubled", "calls lost or doubled"),
            ("unbalanced", "books that did not balance"),
        ):
            print(f"{title:34}{len(night[what]):6}")
            for line in night[what][:5]:
                print(f"    {line}")
            bad += len(night[what])
        print(f"{'tracebacks in the log':34}{night['tracebacks']:6}\n")
        bad += night["tracebacks"]
    if "ends" in found:
        kinds = Counter((row["who"], row["how"]) for row in found["ends"]["rounds"])
        for (who, how), number in kinds.items():
            took = [row["gone_s"] for row in found["ends"]["rounds"] if (row["who"], row["how"]) == (who, how)]
            print(f"{who} {how}: {number} rounds; all gone after {max(took):.2f} s at most")
        print(f"processes left: {found['ends']['left']}")
        bad += found["ends"]["left"]
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--victims", type=int, default=4, help="number of victims, and of attached aios-run")
    parser.add_argument("--gap", type=float, default=1.0, help="longest wait before a fault, seconds")
    parser.add_argument("--hangs", type=float, default=0.03, help="share of SIGSTOP in the faults on kernel and core")
    parser.add_argument("--exact", action="store_true", help="texts must equal those without faults")
    parser.add_argument("--threads", type=int, default=1, help="threads of the LLM core")
    parser.add_argument("--rounds", type=int, default=9, help="deaths of supervisor and guardian")
    parser.add_argument("--log", type=Path, help="keep the log of aiosd here")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    parser.add_argument("--agent", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agent:
        kind, number, folder, *rest = options.agent
        if kind == "attached":
            sys.exit(attached(Path(folder)))
        act(kind, int(number), Path(folder), rest)
        return
    from benchmarks.harness import hardware  # here, because agents run this file, too, and see only this folder

    machine, load = hardware(), os.getloadavg()[0]
    print(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['linux']}, Python {machine['python']}")
    mode = "exact" if options.exact else "not exact"
    print(f"seed {options.seed}, {options.agents} agents, model nano ({mode}), load before {load:.1f}\n", flush=True)
    settings = {name: getattr(options, name) for name in ("seed", "agents", "gap", "hangs", "exact", "threads")}
    found: dict[str, Any] = {"hardware": machine, "load": load, **settings}
    if options.faults:
        found["storm"] = storm(options)
    if options.rounds:
        found["ends"] = ends(options)
    bad = show(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
