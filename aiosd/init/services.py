"""The services of a system: one record each, made from the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiosd.gateway.spec import GatewaySpec
from aiosd.ipc.service import GATEWAY, LLM, PROXY, TOOLBOX, ServiceSpec, Stopped
from aiosd.net.spec import ProxySpec
from aiosd.store.main import StoreSpec
from aiosd.tools.spec import ToolboxSpec

if TYPE_CHECKING:
    from aiosd.config import Settings


def of(settings: Settings, servers: int) -> list[ServiceSpec]:
    """The services in the order in which they are started. The first core is the default one. `servers`: the socket
    over which the toolbox has MCP servers forked."""
    alone = len(settings.models) == 1
    cores = [
        ServiceSpec(
            name=f"{LLM}:{model.name}",
            kind=LLM,
            entry="aiosd.llm.core:main",
            title=LLM if alone else f"{LLM}:{model.name}",
            argument=model,
        )
        for model in settings.models
    ]
    vectors = [
        ServiceSpec(
            name=f"{LLM}:{model.name}",
            kind=LLM,
            entry="aiosd.llm.embedcore:main",
            title=f"{LLM}:{model.name}",
            argument=model,
        )
        for model in [settings.embedder]
        if model is not None
    ]
    store = ServiceSpec(
        name="store",
        kind="store",
        entry="aiosd.store.main:main",
        argument=_store(settings),
    )
    toolbox = ServiceSpec(
        name=TOOLBOX,
        kind=TOOLBOX,
        entry="aiosd.tools.main:main",
        confines=True,
        argument=ToolboxSpec(
            str(settings.home.data / "tools"), settings.tools, settings.tool_workers, settings.sealed, servers
        ),
        keep=(settings.sealed, servers),
    )
    return [*cores, *vectors, store, toolbox, *_proxy(settings), *_gateway(settings), *settings.services]


def _store(settings: Settings) -> StoreSpec:
    model, home = settings.embedder, settings.home
    return StoreSpec(
        str(home.data / "store"),
        settings.store_ram,
        settings.note_quota,
        settings.file_quota,
        settings.file_versions,
        settings.store_folders,
        settings.index_ram,
        settings.embed_table,
        model.name if model is not None else "",
        model.path if model is not None else "",
        str(home.root) if home.explicit else None,
        settings.owner_ram,
    )


def _proxy(settings: Settings) -> list[ServiceSpec]:
    ends = settings.passages
    if ends is None:
        return []
    guests = ends.proxy if settings.door is not None else -1
    return [
        ServiceSpec(
            name=PROXY,
            kind=PROXY,
            entry="aiosd.net.main:main",
            argument=ProxySpec(ends.gates, guests),
            awaited=False,
            stopped=Stopped.FIRST,
            keep=(ends.gates, *([guests] if guests >= 0 else [])),
        )
    ]


def _gateway(settings: Settings) -> list[ServiceSpec]:
    """The gateway; [] if its packages are not installed, or it is switched off."""
    door, ends = settings.door, settings.passages
    if door is None:
        return []
    guests = ends.guests if ends is not None else -1
    return [
        ServiceSpec(
            name=GATEWAY,
            kind=GATEWAY,
            entry="aiosd.gateway.main:main",
            argument=GatewaySpec(settings.home, door, guests),
            awaited=False,
            stopped=Stopped.FIRST,
            keep=(*(one.fd for one in door.all), *([guests] if guests >= 0 else [])),
        )
    ]
