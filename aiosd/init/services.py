"""Which services a system has: one record each, from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiosd.gateway.superior import GatewaySpec
from aiosd.service import LLM, Service
from aiosd.store.main import StoreSpec
from aiosd.tools.spec import ToolboxSpec

if TYPE_CHECKING:
    from aiosd.config import Settings


def of(settings: Settings) -> list[Service]:
    """In the order in which they are started. The first core is the default one."""
    alone = len(settings.models) == 1
    cores = [
        Service(
            name=f"{LLM}:{model.name}",
            kind=LLM,
            entry="aiosd.llm.core:main",
            title=LLM if alone else f"{LLM}:{model.name}",
            argument=model,
        )
        for model in settings.models
    ]
    store = Service(
        name="store",
        kind="store",
        entry="aiosd.store.main:main",
        argument=StoreSpec(str(settings.home.data / "store"), settings.store_ram, settings.note_quota),
    )
    toolbox = Service(
        name="toolbox",
        kind="toolbox",
        entry="aiosd.tools.main:main",
        argument=ToolboxSpec(
            str(settings.home.data / "work"), settings.tools, settings.tool_workers, dict(settings.mcp_servers)
        ),
    )
    return [*cores, store, toolbox, *_gateway(settings), *settings.services]


def _gateway(settings: Settings) -> list[Service]:
    """None where its packages are not installed, or it was not wanted."""
    door = settings.door
    if door is None:
        return []
    return [
        Service(
            name="gateway",
            kind="gateway",
            entry="aiosd.gateway.main:main",
            argument=GatewaySpec(settings.home, door),
            awaited=False,
            keep=(door.fd,),
        )
    ]
