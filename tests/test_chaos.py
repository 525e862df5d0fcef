"""A small run of benchmarks/chaos.py: parts are killed at random moments, from a seed, and no other part is harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


@pytest.mark.deadline(180)
def test_when_any_part_dies_no_other_is_harmed(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    argv = ["--faults", "10", "--seed", "5", "--agents", "14", "--victims", "1", "--gap", "0.4", "--hangs", "0"]
    done = subprocess.run(
        [sys.executable, CHAOS, *argv, "--exact", "--rounds", "2", "--out", out],
        capture_output=True,
        text=True,
        timeout=170,
        env={name: value for name, value in os.environ.items() if not name.startswith("AIOS_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["storm"]["faults"] == 10
    assert {"kernel killed", "llm killed"} <= set(found["storm"]["kinds"])
    assert all(found["storm"]["done"][kind] > 0 for kind in ("generate", "stream", "spawn", "send", "probe"))
