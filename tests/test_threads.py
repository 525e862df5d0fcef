"""Linux starts no thread, or no process: agents have used up what the user or the container may have. No part of the
system ends because of that, and a part whose thread was refused starts it later."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiosd import threads
from aiosd.gateway import submitted
from aiosd.gateway.holders import Holders
from aiosd.gateway.identity import SocketAddress
from aiosd.gateway.web import problem_of
from aiosd.kernel.audit import Audit
from aiosd.kernel.diskwatch import DiskWatch
from aiosd.kernel.logkeeper import LogKeeper
from aiosd.llm.front import Front
from aiosd.llm.remote.bell import Bell
from aiosd.net.dialing import Dialer, Unreachable
from aiosd.store.embedders import OfCore
from aiosd.timers import Timers
from aiosd.tools.main import ToolboxService
from aiosd.tools.messages import Done, Run, Tool
from aiosd.tools.meter import Bills
from aiosd.tools.pool import Cell, Job, Pool
from aiosd.tools.servers import McpLauncher
from tests.conftest import eventually


class Limit:
    """Whether Linux refuses to start threads and processes."""

    reached = True


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limit]:
    found, start, popen = Limit(), threading.Thread.start, subprocess.Popen

    def started(thread: threading.Thread) -> None:
        if found.reached:
            raise RuntimeError("can't start new thread")
        start(thread)

    def executed(*args: Any, **more: Any) -> Any:
        if found.reached:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return popen(*args, **more)

    monkeypatch.setattr(threading.Thread, "start", started)
    monkeypatch.setattr(subprocess, "Popen", executed)
    yield found
    found.reached = False


def test_a_refused_thread_raises_eagain(limit: Limit) -> None:
    with pytest.raises(BlockingIOError) as caught:
        threads.start(lambda: None, "x")
    assert caught.value.errno == errno.EAGAIN


# ── the kernel ────────────────────────────────────────────────────────────────────────────────────────────


def lines(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_the_audit_loses_no_line(limit: Limit, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.note("denied", 7)
    limit.reached = False
    audit.note("asked", 7)
    audit.close()
    assert lines(audit.path) == ["denied", "asked"]


def test_the_audit_is_written_at_the_end_at_the_latest(limit: Limit, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.note("denied", 7)
    audit.close()
    assert lines(audit.path) == ["denied"]


def test_logs_are_removed_later(limit: Limit, tmp_path: Path) -> None:
    logs = [tmp_path / f"{pid}.log" for pid in (1, 2)]
    keeper = LogKeeper(tmp_path, 0, 1, 0)
    for pid, log in enumerate(logs, 1):
        log.touch()
        keeper.forget([pid], 0)
        limit.reached = False
    keeper.wait(30)
    assert not any(log.exists() for log in logs)


def test_a_log_that_is_full_is_cut_later(limit: Limit, tmp_path: Path) -> None:
    log = tmp_path / "1.log"
    log.write_bytes(bytes(1 << 20))
    keeper = LogKeeper(tmp_path, 1 << 16, 1, 0)
    keeper.sample(str(log))
    limit.reached = False
    keeper.sample(str(log))
    keeper.wait(30)
    assert log.stat().st_size < 1 << 20


def test_a_workspace_is_measured_later_and_counts_as_slow_until_then(limit: Limit, tmp_path: Path) -> None:
    watch = DiskWatch()
    watch.ask({str(tmp_path): []})
    assert (watch.busy, watch.waits, watch.sizes) == (True, True, {})
    limit.reached = False
    watch.ask({str(tmp_path): []})
    assert eventually(lambda: not watch.busy)
    assert (watch.waits, list(watch.sizes)) == (False, [str(tmp_path)])


# ── the gateway ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_program_whose_agent_cannot_be_started_now_is_told_to_try_again(
    limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Request:
        async def json(self) -> dict[str, Any]:
            return {"agent_id": "x", "agent_config": {"task": "y"}}

    async def surroundings(request: Any) -> tuple[str, dict[str, str]]:
        return "/", {}

    monkeypatch.setattr(submitted, "_surroundings", surroundings)
    request: Any = Request()
    with pytest.raises(BlockingIOError) as caught:
        asyncio.run(submitted.submit(request))
    problem = problem_of(caught.value)
    assert (problem.status, problem.headers) == (503, {"retry-after": "1"})
    assert problem_of(BlockingIOError(errno.EAGAIN, "too many open calls")).status == 429, "this agent's own limit"


# ── services ──────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_thread_there_are_no_vectors_yet(limit: Limit, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"x")
    embedder, found = OfCore(str(tmp_path), "model", str(tmp_path / "model")), list[Any]()
    for urgent in (True, False):
        embedder.ask(["text"], found.append, urgent)
    embedder.poll()
    assert found == [None, None]
    assert not embedder._started
    os.close(embedder.fileno())


def test_folders_of_tools_are_removed_at_the_next_start(limit: Limit, tmp_path: Path) -> None:
    (tmp_path / "agent-1").mkdir()
    with pytest.raises(BlockingIOError):  # the server logs it, and continues
        ToolboxService._remove([tmp_path / "agent-1"])


def test_a_call_that_no_worker_can_run_is_refused(limit: Limit, tmp_path: Path) -> None:
    timers, done, over = Timers(), list[Done](), list[str]()

    def nothing(*args: Any) -> Any:
        return None

    pool = Pool(timers, nothing, nothing, str(tmp_path), nothing, McpLauncher({}, -1, nothing), Bills(nothing))
    tool = Tool("x", "", {})
    for name in ("one", "two"):
        job = Job(tool, Run("x", {}, "", None, None), 7, nothing, done.append, lambda name=name: over.append(name))
        pool.run("source", Cell(), job)
    timers.run_due()
    assert ([one.errno for one in done], over) == ([errno.EAGAIN] * 2, ["one", "two"])


def test_a_text_is_refused_only_while_no_process_can_start(limit: Limit) -> None:
    failed = list[OSError]()
    front = Front("model", 64, command=["cat"])
    for _ in range(2):
        front.ask((1, 1), "x", b"", lambda result: None, failed.append)
    assert ([err.errno for err in failed], front.busy) == ([errno.EAGAIN] * 2, False)
    limit.reached = False
    front.ask((1, 1), "x", b"", lambda result: None, failed.append)
    assert front.pid
    front.close()


def test_a_core_without_a_timer_thread_raises_nothing(limit: Limit) -> None:
    bell = Bell()
    bell.ring_in(1.0)
    bell.stop()
    bell.close()


def test_a_refused_lookup_releases_its_place(limit: Limit) -> None:
    async def dial() -> bool:
        lookups = asyncio.Semaphore(1)
        with pytest.raises(Unreachable):
            await Dialer().dial("localhost", 1, lookups)
        return lookups.locked()

    assert not asyncio.run(dial())


def test_a_holder_that_could_not_be_looked_up_is_looked_up_again(limit: Limit) -> None:
    ends = SocketAddress("127.0.0.1", 1), SocketAddress("127.0.0.1", 2)

    async def look() -> list[Any]:
        found = Holders()
        with pytest.raises(BlockingIOError):
            await found.of(*ends)
        limit.reached = False
        return await asyncio.wait_for(found.of(*ends), 30)

    assert asyncio.run(look()) == []
