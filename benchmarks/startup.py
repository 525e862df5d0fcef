#!/usr/bin/env python
"""How long the commands take, as multiples of a bare `python -c pass`.

Commands and bare interpreter take turns, so that other work on the machine affects all of them equally; medians count.
`aios-run` starts an empty agent, in the default sandbox, and waits for its end. All commands run from compiled
bytecode, as installed ones do.

    $ python benchmarks/startup.py
    command            median ms   × python -c pass   bar
    python -c pass          14.9               1.00
    aios-ps                 80.1               5.09   6.0   kept
    …
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASS = "python -c pass"
BARS = {"aios-ps": 6.0, "aios-top -b": 7.0, "aios-kill": 7.0, "aios-run": 20.0}


def sides(folder: Path) -> dict[str, list[str]]:
    """Names and command lines to measure."""
    python, empty = sys.executable, folder / "empty.py"
    empty.touch()
    (folder / "hello.py").write_text("print('hello')\n")

    def script(name: str, *args: str) -> list[str]:
        return [python, str(ROOT / "bin" / name), *args]

    return {
        PASS: [python, "-c", "pass"],
        "click and msgspec": [python, "-c", "import click, msgspec"],
        "aios-ps": script("aios-ps"),
        "aios-ps -e": script("aios-ps", "-e"),
        "aios-top -b": script("aios-top", "-b"),
        "aios-kill": script("aios-kill", "-0", "1"),  # refused by the kernel
        "aios-run": script("aios-run", str(empty)),
        "aios-run -d": script("aios-run", "-d", str(empty)),
    }


def measure(commands: dict[str, list[str]], rounds: int, env: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each command, `rounds` times, in turns; the first two rounds only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 2):
        names = list(commands) if number % 2 else list(reversed(commands))
        for name in names:
            began = time.perf_counter()
            subprocess.run(commands[name], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    bare = statistics.median(seconds[PASS])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        bar = BARS.get(name)
        kept = None if bar is None else median / bare <= bar
        rows.append({"command": name, "median_s": median, "ratio": median / bare, "bar": bar, "kept": kept})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each command (40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--model", default="nano", help="a GGUF instead of the embedded model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AIOS", "PYTHON"))}
        env |= {"AIOS_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")  # because the checkout may be read-only
        daemon = [sys.executable, str(ROOT / "bin" / "aiosd")]
        subprocess.run([*daemon, "-d", "--threads", "1", "--model", options.model], env=env, check=True)
        try:
            rows = report(measure(sides(folder), options.rounds, env))
        finally:
            subprocess.run([*daemon, "stop"], env=env, check=True)
    print(f"{'command':18} {'median ms':>10} {'× ' + PASS:>18} {'bar':>5}")
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['bar']:5.1f}   {'kept' if row['kept'] else 'MISSED'}"
        print(f"{row['command']:18} {row['median_s'] * 1e3:10.1f} {row['ratio']:18.2f} {bar}")
    if options.json:
        about = {
            "benchmark": "startup",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
            "rounds": options.rounds,
        }
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    return 0 if all(row["kept"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
