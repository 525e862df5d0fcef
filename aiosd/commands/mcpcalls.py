"""The calls of `aiosd mcp` that are about processes. The other program gets their type hints and docstrings as
descriptions."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aiosd.logs import agentlog
from aiosd.logs.agentlog import BLOCK
from libaios import aio, wire
from libaios.agent import connection
from libaios.tool import define
from libaios.wire import Limits, Sys

MOST_LOG = 1 << 18  # bytes of a log that one call returns

AgentPid = Annotated[int, Meta(ge=1)]
SignalName = Literal["TERM", "KILL", "INT", "HUP", "STOP", "CONT", "USR1", "USR2"]


@define
async def spawn(
    program: Annotated[str, Meta(min_length=1)],
    args: Sequence[str] = (),
    name: str | None = None,
    folder: str | None = None,
    sandbox: Literal["none", "flat", "cage"] | None = None,
    tokens: Annotated[int, Meta(ge=0)] | None = None,
    seconds: Annotated[float, Meta(gt=0)] | None = None,
) -> dict[str, int]:
    """Starts an agent in the background and returns its pid. Its output goes to its log.

    Args:
        program: a Python file (….py), or a program
        args: its arguments
        name: what it is called; notes and files are kept under this name
        folder: its working folder
        sandbox: how it is confined
        tokens: how many tokens it may use
        seconds: how long it may run
    """
    pid = await aio.proc.spawn(
        program,
        *args,
        name=name,
        cwd=None if folder is None else Path(folder).expanduser(),
        sandbox=sandbox,
        limits=Limits(tokens=tokens, time_s=seconds),
        detached=True,
    )
    return {"pid": pid}


@define
async def ps(all: bool = False) -> list[dict[str, Any]]:
    """Lists the agents that run, with their state and what they have used.

    Args:
        all: those too that have ended, and aiosd's own processes
    """
    return [msgspec.to_builtins(one) for one in await aio.proc.ps(all)]


@define
async def wait(pid: AgentPid, seconds: Annotated[float, Meta(ge=0, le=3600)] = 60) -> dict[str, Any]:
    """Waits for an agent to end and returns its exit status: its code, or -n for signal n.

    Args:
        pid: of the agent
        seconds: for how long at most
    """
    try:
        _, status = await aio.proc.wait(pid, timeout=seconds)
    except TimeoutError:
        return {"ended": False}
    return {"ended": True, "status": status}


@define
async def kill(pid: AgentPid, sig: SignalName = "TERM") -> str:
    """Sends a signal to an agent. STOP parks it with all it has started, CONT lets it go on.

    Args:
        pid: of the agent
        sig: which one
    """
    await aio.proc.kill(pid, signal.Signals[f"SIG{sig}"])
    return "sent"


@define
async def logs(pid: AgentPid, lines: Annotated[int, Meta(ge=1, le=10_000)] = 100) -> str:
    """Returns the end of what an agent in the background has written.

    Args:
        pid: of the agent
        lines: how many at most
    """
    return await asyncio.to_thread(_tail, pid, lines)


def _tail(pid: int, lines: int) -> str:
    found: dict[str, Any] = connection().call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any])
    if not found["log"]:
        return "(its output went where it was started)"
    try:
        reader = agentlog.LogReader(found["log"])
    except FileNotFoundError:
        return "(its log is gone)"
    try:
        reader.seek(tail=lines)
        data = b""
        while block := reader.read(BLOCK):
            data = (data + block)[-MOST_LOG:]
    finally:
        reader.close()
    return data.decode("utf-8", "replace")
