"""The commands of `bin/`, one file for each.

A command uses a running aiosd through `libaios.client` and knows nothing else of the system. `main` below runs all of
them. Every error becomes one line on stderr and an exit code:

    0 done · 1 failed, or no aiosd · 2 used wrongly · 130 Ctrl-C · 141 the reader of the output has gone

130 is what a shell shows: the command really dies of the signal. If it only exited with 130, a loop such as
`while :; do aios-run …; done` would continue after Ctrl-C.

A short start is part of the contract (`benchmarks/startup.py`): a command imports click, msgspec and the client, and
nothing that it does not need. Modules that are seldom needed are imported inside the function that needs them.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Any, NoReturn

MODULES = {
    "aiosd": "aiosd.commands.cli",
    "aios-run": "aiosd.commands.run",
    "aios-attach": "aiosd.commands.attach",
    "aios-ps": "aiosd.commands.ps",
    "aios-kill": "aiosd.commands.kill",
    "aios-logs": "aiosd.commands.logs",
    "aios-wait": "aiosd.commands.wait",
    "aios-inspect": "aiosd.commands.inspect",
    "aios-renice": "aiosd.commands.renice",
    "aios-top": "aiosd.commands.top",
    "aios-sto": "aiosd.commands.sto",
    "aios-approve": "aiosd.commands.approve",
}


def main(program: str) -> NoReturn:
    """Run the command `program` with the arguments of this process, and end the process."""
    interrupted = False
    gc.disable()  # until everything is imported: modules stay, so there is nothing to collect
    try:
        _open_standard_descriptors()
        from aiosd.commands.edge import run

        code = run(program, MODULES[program], sys.argv[1:])
    except KeyboardInterrupt:
        code = 128 + 2
        interrupted = True
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 141
    except OSError as err:  # a full disk
        print(f"{program}: {err.strerror}", file=sys.stderr)
        code = code or 1
    if interrupted:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)  # nothing is left to clean up, and Python's own end would take a tenth of the time


def _open_standard_descriptors() -> None:
    """Open 0, 1 and 2 where the caller has closed them: else the first socket would get such a number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
    # Python sets a stream to None if its descriptor was closed at the start; the commands use all three.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout.buffer, io.FileIO) or not os.get_blocking(1):
        sys.stdout = _patient_stdout()


def _patient_stdout() -> io.TextIOWrapper:
    """A stdout that writes everything. A non-blocking pipe may take only a part of a write, and under PYTHONUNBUFFERED
    Python drops the rest."""
    unbuffered = isinstance(sys.stdout.buffer, io.FileIO)
    binary: Any = _PatientFile(1, "wb", closefd=False)
    if not unbuffered:
        binary = io.BufferedWriter(binary)
    by_lines = sys.stdout.line_buffering
    return io.TextIOWrapper(binary, sys.stdout.encoding, line_buffering=bool(by_lines), write_through=unbuffered)


class _PatientFile(io.FileIO):
    """Writes all data, however slowly the reader reads."""

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            written = super().write(rest)
            if written is None:  # the pipe is full, and does not block
                import select

                poll = select.poll()
                poll.register(self.fileno(), select.POLLOUT)
                poll.poll()
            rest = rest[written or 0 :]
        return size
