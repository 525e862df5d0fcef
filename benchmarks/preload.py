#!/usr/bin/env python
"""Agents of a framework: each an interpreter of its own, or all forked from a template (`aios-run --preload`).

    $ python benchmarks/preload.py --agents 20
    20 agents            apart: MB each   start s    template: MB each   start s   MB: apart / template
    openai  imported               33.9      24.1                 2.9       0.7                    11.7
    …

All agents are started at once. "imported": each has imported its framework; "start s" is the time until the last one
has. "called": each has, moreover, called the embedded model once through the gateway, with its framework. Memory is the
PSS of all these agents (and of the template) divided by their number. Single agents are measured, too: the first has to
wait for its template, the next one has not.

Frameworks are those of `make frameworks` (build/frameworks); those not installed are left out. `--template-only` is for
numbers of agents for which memory would not suffice otherwise. Results go to benchmarks/results/preload.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import libaios as aios  # noqa: E402
from aiosd import procfs  # noqa: E402
from benchmarks.harness import Aiosd, model_path, write  # noqa: E402

ENVIRONMENTS = ROOT / "build" / "frameworks"
PATIENCE_S = 600.0

MEMBER = """
import os, signal, sys, time
folder = sys.argv[1]
def there(what):
    open(f"{folder}/{what}.{os.getpid()}", "w").close()
%s
there("imported")
while not os.path.exists(f"{folder}/go"):
    time.sleep(0.05)
%s
there("called")
signal.pause()
"""

ASK = '[{"role": "user", "content": "Hello!"}]'
#: By name: environment, modules to preload, the agent's imports, its call.
KINDS: dict[str, tuple[str, list[str], str, str]] = {
    "numpy": ("", ["numpy"], "import numpy", "numpy.ones((64, 64)) @ numpy.ones((64, 64))"),
    "openai": (
        "openai",
        ["openai"],
        "import openai",
        f"openai.OpenAI().chat.completions.create(model='x', max_tokens=4, messages={ASK})",
    ),
    "pydantic_ai": (
        "pydantic_ai",
        ["pydantic_ai", "pydantic_ai.models.openai"],
        "from pydantic_ai import Agent\nfrom pydantic_ai.models.openai import OpenAIChatModel",
        "Agent(OpenAIChatModel('x'), model_settings={'max_tokens': 4}).run_sync('Hello!')",
    ),
    "autogen": (
        "autogen",
        ["autogen_agentchat.agents", "autogen_ext.models.openai"],
        "import asyncio\nfrom autogen_agentchat.agents import AssistantAgent\n"
        "from autogen_ext.models.openai import OpenAIChatCompletionClient",
        "info = dict(vision=False, function_calling=True, json_output=True, structured_output=True, family='unknown')\n"
        "client = OpenAIChatCompletionClient(model='x', model_info=info, max_tokens=4)\n"
        "asyncio.run(AssistantAgent('w', model_client=client).run(task='Hello!'))",
    ),
    "langgraph": (
        "langgraph",
        ["langchain_openai", "langchain.agents"],
        "from langchain_openai import ChatOpenAI\nfrom langchain.agents import create_agent",
        "create_agent(ChatOpenAI(model='x', max_tokens=4), []).invoke({'messages': [('user', 'Hello!')]})",
    ),
}


class Crowd:
    """Agents of one kind, all started at once, with or without a template."""

    def __init__(self, system: Aiosd, kind: str, warm: bool) -> None:
        environment, self.modules, imports, call = KINDS[kind]
        python = ENVIRONMENTS / environment / "bin" / "python" if environment else Path(sys.executable)
        self.python, self.warm = str(python), warm
        self.folder = system.home / f"{kind}-{'warm' if warm else 'apart'}"
        self.folder.mkdir()
        self.script = self.folder / "member.py"
        self.script.write_text(MEMBER % (imports, call))
        self.pids: list[int] = []

    def start(self) -> None:
        if self.warm:
            options: dict[str, Any] = {"preload": self.modules, "python": self.python}
            pid = aios.proc.spawn(str(self.script), str(self.folder), detached=True, **options)
        else:
            pid = aios.proc.spawn(self.python, str(self.script), str(self.folder), kind="exec", detached=True)
        self.pids.append(pid)

    def wait(self, what: str) -> float:
        """Seconds until all have reported `what`."""
        began = time.monotonic()
        while len(list(self.folder.glob(f"{what}.*"))) < len(self.pids):
            if time.monotonic() - began > PATIENCE_S:
                sys.exit(f"not all agents of {self.folder.name} got to {what!r}")
            time.sleep(0.01)
        return time.monotonic() - began

    def pss_mb(self, templates: bool) -> float:
        """PSS in MB, per agent."""
        ospids = [one.ospid for one in aios.proc.ps(all=True) if one.pid in self.pids or _is_template(one, templates)]
        return sum(map(procfs.pss_bytes, ospids)) / 1e6 / len(self.pids)

    def end(self) -> None:
        for pid in self.pids:
            aios.proc.kill(pid, 9, timeout=10.0)
        for mark in [*self.folder.glob("imported.*"), *self.folder.glob("called.*"), *self.folder.glob("go")]:
            mark.unlink()
        self.pids.clear()


def _is_template(one: aios.proc.ProcInfo, wanted: bool) -> bool:
    return wanted and one.system and one.name.startswith("template:")


def timed(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def measure(system: Aiosd, kind: str, warm: bool, agents: int) -> dict[str, Any]:
    crowd = Crowd(system, kind, warm)
    found: dict[str, Any] = {"kind": kind, "way": "template" if warm else "apart", "agents": agents}
    for name in ("first_s", "one_s"):
        found[name] = round(timed(lambda: (crowd.start(), crowd.wait("imported"))), 3)
        crowd.end()
    found["start_s"] = round(timed(lambda: ([crowd.start() for _ in range(agents)], crowd.wait("imported"))), 3)
    found["imported_mb"] = round(crowd.pss_mb(warm), 2)
    (crowd.folder / "go").touch()
    found["called_s"] = round(crowd.wait("called"), 1)
    found["called_mb"] = round(crowd.pss_mb(warm), 2)
    crowd.end()
    shutil.rmtree(crowd.folder)
    return found


def show_one(warm: dict[str, Any]) -> None:
    memory = f"imported {warm['imported_mb']:.1f} MB each, called {warm['called_mb']:.1f}"
    starts = f"all start in {warm['start_s']:.1f} s, one alone {warm['first_s']:.2f}, then {warm['one_s']:.2f}"
    print(f"{warm['kind']:12} {memory}; {starts}; {warm['called_s']:.1f} s until all have made their call", flush=True)


def show(apart: dict[str, Any], warm: dict[str, Any]) -> None:
    for what in ("imported", "called"):
        mb = apart[f"{what}_mb"], warm[f"{what}_mb"]
        times = (f"{apart['start_s']:.1f}", f"{warm['start_s']:.1f}") if what == "imported" else ("", "")
        row = (
            f"{apart['kind']:12} {what:9} {mb[0]:10.1f} {mb[1]:10.1f} {mb[0] / mb[1]:7.1f} {times[0]:>9} {times[1]:>9}"
        )
        print(row, flush=True)
    firsts = "  ".join(f"{one['way']}: {one['first_s']:.2f}, then {one['one_s']:.2f} s" for one in (apart, warm))
    print(f"{'':12} one alone, {firsts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--template-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    there = [
        kind
        for kind, (environment, *_) in KINDS.items()
        if (ENVIRONMENTS / environment / "bin/python").exists() or not environment
    ]
    kinds = [kind for kind in options.kinds or there if kind in there]
    rows: list[dict[str, Any]] = []
    with Aiosd(model_path("nano")) as system:
        os.environ["AIOS_HOME"] = str(system.home)
        if not options.template_only:
            print(f"{options.agents} agents".ljust(22) + "  apart MB    warm MB   ratio   apart s    warm s")
        for kind in kinds:
            ways = (True,) if options.template_only else (False, True)
            found = [measure(system, kind, warm, options.agents) for warm in ways]
            (show_one if options.template_only else show)(*found)
            rows += found
    write("preload", rows, options.out)


if __name__ == "__main__":
    main()
