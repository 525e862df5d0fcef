"""The live screen of aios-top: draws pictures and reads keys.

One thread waits for three things at once: keys, replies of the system, and signals (through a pipe). A busy model may
reply after a second; meanwhile keys work and the last picture stays. However the program ends, curses restores the
terminal: the end of `run`, an exception, Ctrl-C, TERM and HUP all pass through `curses.wrapper`.
"""

from __future__ import annotations

import contextlib
import curses
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiosd.commands import edge, machine, picture, signals, table
from aiosd.commands.picture import Sample, View
from aiosd.commands.terminal import Ended
from libaios.client import Client
from libaios.connection import Pending
from libaios.wire import Kill, NiceArgs, ProcInfo, Ps, Status, Sys

ESCAPE, ENTER, BACKSPACE = 27, (10, 13, curses.KEY_ENTER), (8, 127, curses.KEY_BACKSPACE)
NOTE_S = 4.0  # seconds for which the result of a key is shown

KEYS = """\
up, down, PgUp, PgDn   choose an agent (k and r ask for a
Home, End              pid where none is chosen)
k                      send a signal
r                      renice
< >                    sort by another column
R                      sort the other way round
T M C P N U            sort by tokens, memory, context, pid,
                       name, tokens/s
e                      show aiosd's own processes, too
d                      seconds between two pictures
space                  a new picture now
q                      quit
h ?                    this page; any key leaves it"""

SORT_KEYS = {"T": "tokens", "M": "mem", "C": "ctx", "P": "pid", "N": "name", "U": "rate"}
FOOT = ("q quit", "h help", "k signal", "r renice", "< > sort")


def run(client: Client, view: View, delay: float, iterations: int | None) -> int:
    """Show pictures until the user, a signal or `iterations` ends it; returns the exit code. Raises CommandFailed if
    the terminal cannot show them."""
    try:
        curses.setupterm()
    except curses.error as err:
        raise edge.CommandFailed(
            f"{os.environ.get('TERM', 'this terminal')}: {err}; for plain pictures use -b"
        ) from None
    if curses.tigetstr("cup") is None:
        raise edge.CommandFailed(
            f"terminal {os.environ.get('TERM')!r} cannot move its cursor; for plain pictures use -b"
        )
    os.environ.setdefault("ESCDELAY", "25")
    with _signals() as caught:
        return curses.wrapper(lambda window: _Screen(window, client, view, delay, caught).loop(iterations))


class _Caught:
    """Signals that the loop will handle, and a descriptor that wakes it. (ncurses would handle TSTP and WINCH itself,
    but at any moment, even while it writes to the screen.)"""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.numbers: set[int] = set()


@contextlib.contextmanager
def _signals() -> Iterator[_Caught]:
    """Catch signals: TERM and HUP end the program in order, WINCH and TSTP are handled by the loop."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    caught = _Caught(reading)

    def end(number: int, frame: object) -> None:
        raise Ended(number)

    old = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in (signal.SIGWINCH, signal.SIGTSTP):
        old[number] = signal.signal(number, lambda number, frame: caught.numbers.add(number))
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


@dataclass(slots=True)
class _Question:
    """A question on the last line, and the answer that is being typed."""

    text: str
    act: Callable[[str], str]  # called with the answer, returns the text to show; raises ValueError with a sentence
    typed: str = ""


class _Screen:
    def __init__(self, window: Any, client: Client, view: View, delay: float, caught: _Caught) -> None:
        self.window, self.client, self.view, self.delay = window, client, view, delay
        self.caught = caught
        self.old: Sample | None = None
        self.new: Sample | None = None
        self.asked: tuple[Pending, Pending] | None = None  # STATUS and PS
        self.open: list[tuple[Pending, str]] = []  # kills and renices, with what to show when they are done
        self.next_at = 0.0
        self.chosen: int | None = None  # a pid
        self.first = 0  # the first agent on the screen
        self.pids: list[int] = []  # in the order of the list
        self.question: _Question | None = None
        self.note, self.note_until = "", 0.0
        self.help = False
        self.over = False

    # ── events ──────────────────────────────────────────────────────────────────────────────────────

    def loop(self, iterations: int | None) -> int:
        self._set_up()
        poll = select.poll()
        for fd in (0, self.caught.fd, self.client.fileno()):
            poll.register(fd, select.POLLIN)
        drawn = 0
        try:
            while not self.over:
                if self._refresh():
                    drawn += 1
                    self.over = drawn == iterations
                self.draw()
                ready = dict(poll.poll(max(0.0, self._wake_in()) * 1000))
                if self.caught.fd in ready:
                    self._on_signals()
                if 0 in ready and not self._keys(ready[0]):
                    return 1
        except Ended as end:
            return 128 + int(end.args[0])
        return 0

    def _set_up(self) -> None:
        self.window.nodelay(True)
        self.window.keypad(True)
        with contextlib.suppress(curses.error):  # not every terminal can
            curses.curs_set(0)
        with contextlib.suppress(curses.error):
            curses.use_default_colors()

    def _wake_in(self) -> float:
        now = time.monotonic()
        ends = [now + 1.0 if self.asked or self.open else self.next_at]
        if self.note:
            ends.append(self.note_until)
        return min(ends) - now

    def _refresh(self) -> bool:
        """Send requests when it is time to, and receive replies; True: there is a new picture."""
        self.client.pump()
        for call, text in [entry for entry in self.open if entry[0].final is not None]:
            self.open.remove((call, text))
            self._take(call, text)
        now = time.monotonic()
        if self.asked is None and now >= self.next_at:
            self.asked = (self.client.submit(Sys.STATUS, Status()), self.client.submit(Sys.PS, Ps(all=True)))
            self.client.pump()
        if self.asked is None or any(call.final is None for call in self.asked):
            return False
        (status, ps), self.asked = self.asked, None
        self.old = self.new
        found = self.client.result(status, dict)
        figures = machine.one_line(machine.measure(found.get("home", "/")))
        self.new = Sample(now, found, self.client.result(ps, list[ProcInfo]), figures)
        self.next_at = now + self.delay
        return True

    def _take(self, call: Pending, text: str) -> None:
        try:
            self.client.result(call, None)
        except OSError as err:
            self._say(edge.reason(err))
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        self.note, self.note_until = text, time.monotonic() + NOTE_S

    def _on_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.caught.fd, 4096)
        numbers = set(self.caught.numbers)
        self.caught.numbers -= numbers
        if signal.SIGTSTP in numbers:
            self._stop()
        if numbers:
            self._resize()

    def _stop(self) -> None:
        """Restore the terminal, stop as a shell expects it, and take the terminal again after CONT."""
        curses.def_prog_mode()
        curses.endwin()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        curses.reset_prog_mode()

    def _resize(self) -> None:
        size = table.terminal_size(1)
        curses.resizeterm(size.lines, size.columns)
        self.window.clear()

    # ── keys ──────────────────────────────────────────────────────────────────────────────────────────────

    def _keys(self, events: int) -> bool:
        """Handle all keys that have been typed; False: the terminal is gone."""
        key = self.window.getch()
        if key == -1 and events & (select.POLLHUP | select.POLLERR):
            return False
        while key != -1:
            if self.question is not None:
                self._type(self.question, key)
            elif self.help:
                self.help = False
            else:
                self._press(key)
            key = self.window.getch()
        return True

    def _press(self, key: int) -> None:
        name = chr(key) if 0 < key < 256 else ""
        if name == "q":
            self.over = True
        elif name in ("h", "?"):
            self.help = True
        elif name == " ":
            self.next_at = 0.0
        elif name == "e":
            self.view.system = not self.view.system
        elif name in SORT_KEYS:
            self.view.sort = SORT_KEYS[name]
        elif name in ("<", ">"):
            place = picture.ORDER.index(self.view.sort) + (1 if name == ">" else -1)
            self.view.sort = picture.ORDER[place % len(picture.ORDER)]
        elif name == "R":
            self.view.reverse = not self.view.reverse
        elif name in ("k", "r", "d"):
            self._ask(name)
        elif key in _MOVES and self.pids:
            self._move(_MOVES[key])

    def _ask(self, name: str) -> None:
        if name == "d":
            self.question = _Question(f"seconds between two pictures [{self.delay:g}]: ", self._set_delay)
        elif self.chosen is not None:
            self._ask_about(name, self.chosen)
        elif self.pids:
            first, what = self.pids[0], "signal" if name == "k" else "renice"
            self.question = _Question(
                f"pid to {what} [{first}]: ", lambda word: self._ask_about(name, _pid(word, first))
            )
        else:
            self._say("there is no agent")

    def _ask_about(self, name: str, pid: int) -> str:
        agent = next((p for p in self.new.agents if p.pid == pid), None) if self.new else None
        label = f"{pid} {agent.name}" if agent else str(pid)
        if name == "k":
            self.question = _Question(f"signal to {label} [TERM]: ", lambda word: self._kill(pid, word))
        else:
            self.question = _Question(f"nice value of {label}: ", lambda word: self._renice(pid, word))
        return ""

    def _type(self, question: _Question, key: int) -> None:
        if key == ESCAPE:
            self.question = None
        elif key in BACKSPACE:
            question.typed = question.typed[:-1]
        elif key in ENTER:
            self.question = None
            try:
                self._say(question.act(question.typed.strip()))
            except ValueError as err:
                self._say(str(err))
        elif 32 <= key < 127:
            question.typed += chr(key)

    def _set_delay(self, word: str) -> str:
        try:
            seconds = float(word or self.delay)
        except ValueError:
            raise ValueError(f"{word!r} is no number of seconds") from None
        if not 0.1 <= seconds <= 3600:
            raise ValueError(f"{word} is out of range (from 0.1 to 3600)")
        self.delay = seconds
        self.next_at = time.monotonic() + seconds
        return f"every {seconds:g} s"

    def _kill(self, pid: int, word: str) -> str:
        number = signals.number_of(word or "TERM")
        self.open.append((self.client.submit(Sys.KILL, Kill(pid, number)), f"{signals.name_of(number)} sent to {pid}"))
        return ""

    def _renice(self, pid: int, word: str) -> str:
        if not word.lstrip("+-").isdigit() or not -20 <= int(word) <= 19:
            raise ValueError(f"{word!r} is no nice value (from -20 to 19)")
        call = self.client.submit(Sys.NICE, NiceArgs(pid, int(word)))
        self.open.append((call, f"nice value of {pid} is {int(word)}"))
        self.next_at = 0.0
        return ""

    def _move(self, step: int) -> None:
        place = self.pids.index(self.chosen) if self.chosen in self.pids else -1 if step > 0 else len(self.pids)
        self.chosen = self.pids[min(max(place + step, 0), len(self.pids) - 1)]

    # ── the screen ────────────────────────────────────────────────────────────────────────────────────────

    def draw(self) -> None:
        height, width = self.window.getmaxyx()
        self.window.erase()
        if self.help:
            for y, line in enumerate(KEYS.splitlines()):
                self._put(y, line, width, height)
        elif self.new is None:
            self._put(0, "aios-top: waiting for aiosd", width, height)
        else:
            self._draw_sample(self.new, height, width)
        self._put(height - 1, self._foot(width), width, height, curses.A_DIM)
        self.window.refresh()

    def _draw_sample(self, sample: Sample, height: int, width: int) -> None:
        top = picture.head(sample.status, width, time.time(), sample.machine)
        most = max(2, height - 8)  # leaves room for some agents
        for y, line in enumerate(top[:most]):
            self._put(y, line, width, height)
        y = min(len(top), most) + (0 if sample.machine else 1)  # a blank line, or that with the machine's figures
        title, self.pids, lines = picture.rows(sample, picture.rates(self.old, sample), self.view, width - 1)
        self._put(y, " " + title.ljust(width), width, height, curses.A_REVERSE)
        room = max(height - y - 2, 0)
        if self.chosen not in self.pids:
            self.chosen = None
        place = self.pids.index(self.chosen) if self.chosen is not None else 0
        self.first = min(max(self.first, place - room + 1), place, max(len(lines) - room, 0))
        for pid, line in zip(self.pids[self.first :][:room], lines[self.first :][:room], strict=True):
            y += 1
            chosen = pid == self.chosen
            self._put(y, (">" if chosen else " ") + line, width, height, curses.A_BOLD if chosen else curses.A_NORMAL)

    def _foot(self, width: int) -> str:
        if self.question is not None:
            return f"{self.question.text}{self.question.typed}_"
        if self.note and time.monotonic() >= self.note_until:
            self.note = ""
        if self.note:
            return self.note
        more = len(self.pids)
        shown = f"({more} agent{'s' * (more != 1)} by {self.view.sort})"
        fitting = [n for n in range(len(FOOT) + 1) if len("  ".join([*FOOT[:n], shown])) <= width]
        return "  ".join([*FOOT[: max(fitting, default=0)], shown])

    def _put(self, y: int, text: str, width: int, height: int, how: int = 0) -> None:
        if 0 <= y < height and width > 1:
            with contextlib.suppress(curses.error):  # after writing the last cell: the cursor has no place
                self.window.addstr(y, 0, table.spelled(table.cut(text, width), self.window.encoding), how)


def _pid(word: str, default: int) -> int:
    if word and not (word.isascii() and word.isdigit() and len(word) < 16):
        raise ValueError(f"{word!r} is no pid")
    return int(word or default)


_MOVES = {
    curses.KEY_UP: -1,
    curses.KEY_DOWN: 1,
    curses.KEY_PPAGE: -10,
    curses.KEY_NPAGE: 10,
    curses.KEY_HOME: -(1 << 30),
    curses.KEY_END: 1 << 30,
}
