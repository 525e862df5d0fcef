"""A small run of benchmarks/crash.py: agents write while parts of the system are killed, and each write is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CRASH = Path(__file__).parents[1] / "benchmarks" / "crash.py"


@pytest.mark.deadline(120)
def test_acknowledged_writes_outlive_every_kill(tmp_path: Path) -> None:
    out = tmp_path / "crash.json"
    argv = ["--kills", "15", "--seed", "3", "--agents", "8", "--gap", "0.15", "--out", out]
    done = subprocess.run(
        [sys.executable, CRASH, *argv],
        capture_output=True,
        text=True,
        timeout=110,
        env={name: value for name, value in os.environ.items() if not name.startswith("AIOS_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {row["killed"]: row["number"] for row in found["rows"] if row["number"]}.keys() >= {"store", "kernel"}
    assert found["acknowledged"] > 500
    assert found["given_up"] < 10
