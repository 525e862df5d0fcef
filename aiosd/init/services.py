"""Which services a system has: one record each, from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        argument=StoreSpec(
            str(settings.home.data / "store"),
            settings.store_ram,
            settings.note_quota,
            settings.file_quota,
            settings.file_versions,
            settings.store_folders,
        ),
    )
    toolbox = Service(
        name="toolbox",
        kind="toolbox",
        entry="aiosd.tools.main:main",
        argument=ToolboxSpec(
            str(settings.home.data / "work"), settings.tools, settings.tool_workers, dict(settings.mcp_servers)
        ),
    )
    return [*cores, store, toolbox, *settings.services]
