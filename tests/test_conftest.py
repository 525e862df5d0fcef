"""The counters around each test count: a test that leaves something behind, or never ends, fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import LONGEST

CONFTEST = Path(__file__).with_name("conftest.py")

LEAKS = """
import mmap, os, subprocess, sys, time
import pytest

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
kept = []

def test_clean():
    subprocess.run([sys.executable, "-c", "pass"], check=True)

def test_leaves_a_child():
    kept.append(subprocess.Popen(SLEEP))

def test_leaves_an_orphan():
    if (child := os.fork()) == 0:
        subprocess.Popen(SLEEP, start_new_session=True)
        os._exit(0)
    os.waitpid(child, 0)

def test_leaves_a_descriptor():
    kept.append(os.pipe())

def test_leaves_a_segment():
    fd = os.memfd_create("aios-test")
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)

@pytest.mark.deadline(0.5)
def test_never_ends():
    time.sleep(60)

def test_is_not_blamed_for_the_others():
    pass
"""


def test_leaks_and_hangs_fail_a_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text().replace("PATIENCE_S = 30.0", "PATIENCE_S = 0.3"))
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    done = subprocess.run(
        [*command, "-W", "ignore", "-o", "markers=deadline(s): x", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    text = done.stdout
    for name in ("test_clean", "test_is_not_blamed_for_the_others"):
        assert f"ERROR test_leaks.py::{name}" not in text, text
        assert f"PASSED test_leaks.py::{name}" in text, text
    for name in ("child", "an_orphan", "descriptor", "segment"):
        assert f"ERROR test_leaks.py::test_leaves_{name if '_' in name else 'a_' + name}" in text, text
    assert "FAILED test_leaks.py::test_never_ends" in text, text
    assert "not done after 0 s" in text, text
    assert "/memfd:aios-test" in text, text


def test_files_that_begin_first_are_there() -> None:
    assert [name for name in LONGEST if not CONFTEST.with_name(f"test_{name}.py").exists()] == []
