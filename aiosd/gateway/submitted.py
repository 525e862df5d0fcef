"""AIOS's /agents/…: agents that the gateway starts for a program. They are its children, with its rights and budgets.

The started program is `run-agent` of Cerebrum's SDK, as the program itself would start it: in its folder, with its
environment. A number in AIOS's API (`execution_id`) is a pid here, and its result is the end of the agent's log.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from msgspec import Struct

from aiosd import threads
from aiosd.gateway.calls import ask
from aiosd.gateway.filing import checked
from aiosd.gateway.openai import fields
from aiosd.gateway.web import HttpRequest, Problem
from libaios import sandbox, wire
from libaios.wire import Sys

RESULT_BYTES = 64 << 10
PROGRAM = "run-agent"
HIDDEN = ("AIOS_CHANNEL", "AIOS_PID")  # the program's own
_threads = ThreadPoolExecutor(4, "submitted")  # one is started when it is needed
LOGS = "log"  # under this name an agent's line of INSPECT has the path of its log


class SubmitRequest(Struct, kw_only=True):
    agent_id: str
    agent_config: dict[str, Any] = {}


async def submit(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), SubmitRequest)
    task = asked.agent_config.get("task")
    if not isinstance(task, str):
        raise Problem(400, "agent_config.task: a text", param="agent_config.task")
    folder, env = await _surroundings(request)
    name = re.sub(r"[^\w.-]+", "_", asked.agent_id, flags=re.ASCII).strip("._-")[:64]
    words = [*_which(asked.agent_id), "--task_input", task]
    # An agent started by a program from outside is confined as one started by a person; an agent's child as its parent.
    wish = partial(sandbox.wish, "exec", PROGRAM, wire.os_str(folder), env, args=words)
    box = await asyncio.wrap_future(threads.submit(_threads, wish))  # it looks at files
    args = wire.Spawn(
        "exec", PROGRAM, words, env, folder,
        name=f"_{name}"[:64] if name.isdecimal() or not name else name, detached=True, sandbox=box,
    )  # fmt: skip
    try:
        spawned = await ask(request.account.connection, Sys.SPAWN, checked(args), wire.Spawned)
    except FileNotFoundError:
        message = f"{PROGRAM} is not in the PATH of the program that asks (pip install aios-agent-sdk)"
        raise wire.error(errno.ENOENT, message) from None
    message = f"Agent {asked.agent_id} submitted for execution"
    await request.reply({"status": "success", "execution_id": spawned.pid, "message": message})


def _which(ident: str) -> list[str]:
    """Arguments that name a folder with an agent in it, or an agent of the hub: author/name or author/name/version."""
    author, slash, name = ident.partition("/")
    if not slash or not author or author.startswith("."):
        return ["--mode", "local", "--agent_path", ident]
    name, _, version = name.partition("/")
    found = ["--mode", "remote", "--agent_author", author, "--agent_name", name]
    return [*found, "--agent_version", version] if version else found


async def _surroundings(request: HttpRequest) -> tuple[str, dict[str, str]]:
    """Folder and environment of the program that sent the request. Raises Problem."""
    process = await request.app.accounts.process_of(request.connection)
    try:
        folder = os.readlink(f"/proc/{process}/cwd")
        with open(f"/proc/{process}/environ", "rb") as file:
            lines = file.read().split(b"\0")
    except OSError:
        raise Problem(403, "the program that asks cannot be looked at", "permission_error") from None
    pairs = (line.partition(b"=") for line in lines if b"=" in line[1:])
    env = {wire.os_text(name): wire.os_text(value) for name, _, value in pairs}
    return wire.os_text(folder), {name: value for name, value in env.items() if name not in HIDDEN}


async def ps(request: HttpRequest) -> None:
    """The agents that the program has started."""
    lines = await _children(request, wire.Ps(dead=True))
    processes = [_shown(line) for line in sorted(lines, key=lambda line: line.pid)]
    await request.reply({"status": "success", "count": len(processes), "processes": processes})


async def _children(request: HttpRequest, args: wire.Ps) -> list[wire.ProcInfo]:
    lines = await ask(request.account.connection, Sys.PS, args, list[wire.ProcInfo])
    return [line for line in lines if line.ppid == request.account.pid]


def _shown(line: wire.ProcInfo) -> dict[str, Any]:
    status = "running" if line.exit is None else "completed" if line.exit == 0 else "error"
    return {"id": line.pid, "agent_id": line.name, "status": status, "start_time": line.started}


async def status(request: HttpRequest) -> None:
    pid = request.words["pid"]
    lines = await _children(request, wire.Ps(pids=[int(pid)], dead=True)) if pid.isdecimal() and len(pid) < 16 else []
    if not lines:
        raise Problem(404, f"{pid[:20]}: no agent that this program has submitted", "not_found_error")
    shown = {"status": _shown(lines[0])["status"], "execution_id": lines[0].pid}
    if shown["status"] == "running":
        await request.reply({**shown, "message": "Execution in progress"})
        return
    about = await ask(request.account.connection, Sys.INSPECT, wire.PidArgs(lines[0].pid), dict[str, Any])
    text = _end_of(about[LOGS])
    if shown["status"] == "completed":
        await request.reply({**shown, "result": text})
    else:
        await request.reply({**shown, "error": {"message": f"exit code {lines[0].exit}", "traceback": text}})


def _end_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - RESULT_BYTES))
            return file.read(RESULT_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
