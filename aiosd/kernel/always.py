"""The permissions that a person has given for all times. They are in a file of their own, which people can read, and
`aios-approve` can revoke them.

The file is read when the kernel starts, and written by the kernel alone. A file that cannot be read allows nothing.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from aiosd.access.deed import Deed, Subject
from aiosd.access.rules import LastingApproval, lasting
from libaios import wire

logger = logging.getLogger("kernel")

MOST = 10_000


class LastingApprovals:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[int, LastingApproval] = {}
        try:
            found = msgspec.json.decode(path.read_bytes(), type=list[LastingApproval])
            self._entries = {entry.number: entry for entry in found}
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as err:
            logger.error("%s cannot be read, so nothing is allowed for all times: %s", path, err)

    def covering(self, subject: Subject, deed: Deed) -> LastingApproval | None:
        return next((entry for entry in self._entries.values() if entry.covers(subject, deed)), None)

    def add(self, subject: Subject, deed: Deed, agent: str, now: float) -> LastingApproval:
        """Add a permission. Raises OSError if it could not be written; then it is not in force."""
        entry = lasting(max(self._entries, default=0) + 1, subject, deed, agent, now)
        if len(self._entries) >= MOST:
            raise OSError(28, f"{MOST} approvals for all times are kept; revoke some: aios-approve --revoke")
        self._save({**self._entries, entry.number: entry})
        return entry

    def revoke(self, number: int) -> LastingApproval | None:
        """Remove a permission and return it; None: there is none of this number. Raises OSError."""
        entry = self._entries.get(number)
        if entry is not None:
            self._save({other: one for other, one in self._entries.items() if other != number})
        return entry

    def listed(self) -> list[wire.Always]:
        return [wire.Always(entry.number, entry.shown, entry.agent, entry.given) for entry in self._entries.values()]

    def _save(self, entries: dict[int, LastingApproval]) -> None:
        new = self._path.with_suffix(".new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(list(entries.values()))) + b"\n")
            file.flush()
            os.fsync(file.fileno())  # a person waits for this, and it is rare
        os.replace(new, self._path)
        self._entries = entries
