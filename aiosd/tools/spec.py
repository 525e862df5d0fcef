"""What the supervisor gives the toolbox. Apart, so that the supervisor imports nothing else of it."""

from __future__ import annotations

from msgspec import Struct


class ToolboxSpec(Struct, frozen=True):
    """Settings of the toolbox: the folder for its callers' folders, files of tools, calls that run at a time."""

    folder: str
    files: tuple[str, ...] = ()
    workers: int = 8
