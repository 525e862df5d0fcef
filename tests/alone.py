"""Tests that have the machine to themselves, though pytest-xdist runs several at a time (`@pytest.mark.alone`).

Some tests are about time: who gets which share of a processor, how soon a hang is found. Each test holds a lock while
it runs, shared with the others, or alone if it is marked so. Where tests run one after another there is nothing to
lock."""

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
    """The lock on a file, shared (`LOCK_SH`) or alone (`LOCK_EX`). Children that still have the descriptor do not keep
    it: it is given up, not only closed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """A test's turn. All pass the same door one by one, and whoever waits for the floor alone keeps it shut meanwhile:
    else others would come in for ever."""
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
