"""Frameworks for agents, each in an environment of its own, run as agents: what works, as a table.

    $ make frameworks ARGS="openai autogen"
    | framework | model | started | answered | tool called | killed | parked and resumed |
    |---|---|---|---|---|---|---|
    | openai 3.57.0 | nano | yes | yes | yes | yes | yes |

Environments lie in build/frameworks. They are made by uv (which is installed there, too), because pip tries hundreds
of versions of some packages. Models are the embedded one and, where `make models` has fetched it, SmolLM2.

    started             the program ran, and has called the model
    answered            it ended with status 0, and has printed an answer
    tool called         the model has called its tool (a small one does not always; MetaGPT's example has none)
    killed              after `aios-kill` while a call was open the agent is gone, and the books balance
    parked and resumed  after STOP nothing more is generated for it; after CONT it goes on, and ends with status 0

The programs run in a copy of examples/, so that they leave nothing in the tree. In a sandbox they have the same access
as any agent: that folder, and the environment of their program.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import libaios as aios  # noqa: E402  the checkout comes first
from benchmarks.harness import Aiosd, model_path  # noqa: E402
from libaios import agent  # noqa: E402
from tools.models import MODELS  # noqa: E402

if TYPE_CHECKING:
    from libaios.wire import ProcInfo

FOLDER = ROOT / "build" / "frameworks"
TIME_S = 300.0  # the time budget of one agent
MOMENT_S = 0.5  # how long it is checked that a parked agent gets no tokens
COLUMNS = ("started", "answered", "tool called", "killed", "parked and resumed")


@dataclass(frozen=True)
class Framework:
    """`packages[0]` is the framework. `overrides` replace requirements of it that can no longer be met. `tool`: whether
    its example has a tool."""

    packages: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    tool: bool = True


FRAMEWORKS = {
    "openai": Framework(("openai==3.57.0",)),
    "autogen": Framework(("autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5")),
    "langgraph": Framework(("langgraph==1.2.24", "langchain==1.5.2", "langchain-openai==1.7.4")),
    "smolagents": Framework(("smolagents[openai]==1.26.0",)),
    "openai_agents": Framework(("openai-agents==0.24.0",)),
    "pydantic_ai": Framework(("pydantic-ai-slim[openai]==2.68.0",)),
    "litellm": Framework(("litellm==1.110.2",)),
    "crewai": Framework(("crewai==1.15.30",)),
    "interpreter": Framework(("open-interpreter==0.4.3", "litellm==1.83.0", "setuptools<81")),
    "metagpt": Framework(("metagpt==0.8.2",), ("lancedb>=0.14", "typing-extensions>=4.9", "setuptools<81"), tool=False),
}


# ── environments ──────────────────────────────────────────────────────────────────────────────────────────


def python_of(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def install(name: str) -> bool:
    """Make the environment, unless one from the same requirements is there; returns whether it is there now."""
    framework = FRAMEWORKS[name]
    stamp, wanted = FOLDER / name / ".done", repr(framework)
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    uv, overrides = _uv(), FOLDER / f"{name}.overrides"
    overrides.write_text("\n".join(framework.overrides) + "\n")
    print(f"installing {', '.join(framework.packages)} …", file=sys.stderr, flush=True)
    commands = [
        [uv, "venv", "-q", "--clear", "--python", sys.executable, FOLDER / name],
        [uv, "pip", "install", "-q", "--python", python_of(name), *framework.packages, "--overrides", overrides],
    ]
    if any(subprocess.run(command).returncode != 0 for command in commands):
        return False
    stamp.write_text(wanted)
    return True


def _uv() -> Path:
    home = FOLDER / ".uv"
    if not (home / "bin" / "uv").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", "uv"], check=True)
    return home / "bin" / "uv"


# ── one framework as an agent ─────────────────────────────────────────────────────────────────────────────


class Program:
    """The example of a framework, running in the background."""

    def __init__(self, system: Aiosd, name: str) -> None:
        limits = aios.proc.Limits(time_s=TIME_S)
        options: dict[str, Any] = {"kind": "exec", "detached": True, "limits": limits}
        folder = str(system.home / "examples")
        self.pid = aios.proc.spawn(str(python_of(name)), f"{name}_agent.py", name=name, cwd=folder, **options)

    def line(self) -> ProcInfo | None:
        return next((one for one in aios.proc.ps(all=True) if one.pid == self.pid and one.exit is None), None)

    def works(self) -> bool:
        """Wait until the program has called the model; False: it ended before."""
        while (line := self.line()) is not None:
            if line.stat in ("Q", "R") and line.calls:
                return True
            time.sleep(0.002)
        return False

    def status(self) -> int:
        return aios.proc.wait(self.pid)[1]


def try_run(system: Aiosd, name: str) -> dict[str, bool]:
    program = Program(system, name)
    status = program.status()
    text = system.call("aios-logs", str(program.pid))
    lines = text.splitlines()
    answers = [line.partition(":")[2].strip() for line in lines if line.startswith("answer:")]
    started = _calls(system, program.pid) > 0
    answered = status == 0 and any(answers)
    if not answered:
        print(f"{name} ended with {status}:", *lines[-12:], sep="\n  ", file=sys.stderr, flush=True)
    return {
        "started": started,
        "answered": answered,
        "tool called": any(one.startswith(("tool:", "call:")) for one in lines),
    }


def _calls(system: Aiosd, pid: int) -> int:
    return int(json.loads(system.call("aios-inspect", str(pid)))[0]["calls"])


def try_kill(system: Aiosd, name: str) -> bool:
    program = Program(system, name)
    if not program.works():
        return False
    aios.proc.kill(program.pid, signal.SIGTERM, timeout=10.0)
    gone = program.line() is None
    system.call("aiosd", "status", "--check")  # an error if the books do not balance
    return gone


def try_park(system: Aiosd, name: str) -> bool:
    program = Program(system, name)
    if not program.works():
        return False
    aios.proc.kill(program.pid, signal.SIGSTOP)
    before = program.line()
    time.sleep(MOMENT_S)
    after = program.line()
    stood = (
        before is not None
        and after is not None
        and after.stat == "T"
        and after.completion_tokens == before.completion_tokens
    )
    aios.proc.kill(program.pid, signal.SIGCONT)
    return program.status() == 0 and stood


def look(system: Aiosd, name: str) -> dict[str, str]:
    """The table's row for one framework."""
    found = try_run(system, name)
    tries: dict[str, Callable[[Aiosd, str], bool]] = {"killed": try_kill, "parked and resumed": try_park}
    for column, attempt in tries.items():
        try:
            found[column] = found["started"] and attempt(system, name)
        except (OSError, subprocess.CalledProcessError) as err:
            print(f"{name}: {column}: {err}", file=sys.stderr)
            found[column] = False
    row = {column: "yes" if found[column] else "no" for column in COLUMNS}
    return row if FRAMEWORKS[name].tool else {**row, "tool called": "has none"}


def version(name: str) -> str:
    package = FRAMEWORKS[name].packages[0].partition("==")[0].partition("[")[0]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python_of(name), "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def models() -> list[str]:
    return ["nano", *(name for name in ("smollm2",) if MODELS[name].path.exists())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FRAMEWORK", help=f"of {', '.join(FRAMEWORKS)}; all by default")
    parser.add_argument("--model", action="append", help="nano, or one of `make models`")
    parser.add_argument("--sandbox", choices=("none", "flat", "cage"), help="of the agents (default: aiosd's default)")
    parser.add_argument("--install", action="store_true", help="only make the environments")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in FRAMEWORKS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: of {', '.join(FRAMEWORKS)}")
    names = [name for name in options.names or FRAMEWORKS if install(name)]
    if not options.install:
        show(names, options.model or models(), options.sandbox or "")
    if set(options.names or FRAMEWORKS) - set(names):
        sys.exit("some could not be installed")


def show(names: list[str], models: list[str], sandbox: str) -> None:
    print(f"| framework | model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}", flush=True)
    for model in models:
        with Aiosd(model_path(model), sandbox=sandbox) as system:
            shutil.copytree(ROOT / "examples", system.home / "examples")
            os.environ["AIOS_HOME"] = str(system.home)
            for name in names:
                row = look(system, name)
                print(f"| {version(name)} | {model} | {' | '.join(row.values())} |", flush=True)
            agent.reset()


if __name__ == "__main__":
    main()
