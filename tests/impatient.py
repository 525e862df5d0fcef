"""An aiosd that waits for heartbeats less long, so that tests of processes that hang take less time."""

from __future__ import annotations

import sys

HANG_S = 2.0

#: The guardian's time is not changed: a supervisor that is late once on a busy machine would end the whole system.
_CODE = f"""
from aiosd.ipc import heartbeat
usual, heartbeat.HANG_S = heartbeat.HANG_S, {HANG_S}
import aiosd.ipc.service
heartbeat.HANG_S = usual
from aiosd.commands import main
main("aiosd")
"""

PROGRAM = (sys.executable, "-c", _CODE)
