"""Shows a picture again and again, for `aios-ps --watch`: on a terminal at the same place, else one after another."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import tty
from collections.abc import Callable

from aiosd.commands import table
from aiosd.commands.terminal import Ended, RawMode, in_foreground

ENTER = "\x1b[?1049h\x1b[?25l"  # the second screen of the terminal, without a cursor
LEAVE = "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def run(picture: Callable[[], list[str]], title: str, seconds: float) -> int:
    """Show it until the key q or a signal; returns the exit code. Ctrl-C raises KeyboardInterrupt. The terminal is
    restored in each case."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return _one_after_another(picture, seconds)
    keys = RawMode(0, tty.setcbreak)
    old = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    old[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, lambda number, frame: _stop(keys))
    _write(ENTER)
    try:
        while True:
            _write(_screen(picture(), f"{title}   every {seconds:g} s   {time.strftime('%H:%M:%S')}   q quits"))
            if _quits(keys, time.monotonic() + seconds):
                return 0
    except Ended as end:
        return 128 + int(end.args[0])
    finally:
        keys.leave()
        _write(LEAVE)
        for number, handler in old.items():
            signal.signal(number, handler)


def _one_after_another(picture: Callable[[], list[str]], seconds: float) -> int:
    while True:
        print("\n".join(picture()), end="\n\n", flush=True)
        time.sleep(seconds)


def _quits(keys: RawMode, until: float) -> bool:
    """Wait for the time of the next picture; True: the user has typed q. Keys that are typed for other programs, while
    this one is in the background, are not read."""
    while (left := until - time.monotonic()) > 0:
        if not os.isatty(0) or not in_foreground(0):
            time.sleep(left)
        else:
            keys.enter()
            if select.select([0], [], [], left)[0] and in_foreground(0):
                typed = os.read(0, 4096)
                if b"q" in typed or not typed:  # nothing: the terminal is gone
                    return True
    return False


def _screen(lines: list[str], title: str) -> str:
    """The text that fills the screen from its first line, cut so that nothing scrolls."""
    size = table.terminal_size(1)
    room = max(size.lines - 2, 1)
    shown = [title[: size.columns], *lines[:room]]
    if len(lines) > room:
        shown[-1] = f"… {len(lines) - room + 1} more lines"[: size.columns]
    return HOME + "\n".join(line + END_OF_LINE for line in shown) + END_OF_SCREEN


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, frame: object) -> None:
    raise Ended(number)


def _stop(keys: RawMode) -> None:
    """Ctrl-Z: restore the terminal, stop as a shell expects it, and take the terminal again after CONT."""
    keys.leave()
    _write(LEAVE)
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)
    _write(ENTER)
