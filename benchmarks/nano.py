#!/usr/bin/env python
"""How many held-out tasks the embedded model solves, per family, through the whole system.

Every task runs as an agent of its own (`aios-run --name NAME -m libaios.agents.react`) on an aiosd that this script
starts in a temporary home. Its files and notes are in the store. Answer, files and notes are checked.

    $ python benchmarks/nano.py
                               held-out tasks       in fresh phrases
    calc                      20 of  20  100.0%      18 of  20   90.0%
    …

Held-out tasks are about names, words and numbers that no task of the training has. Those of the second column are,
moreover, asked in phrases that were held back from training.

`--no-schemas` offers the tools with only the names of their arguments. Then no grammar prevents calls with wrong types,
and the toolbox refuses them.

`--direct GGUF` measures without aiosd: the same loop over a bare llama.cpp in this process, without schemas and
toolbox, to judge a model in training.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import libaios as aios  # noqa: E402
from aiosd.nano.tasks import FAMILIES, FRESH, HELD, Task, check, make  # noqa: E402  the checkout comes first
from libaios.agents.react import AgentError, Toolkit, react  # noqa: E402

PATIENCE = 60  # seconds for one task; longer counts as failed

Solve = Callable[[str, Path, Path], str]  # (prompt, folder, notes file) -> answer


def held_out(seed: int, number: int, split: str = HELD) -> list[Task]:
    """Held-out tasks, of all families in turn."""
    families = list(FAMILIES)
    return [make(seed * 1_000_000 + i, split, families[i % len(families)]) for i in range(number)]


def judge(task: Task, solve: Solve) -> str | None:
    """Give one task to the agent in a fresh folder; returns what is wrong with its work, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, notes_file = Path(scratch, "work"), Path(scratch, "notes")
        folder.mkdir()
        for path, text in task.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        notes_file.write_text("".join(f"{note}\n" for note in task.notes))
        try:
            answer = solve(task.prompt, folder, notes_file)
        except AgentError as e:
            return str(e)
        files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
        problem = check(task, answer, files, notes_file.read_text().splitlines())
        return problem and f"{problem}; answered {answer!r}"


# --- through the whole system ---------------------------------------------------------------------


def command(name: str) -> list[str]:
    """The command of the checkout, run by this Python, or the installed one."""
    here = ROOT / "bin" / name
    return [sys.executable, str(here)] if here.exists() else [shutil.which(name) or name]


NUMBERS = itertools.count(1)
REACT = ["-m", "libaios.agents.react"]
#: The same agent with tools whose arguments have no types.
NO_SCHEMAS = """
from libaios.agents import react
for tool in react.TOOLS:
    names = tool["function"]["parameters"]["properties"]
    tool["function"]["parameters"] = {"type": "object", "properties": {name: {} for name in names}}
react.main()
"""
#: Adds the notes from stdin, and prints all notes.
NOTES = """
import sys, libaios as aios
for line in sys.stdin: aios.mem.add(line.strip())
for note in reversed(aios.mem.list()): print(note.text)
"""


def solve_by_agent(prompt: str, folder: Path, notes_file: Path, react: list[str] = REACT) -> str:
    """Run the task with a space of its own in the store; its files and notes are copied there, and afterwards back."""
    name = f"task{next(NUMBERS)}"
    keep, empty = folder.with_name("notes.py"), folder.with_name("empty")
    keep.write_text(NOTES)
    empty.mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        aios.sto.upload(str(path.relative_to(folder)), path, of=f"agent:{name}")
    run_agent(name, empty, str(keep), given=notes_file.read_text())
    answer = run_agent(name, empty, *react, "--", prompt)
    for file in aios.sto.list(of=f"agent:{name}"):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        aios.sto.download(file.path, folder / file.path, of=f"agent:{name}")
    notes_file.write_text(run_agent(name, empty, str(keep)))
    return answer.strip()


def run_agent(name: str, folder: Path, *words: str, given: str = "") -> str:
    """Run the agent; returns its output."""
    try:
        run = subprocess.run(
            [*command("aios-run"), "--name", name, *words],
            cwd=folder,
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AgentError(f"no end after {PATIENCE} s") from None
    if run.returncode:
        raise AgentError(f"exit {run.returncode}: {run.stderr.strip()[-300:]}")
    return run.stdout


class System:
    """An aiosd in a temporary home, as a context manager."""

    def __enter__(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        os.environ["AIOS_HOME"] = self.home.name
        self.process = subprocess.Popen(command("aiosd"), stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("aiosd: ready"):
                break
        else:
            raise SystemExit("aiosd did not start")
        self.drain = ThreadPoolExecutor(1)
        self.drain.submit(self.process.stderr.read)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.drain.shutdown()
        self.home.cleanup()


# --- a bare llama.cpp -----------------------------------------------------------------------------


@dataclass
class Call:
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass
class Reply:
    text: str
    tool_calls: list[Call] = field(default_factory=list)
    finish_reason: str = "stop"


class Bare:
    """Greedy decoding of one sequence, with the chat template of the GGUF."""

    def __init__(self, gguf: Path) -> None:
        import ctypes

        import llama_cpp as ll
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.ll = ll
        self.silent = ll.llama_log_callback(lambda level, text, data: None)
        ll.llama_log_set(self.silent, ctypes.c_void_p())
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(str(gguf).encode(), ll.llama_model_default_params())
        assert self.model, f"cannot load {gguf}"
        self.vocab = ll.llama_model_get_vocab(self.model)
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = 2048
        params.n_threads = params.n_threads_batch = 1
        self.context = ll.llama_init_from_model(self.model, params)
        template = ll.llama_model_chat_template(self.model, None).decode()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(template)
        self.steps, self.seconds = 0, 0.0

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = (self.ll.llama_token * (len(raw) + 8))()
        n = self.ll.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, True)
        return list(room[:n])

    def piece(self, token: int) -> bytes:
        import ctypes

        room = ctypes.create_string_buffer(256)
        length = self.ll.llama_token_to_piece(self.vocab, token, room, 256, 0, True)
        return room.raw[:length]

    def generate(self, ids: list[int], most: int) -> list[int]:
        import numpy as np

        ll = self.ll
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        size = ll.llama_vocab_n_tokens(self.vocab)
        out: list[int] = []
        batch = ids
        while len(out) < most and len(ids) + len(out) < 2048:
            begin = time.perf_counter()
            room = (ll.llama_token * len(batch))(*batch)
            if ll.llama_decode(self.context, ll.llama_batch_get_one(room, len(batch))):
                raise AgentError("llama_decode failed")
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, -1), shape=(size,))
            token = int(logits.argmax())
            if out:
                self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - begin
            if ll.llama_vocab_is_eog(self.vocab, token):
                break
            out.append(token)
            batch = [token]
        return out

    def chat(self, messages: list[dict[str, Any]], tools: Any = None, max_tokens: int = 256, **_: Any) -> Reply:
        prompt = self.template.render(messages=messages, tools=tools, add_generation_prompt=True)
        out = self.generate(self.tokenize(prompt), max_tokens)
        text = b"".join(map(self.piece, out)).decode(errors="replace")
        before, *calls = re.split(r"<tool_call>\n(.*?)\n</tool_call>", text, flags=re.DOTALL)
        if not calls:
            return Reply(text, finish_reason="length" if len(out) >= max_tokens else "stop")
        try:
            parsed = [json.loads(c) for c in calls[::2]]
        except ValueError:
            raise AgentError(f"not a call: {text!r}") from None
        return Reply(before, [Call(str(i), c["name"], c["arguments"]) for i, c in enumerate(parsed)], "tool_calls")

    def solve(self, prompt: str, folder: Path, notes_file: Path) -> str:
        return react(prompt, self.chat, Toolkit(folder, notes_file))


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=300, help="tasks of each of the two kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=8, help="agents at a time")
    parser.add_argument("--no-schemas", action="store_true", help="do not constrain arguments of tools")
    parser.add_argument("--direct", type=Path, metavar="GGUF", help="without aiosd")
    parser.add_argument("--show", choices=(HELD, FRESH), help="print what went wrong with one kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "nano.json")
    options = parser.parse_args()

    tasks = {split: held_out(options.seed, options.tasks, split) for split in (HELD, FRESH)}
    flat = [task for split in tasks.values() for task in split]
    begin = time.monotonic()
    bare = Bare(options.direct) if options.direct else None
    if bare is not None:
        found = [judge(task, bare.solve) for task in flat]
    else:
        with (
            tempfile.NamedTemporaryFile("w", suffix=".py") as loose,
            System(),
            ThreadPoolExecutor(options.jobs) as pool,
        ):
            loose.write(NO_SCHEMAS)
            loose.flush()
            solve = partial(solve_by_agent, react=[loose.name] if options.no_schemas else REACT)
            found = list(pool.map(lambda task: judge(task, solve), flat))
    seconds = time.monotonic() - begin

    judged = {split: [*zip(tasks[split], found[i * options.tasks :], strict=False)] for i, split in enumerate(tasks)}
    solved = {split: tally(results) for split, results in judged.items()}
    print(f"{'':24}{'held-out tasks':>21}{'in fresh phrases':>22}")
    for name in solved[HELD]:
        print(
            f"{name:24}"
            + "".join(f"{good:8} of{of:4}{good / max(1, of):7.1%}" for good, of in (t[name] for t in solved.values()))
        )
    if bare is not None:
        print(f"{bare.seconds / max(1, bare.steps) * 1e3:.3f} ms a decode step of one sequence, one thread")
    if options.show:
        for task, problem in judged[options.show]:
            if problem:
                print(f"\n[{task.family}] {task.prompt!r}\n    {task.files or ''} {task.notes or ''}\n    {problem}")
    if bare is None:
        report = {
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
            "solved": {
                split: {name: {"solved": good, "of": of} for name, (good, of) in table.items()}
                for split, table in solved.items()
            },
            "failed": {
                split: [{"family": t.family, "prompt": t.prompt, "problem": p} for t, p in results if p]
                for split, results in judged.items()
            },
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def tally(results: list[tuple[Task, str | None]]) -> dict[str, tuple[int, int]]:
    """Numbers of solved and of all tasks, per family and in all."""
    groups = {name: [p for t, p in results if t.family == name] for name in FAMILIES}
    groups["three calls or more"] = [p for t, p in results if t.calls() >= 3]
    groups["all"] = [p for _, p in results]
    return {name: (sum(p is None for p in problems), len(problems)) for name, problems in groups.items()}


if __name__ == "__main__":
    main()
