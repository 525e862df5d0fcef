"""The leak checks and deadlines of conftest.py work: a test that leaves something behind, or never ends, fails."""

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


BESIDE = """
import time
import pytest

@pytest.mark.parametrize("number", range(20))
def test_beside(number, spans):
    time.sleep(0.01)
"""
SPANS = """
import os, pathlib, time
import pytest
from tests.alone import pytest_configure_node, pytest_runtest_protocol

@pytest.fixture
def spans(request):
    began = time.monotonic()
    yield
    name = "alone" if request.node.get_closest_marker("alone") else "beside"
    with open(pathlib.Path(__file__).with_name("spans"), "a") as file:
        file.write(f"{name} {began} {time.monotonic()}\\n")
"""


def test_one_that_is_marked_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(SPANS)
    (tmp_path / "test_beside.py").write_text(BESIDE)
    (tmp_path / "test_alone.py").write_text(BESIDE + "\npytestmark = pytest.mark.alone\n")
    options = ["-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    command = [sys.executable, "-m", "pytest", *options, "-o", "markers=alone: x", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert "40 passed" in done.stdout, done.stdout + done.stderr
    lines = [line.split() for line in (tmp_path / "spans").read_text().splitlines()]
    spans = [(name, float(began), float(ended)) for name, began, ended in lines]
    for name, began, ended in spans:
        beside = [span for span in spans if span[1] < ended and span[2] > began]
        assert name != "alone" or len(beside) == 1, beside
