"""Sealed settings: those for one process alone lie in a memfd that the supervisor never reads.

All agents begin as copies of the supervisor's memory. So the supervisor must not have the environment of agents that
start with the system (only the kernel reads that), nor the keys of MCP servers (only the toolbox reads these). The
process that reads the settings (`apart`) writes both here.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiosd.config.autostart import AgentSpec
    from aiosd.tools.spec import McpServer


def write(fd: int, agents: tuple[AgentSpec, ...], servers: Mapping[str, McpServer]) -> bytes:
    """Write both into an empty memfd, and return the written bytes."""
    content = pickle.dumps(dict(servers)) + pickle.dumps(agents)
    os.pwrite(fd, content, 0)
    return content


def servers(fd: int) -> dict[str, McpServer]:
    return dict(_parts(fd)[0])


def agents(fd: int) -> tuple[AgentSpec, ...]:
    return tuple(_parts(fd)[1])


def _parts(fd: int) -> tuple[Any, Any]:
    stream = io.BytesIO(os.pread(fd, os.fstat(fd).st_size, 0))
    return pickle.load(stream), pickle.load(stream)
