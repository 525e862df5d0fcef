"""Tests that have the machine to themselves, though pytest-xdist runs several at a time (`@pytest.mark.alone`).

Some tests depend on time: who gets which share of a processor, how soon a hang is found. Each test holds a lock while
it runs: a shared one, or an exclusive one if it is marked so. Where tests run one after another, no lock is taken."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def held(path: Path, how: int) -> Iterator[None]:
    """The lock on a file, shared (`LOCK_SH`) or exclusive (`LOCK_EX`). It is released explicitly, because
    closing the file would not release it while a child still has the descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """A test's turn. Each test takes `door` before `floor`, and a test that waits for an exclusive `floor` holds `door`
    meanwhile: otherwise new tests could take the shared lock again and again, and the wait would never end."""
    with contextlib.ExitStack() as floor:
        with held(folder / "door", fcntl.LOCK_EX):
            floor.enter_context(held(folder / "floor", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


LOCKS: pytest.StashKey[str] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist: a worker is about to start. All workers of a run have their locks in one folder."""
    config: pytest.Config = node.config
    if LOCKS not in config.stash:
        config.stash[LOCKS] = tempfile.mkdtemp(prefix="aiosd-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.stash[LOCKS]))
    node.workerinput["locks"] = config.stash[LOCKS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    worker = getattr(item.config, "workerinput", None)
    if worker is None:
        return (yield)
    with turn(Path(worker["locks"]), item.get_closest_marker("alone") is not None):
        return (yield)
