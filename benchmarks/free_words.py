"""How many tasks in free words the embedded model solves.

`free_words.json` has fifty tasks of the kinds that the model's card promises, in the words of different people and
without regard to the sentences of its training. Each goes through the whole system: aiosd is booted in a temporary
home, and every task is an agent in a folder of its own. A task is solved if the answer, the files and the notes are
right, and nothing else was written.

    $ python benchmarks/free_words.py        # with a model in the middle of its training
    family                solved    of  share
    arithmetic                 4     8    50%
    ...
    all                       20    50    40%

    Not solved:
    [arithmetic] Take 47 away from 212.
        answer: 'The answer is 44944.'
        answer lacks 165
    ...

The results are written to benchmarks/results/free_words.json, too.

In a task's `expect`, `answer` lists texts that the answer must contain, as whole words in any case; of a list inside it
one is enough. Numbers are compared by value: 1200 is found in "1,200.00". `notes` lists texts that an added note must
contain, `files` the whole text of files.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASK_S = 60
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")

Task = dict[str, Any]


# --- the system -----------------------------------------------------------------------------------


class System:
    """A running aiosd in a home of its own. Leaves nothing behind."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __enter__(self) -> System:
        self.home = Path(tempfile.mkdtemp(prefix="aios-free-words-"))
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("AIOSD_", "AIOS_"))}
        self.env = plain | {"AIOS_HOME": str(self.home), "PATH": path}
        try:
            self.run("aiosd", "-d", "--model", self.model, check=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("aiosd", "stop", capture_output=True)
        for process in self.left_over():  # there are some only if something went wrong
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.env, stdin=subprocess.DEVNULL, text=True, timeout=TASK_S + 30, **options
        )

    def left_over(self) -> list[int]:
        """Processes that still belong to the home."""
        mark = f"AIOS_HOME={self.home}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def about_model(self) -> dict[str, Any]:
        """The model's file and checksum: the embedded model has had several versions."""
        status = json.loads(self.run("aiosd", "status", "--json", check=True, capture_output=True).stdout)
        model = status["models"][0]
        digest = hashlib.sha256(Path(model["path"]).read_bytes()).hexdigest()
        return {"name": model["name"], "parameters": model["info"]["n_params"], "sha256": digest}

    def ask(self, task: Task) -> tuple[str, list[str]]:
        """Give the task to an agent; returns its answer, and what is wrong."""
        folder = Path(tempfile.mkdtemp(prefix="task-", dir=self.home))
        desk, notes = folder / "desk", folder / "notes.txt"
        desk.mkdir()
        for name, text in task["files"].items():
            (desk / name).parent.mkdir(parents=True, exist_ok=True)
            (desk / name).write_text(text, "utf-8")
        notes.write_text("".join(f"{note}\n" for note in task["notes"]), "utf-8")
        agent = ["-m", "libaios.agents.react", "--folder", ".", "--notes", str(notes), task["prompt"]]
        try:
            done = self.run("aios-run", "--time", str(TASK_S), *agent, cwd=desk, capture_output=True)
        except subprocess.TimeoutExpired:
            return "", ["no end"]
        files = {str(p.relative_to(desk)): p.read_text("utf-8", "replace") for p in desk.rglob("*") if p.is_file()}
        faults = judge(task, done.stdout, files, notes.read_text("utf-8").splitlines())
        if done.returncode:
            faults.insert(0, f"exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip(), faults


# --- judging --------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """The text without differences that do not count: case, forms of signs, separators in numbers, line breaks."""
    text = text.lower().replace("’", "'").replace("‘", "'").replace("−", "-")
    return " ".join(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).split())


def occurs(wanted: str, text: str) -> bool:
    wanted, text = plain(wanted), plain(text)
    if NUMBER.fullmatch(wanted):
        return any(float(number) == float(wanted) for number in NUMBER.findall(text))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None


def judge(task: Task, answer: str, files: dict[str, str], notes: list[str]) -> list[str]:
    """What is wrong; empty if the task is solved."""
    expect = task["expect"]
    faults = []
    for wanted in expect["answer"]:
        ways = wanted if isinstance(wanted, list) else [wanted]
        if not any(occurs(way, answer) for way in ways):
            faults.append(f"answer lacks {' or '.join(ways)}")

    before = {name: text.rstrip() for name, text in task["files"].items()}
    after = {name: text.rstrip() for name, text in files.items()}
    right = before | expect["files"]
    for name in sorted(right.keys() | after.keys()):
        if after.get(name) != right.get(name):
            faults.append(f"{name} is {after.get(name)!r} instead of {right.get(name)!r}")

    added = notes[len(task["notes"]) :]
    for wanted in expect["notes"]:
        if not any(occurs(wanted, note) for note in added):
            faults.append(f"no new note says {wanted}: {added}")
    if added and not expect["notes"]:
        faults.append(f"uncalled-for notes: {added}")
    return faults


# --- the report -----------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    families = list(dict.fromkeys(r["family"] for r in results))
    lines = [f"{'family':<20}{'solved':>8}{'of':>6}{'share':>7}"]
    for family in [*families, "all"]:
        of = [r for r in results if family in (r["family"], "all")]
        solved = sum(r["solved"] for r in of)
        lines.append(f"{family:<20}{solved:>8}{len(of):>6}{solved / len(of):>7.0%}")
    return "\n".join(lines)


def hardware() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{names[0] if names else os.uname().machine}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fifty tasks in free words, through the whole system.")
    parser.add_argument("--model", default="nano", help="the model for aiosd (default: %(default)s)")
    parser.add_argument("--tasks", type=Path, default=HERE / "free_words.json", help="default: free_words.json")
    parser.add_argument("--family", help="only tasks of this family; writes no results")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "free_words.json", help="where results go")
    args = parser.parse_args()

    tasks: list[Task] = json.loads(args.tasks.read_text("utf-8"))
    if args.family:
        tasks = [task for task in tasks if task["family"] == args.family]
    if not tasks:
        parser.error("no such tasks")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = []
    with System(args.model) as system:
        model = system.about_model()
        for i, task in enumerate(tasks, 1):
            answer, faults = system.ask(task)
            print(f"{i}/{len(tasks)}", "." if not faults else "not solved", file=sys.stderr, flush=True)
            results.append(
                {"family": task["family"], "prompt": task["prompt"], "solved": not faults}
                | {"answer": answer, "faults": faults}
            )

    print(table(results))
    failed = [r for r in results if not r["solved"]]
    if failed:
        print("\nNot solved:")
    for r in failed:
        print(f"[{r['family']}] {r['prompt']}\n    answer: {r['answer']!r}")
        for fault in r["faults"]:
            print(f"    {fault}")

    if not args.family:
        report = {
            "date": datetime.date.today().isoformat(),
            "model": model,
            "hardware": hardware(),
            "solved": len(results) - len(failed),
            "of": len(results),
            "tasks": results,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
