"""The commands of `bin/`, one file each.

A command talks to a running aiosd through `libaios.client` and knows nothing else of the system. This file is
the edge that all of them pass: it turns what went wrong into one line on stderr and an exit code.

    0 done · 1 failed, or no aiosd · 2 used wrongly · 130 Ctrl-C · 141 the reader of the output went away

The 130 is a shell's word: a command dies of the signal, else `while :; do aios-run …; done` would go on after Ctrl-C.

Start-up time is part of the contract (`benchmarks/startup.py`): a command imports click, msgspec and the
client, and nothing that is not needed to answer. What is needed seldom is imported where it is.
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
}


def main(program: str) -> NoReturn:
    """Run the command `program` with the arguments of this process, and end the process."""
    interrupted = False
    gc.disable()  # until all is imported: there is nothing to collect in what stays
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
    os._exit(code)  # nothing is left to tidy up; tearing the interpreter down would cost a tenth of the time


def _open_standard_descriptors() -> None:
    """Started with a closed descriptor 0, 1 or 2, a command would find its first socket there."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
    # Python has given up on such streams; the commands have not.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout.buffer, io.FileIO) or not os.get_blocking(1):
        sys.stdout = _patient_stdout()


def _patient_stdout() -> io.TextIOWrapper:
    """Under PYTHONUNBUFFERED Python drops what a write did not take, and a pipe that does not block takes a part."""
    unbuffered = isinstance(sys.stdout.buffer, io.FileIO)
    binary: Any = _PatientFile(1, "wb", closefd=False)
    if not unbuffered:
        binary = io.BufferedWriter(binary)
    by_lines = sys.stdout.line_buffering
    return io.TextIOWrapper(binary, sys.stdout.encoding, line_buffering=bool(by_lines), write_through=unbuffered)


class _PatientFile(io.FileIO):
    """Writes all that it is given, however long the reader takes."""

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            written = super().write(rest)
            if written is None:  # full, and does not block
                import select

                poll = select.poll()
                poll.register(self.fileno(), select.POLLOUT)
                poll.poll()
            rest = rest[written or 0 :]
        return size
