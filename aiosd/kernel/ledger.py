"""The usage of each agent, kept where it survives the kernel's death.

A memfd of rows, one per agent, made by the supervisor and mapped by every kernel; two dozen 8-byte numbers a row. A
group's budget has a row of its own, under a number that no agent has.

    of an agent     pid; calls; prompt tokens, cached tokens, completion tokens; cost; microseconds of processor time,
                    its own and that of its calls of tools; flags: it has been counted as a child, its end has been
                    counted
    of the budget   that it owns: tokens and money charged, calls of tools, children, bytes written to the store,
                    microseconds of processor time, the start of its time (a group's), and for which kinds the message
                    "nearly used up" was sent
    of its door     the last request that was received there (`sandbox.doors.DoorRequest`)

and after these the beginning of its command line, which the kernel shows and the supervisor must not know.

A row holds the usage of *closed* calls. The usage of open calls is only in the kernel's memory: after its death they
are submitted again, and their usage is counted again from their tokens. So nothing is counted twice and nothing is
lost, without a record per token. All other counts of budgets are written when they change.
"""

from __future__ import annotations

import mmap
import os

ROWS = 16384
ITEMS = 24
PID, CALLS, PROMPT, CACHED, COMPLETION, CHARGED = range(6)
TOOL_CALLS, CHILDREN, STORED, CPU_US, SINCE_US, NOTIFIED, OWN_CPU_US, COUNTED, ENDED = range(6, 15)
COST, COST_CHARGED = range(15, 17)
TOOLS_CPU_US = 17
DOOR_ID, DOOR_OSPID, DOOR_FAMILY, DOOR_TYPE = range(18, 22)
NUMBERS_BYTES = ROWS * ITEMS * 8
COMMAND_BYTES = 1024  # of a command line, with a NUL at its end
BYTES = NUMBERS_BYTES + ROWS * COMMAND_BYTES

LedgerRow = memoryview  # of ITEMS unsigned 8-byte numbers


def loose_row() -> LedgerRow:
    """A row that no later kernel finds."""
    return memoryview(bytearray(ITEMS * 8)).cast("Q")


class Ledger:
    def __init__(self, memfd: int) -> None:
        os.ftruncate(memfd, BYTES)  # has no effect the second time; pages that are never written cost nothing
        self._memfd = memfd
        self._items = memoryview(mmap.mmap(memfd, NUMBERS_BYTES)).cast("Q")
        self._rows: dict[int, int] = {}
        self._free: list[int] = []
        for number in reversed(range(ROWS)):
            pid = self._items[number * ITEMS + PID]
            if pid:
                self._rows[pid] = number
            else:
                self._free.append(number)

    def row(self, pid: int) -> LedgerRow:
        """The agent's row, new or as a dead kernel left it. Beyond `ROWS` agents: a row that does not survive the
        kernel."""
        number = self._rows.get(pid)
        if number is None:
            if not self._free:
                return loose_row()
            number = self._rows[pid] = self._free.pop()
            self._items[number * ITEMS + PID] = pid
        return self._items[number * ITEMS : (number + 1) * ITEMS]

    @property
    def room(self) -> bool:
        """Whether there is room for one more row that survives."""
        return bool(self._free)

    def keep_command(self, pid: int, command: str) -> None:
        """Keep a command line for the next kernel. This part is not mapped, because it is read only once."""
        number = self._rows.get(pid)
        if number is not None:
            text = command.encode("utf-8", "backslashreplace")[: COMMAND_BYTES - 1]
            os.pwrite(self._memfd, text + b"\0", NUMBERS_BYTES + number * COMMAND_BYTES)

    def command(self, pid: int) -> str:
        number = self._rows.get(pid)
        if number is None:
            return ""
        text = os.pread(self._memfd, COMMAND_BYTES, NUMBERS_BYTES + number * COMMAND_BYTES)
        return text.partition(b"\0")[0].decode("utf-8", "ignore")  # its last character may have been cut

    def pids(self) -> set[int]:
        return set(self._rows)

    def forget(self, pid: int) -> None:
        number = self._rows.pop(pid, None)
        if number is not None:
            for item in range(ITEMS):
                self._items[number * ITEMS + item] = 0
            self._free.append(number)
