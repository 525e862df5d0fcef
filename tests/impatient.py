"""An aiosd that waits less long for a sign of life from its parts, so that tests of parts that hang need not."""

from __future__ import annotations

import sys

HANG_S = 2.0

#: The guardian keeps its patience: were the supervisor late once on a busy machine, the whole system would end.
_CODE = f"""
from aiosd.ipc import heartbeat
usual, heartbeat.HANG_S = heartbeat.HANG_S, {HANG_S}
import aiosd.ipc.service
heartbeat.HANG_S = usual
from aiosd.commands import main
main("aiosd")
"""

PROGRAM = (sys.executable, "-c", _CODE)
