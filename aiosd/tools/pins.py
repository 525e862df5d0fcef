"""Pins: hashes of the descriptions of MCP servers' tools, as they were when they were first seen.

A server's description of a tool goes into the prompts of agents, so a server could later change it into instructions of
its own. Each description is kept here as a hash; a tool with a changed description is held back until a person accepts
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from msgspec import json as msgspec_json

from aiosd.tools.messages import Tool


class Pins:
    """The hashes in a file. A file that cannot be read counts as empty; a hash that cannot be written is kept until the
    end of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._changed: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            self._known = {str(name): str(pin) for name, pin in found.items()} if isinstance(found, dict) else {}

    def holds(self, tool: Tool) -> bool:
        """Is the description the same as when it was first seen or accepted? A new tool is recorded."""
        pin = hashlib.sha256(msgspec_json.encode((tool.description, tool.parameters), order="sorted")).hexdigest()
        if self._known.setdefault(tool.name, pin) != pin:
            self._changed[tool.name] = pin
            return False
        self._changed.pop(tool.name, None)
        self._write()
        return True

    def accept(self, name: str) -> bool:
        """Accept the current description of a tool. False: it is not held back."""
        pin = self._changed.pop(name, None)
        if pin is None:
            return False
        self._known[name] = pin
        self._write()
        return True

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(self._known, indent=1, sort_keys=True))
            os.replace(new, self._path)
