"""aios-attach: watch a detached agent as if it had been started here, and type at its terminal if it has one.

    $ aios-run -d --name planner planner.py
    7
    $ aios-attach --tail 1 planner
    step 3 of 4
    step 4 of 4

It shows the agent's log, from its last lines on. If the agent was started with `aios-run -d -t`, typed keys are sent to
it, through the process that holds its terminal (`aiosd.commands.holder`). This process is one loop over four sources:
the connection to the kernel (which reports the agent's end), the log, the signals it receives, and that holder.

Detaching changes nothing for the agent. So signals that end this process (HUP, TERM) are not passed on to it; INT and
QUIT, which a person types, are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import click

from aiosd.commands import agents, asks, detachkeys, edge
from aiosd.commands.wait import UNKNOWN, exit_code
from aiosd.logs import agentlog
from libaios.client import Client, NoKernel
from libaios.connection import Pending, decode_body
from libaios.wire import Kill, PidArgs, Sys, Wait, Waited, WatchAsks

if TYPE_CHECKING:
    from aiosd.commands.terminal import RawMode

FAILED = 125  # as aios-run
LINES = 10  # earlier lines that are shown at first; on a terminal as many as fill the window, if that is more
POLL_S = 0.1  # seconds between two checks of the log, if no holder reports new output
LAST_OUTPUT_S = 3.0  # how long the holder may take to write the last output after the agent's end
CHUNK = select.PIPE_BUF  # after POLLOUT a write of this size does not block, though the pipe is a blocking one
TO_AGENT = (signal.SIGINT, signal.SIGQUIT)
ENDING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)

# Switches off what a full-screen program may have switched on: mouse reports, bracketed paste, the second screen, a
# hidden cursor, colours. Where nothing is switched on, it does nothing.
PLAIN = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?47l\x1b[?25h\x1b[m"

EXAMPLES = """
  aios-attach planner           its last output, then what it prints
  aios-attach --tail 0 7        only what it prints from now on
  aios-attach --no-signals 7    Ctrl-C leaves it alone
  aios-run -dt --name sh -- bash; aios-attach sh
"""


class Keys(click.ParamType[bytes]):
    name = "list of keys"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        try:
            return value if isinstance(value, bytes) else detachkeys.parse(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)


@edge.new(
    click.Command,
    "Watch a detached agent (aios-run -d): the end of its log, then all that it goes on to print, until it ends. "
    "A NAME stands for the newest agent of that name.\n\n"
    "Ctrl-C sends INT to the agent and Ctrl-\\ sends QUIT, as with aios-run. Ctrl-Z stops aios-attach alone. Closing "
    "the terminal only detaches. A detached agent has no stdin, so what is typed does not reach it.\n\n"
    "An agent that was started with aios-run -d -t has a terminal: what is typed here (on a terminal) goes there, "
    "Ctrl-C too, and Ctrl-P Ctrl-Q detaches. Several may be attached at once; the window size is that of the last "
    "one.\n\n"
    "Exits with the agent's exit code; 128+n when signal n ended it; 124 when a budget did; 0 after the keys that "
    "detach; 125 when there is no aiosd, or the agent is not a detached one; 127 when there is no such agent.",
    "[--tail N] [--no-signals] [--detach-keys KEYS]",
    EXAMPLES,
)
@click.option(
    "-n",
    "--tail",
    type=edge.Whole(min=0),
    metavar="N",
    help=f"Lines of its earlier output: {LINES}, or as many as the terminal has; 0: none.",
)
@click.option("--no-signals", is_flag=True, help="Ctrl-C and Ctrl-\\ end aios-attach only, not the agent.")
@click.option(
    "--detach-keys",
    type=Keys(),
    default=detachkeys.DEFAULT,
    show_default=True,
    metavar="KEYS",
    help="Keys that detach from a terminal: characters and ctrl-X, separated by commas; empty: none.",
)
@click.argument("word", metavar="PID|NAME", shell_complete=agents.complete)
def command(tail: int | None, no_signals: bool, detach_keys: bytes, word: str) -> int:
    try:
        with edge.connect() as client:
            view = _open(client, word)
            view.pass_signals = not no_signals
            view.keys = detachkeys.DetachKeys(detach_keys)
            return view.run(tail)
    except NoKernel as err:
        raise edge.CommandFailed(edge.reason(err), FAILED) from None
    except OSError as err:
        if err.errno != errno.ENOTCONN:
            raise
        raise edge.CommandFailed(edge.reason(err), FAILED) from None


def _open(client: Client, word: str) -> AttachedView:
    try:
        pid = agents.newest(client, word)
        found: dict[str, Any] = client.call(Sys.INSPECT, PidArgs(pid), dict[str, Any])
    except ProcessLookupError as err:
        raise edge.CommandFailed(edge.reason_about(word, err), UNKNOWN) from None
    except PermissionError as err:
        raise edge.CommandFailed(edge.reason_about(word, err), FAILED) from None
    except edge.CommandFailed as err:
        raise edge.CommandFailed(str(err), UNKNOWN) from None
    if not found["log"]:
        raise edge.CommandFailed(f"{word}: not detached; its output goes where aios-run was started", FAILED)
    try:
        return AttachedView(client, pid, agentlog.LogReader(found["log"]))
    except FileNotFoundError:
        raise edge.CommandFailed(f"{word}: its log is gone ({found['log']})", FAILED) from None


class AttachedView:
    """One agent, shown by this command."""

    def __init__(self, client: Client, pid: int, log: agentlog.LogReader) -> None:
        self.client, self.pid, self.log = client, pid, log
        self.readable = client.fileno()
        self.pass_signals = True
        self.keys = detachkeys.DetachKeys(b"")
        self.holder: socket.socket | None = None  # the holder of its terminal, if keys are sent there
        self.raw: RawMode | None = None
        self.buffer = b""  # read from the log, not yet shown
        self.interrupted = False  # by an INT, which the agent got
        self.detached = False  # by the detach keys
        self.wakeup = -1
        self.end: Pending = client.submit(Sys.WAIT, Wait(pid))
        self.asked = asks.watch(client, WatchAsks(pid))
        self.end_by = 0.0  # how long to wait for the last output; 0: the agent lives

    def run(self, tail: int | None) -> int:
        """Show the agent until its end, or until the user detaches; returns the exit code."""
        self._connect_terminal()
        self._catch_signals()
        try:
            self.log.seek(tail=self._lines() if tail is None else tail)
            self._show()
        finally:
            self._leave()
        if self.detached:
            edge.complain("aios-attach", f"detached; agent {self.pid} goes on")
            return 0
        assert self.end.final is not None
        waited: Waited = decode_body(self.end.final, Waited)
        if waited.reason or waited.budget:
            edge.complain("aios-attach", f"agent {self.pid}: {waited.reason or waited.budget + ' budget used up'}")
        if self.interrupted and waited.status == -signal.SIGINT:
            raise KeyboardInterrupt
        return exit_code(waited)

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def _show(self) -> None:
        """Show output until the agent has ended and all is shown, or the user detaches."""
        while not self.detached:
            self._enter()
            self.client.pump()
            if self.client.socket.reborn:  # a new kernel: send open calls again at once
                self.client.pump()
            self._show_asks()
            over = self._over()
            if not self.buffer:
                self.buffer = self.log.read()
            if over and not self.buffer:
                return
            if self.holder is None and not self.buffer:  # no key can be sent any more: let Ctrl-C be a signal again
                self._leave()
                self.raw = None
            self._turn()

    def _show_asks(self) -> None:
        for line in asks.notices(self.asked):
            os.write(2, f"\r\naios-attach: {line}\r\n".encode())

    def _over(self) -> bool:
        """Whether the agent has ended and its last output is in the log. Must be called before the log is read."""
        if self.end.final is None:
            return False
        self.end_by = self.end_by or time.monotonic() + LAST_OUTPUT_S
        return self.holder is None or time.monotonic() >= self.end_by

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        if self.end.final is None:
            poll.register(self.readable, select.POLLIN)
        poll.register(1, select.POLLOUT if self.buffer else 0)  # 0: only reports when the reader of the output has gone
        if self.holder is not None:
            poll.register(self.holder, select.POLLIN)
            if self._may_read_keys():
                poll.register(0, select.POLLIN)
        over = self.end.final is not None and self.holder is None
        ready = dict(poll.poll(None if self.buffer else 0 if over else POLL_S * 1000))
        if self.wakeup in ready:
            for number in os.read(self.wakeup, 4096):
                self._on_signal(number)
        if ready.get(1):
            self._write(ready[1])
        if self.holder is not None and self.holder.fileno() in ready:
            self._receive_from_holder(self.holder)
        if 0 in ready and self.holder is not None:
            self._read_keys(self.holder)

    def _write(self, mask: int) -> None:
        if not self.buffer:
            if mask & (select.POLLERR | select.POLLHUP):
                raise BrokenPipeError
            return
        with contextlib.suppress(BlockingIOError):
            self.buffer = self.buffer[os.write(1, self.buffer[:CHUNK]) :]

    # ── signals ───────────────────────────────────────────────────────────────────────────────────────────

    def _catch_signals(self) -> None:
        """From now on these signals arrive as bytes in a pipe. One that was ignored at the start (nohup) stays so."""
        self.wakeup, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        caught: tuple[signal.Signals, ...] = TO_AGENT if self.pass_signals else ()
        if self.holder is not None:  # the terminal must be restored before this process ends or stops
            caught = (*ENDING, signal.SIGTSTP, signal.SIGWINCH)
        for number in caught:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._send_size()
        elif number == signal.SIGTSTP:
            self._stop()
        elif self.raw is not None:  # keys go to the agent, so this signal is meant for this process
            self._leave()
            _die_of(number)
        elif number in TO_AGENT:
            self.interrupted = self.interrupted or number == signal.SIGINT
            self.client.submit(Sys.KILL, Kill(self.pid, number))

    def _stop(self) -> None:
        self._leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here this process is stopped until CONT. (Or not at all: Linux does not stop processes of an orphaned group.)
        signal.signal(signal.SIGTSTP, handler)

    # ── an agent with a terminal ──────────────────────────────────────────────────────────────────────────

    def _connect_terminal(self) -> None:
        """Connect to the agent's terminal, if stdin is a terminal and the agent has one. Only then is the code for it
        imported."""
        if os.isatty(0):
            from aiosd.commands import holder
            from aiosd.commands.terminal import RawMode

            self.holder = holder.connect(self.client.socket.home, self.pid)
            self.raw = RawMode(0) if self.holder is not None else None
            if self.raw is None and self.pass_signals and self.end.final is None:
                edge.complain("aios-attach", f"agent {self.pid} has no terminal; it gets Ctrl-C (--no-signals: not)")

    def _lines(self) -> int:
        return LINES if self.holder is None else max(os.get_terminal_size(0).lines, LINES)

    def _enter(self) -> None:
        """Take the terminal, once this process is in the foreground. In the background Linux would stop it at each
        attempt to change the terminal, and only KILL could end it."""
        if self.raw is not None and not self.raw.entered and self._may_read_keys():
            self.raw.enter()
            self._send_size()

    def _leave(self) -> None:
        if self.raw is not None:
            if self.raw.entered and os.isatty(1):
                with contextlib.suppress(OSError):  # the terminal is gone
                    os.write(1, PLAIN + (b"\r\n" if self.end.final is None else b""))
            self.raw.leave()

    def _may_read_keys(self) -> bool:
        from aiosd.commands import terminal

        return self.end.final is None and terminal.in_foreground(0)

    def _send_size(self) -> None:
        from aiosd.commands import holder

        if self.holder is not None:
            with contextlib.suppress(OSError):  # the holder has gone: `_receive_from_holder` will notice
                size = os.get_terminal_size(0)
                self.holder.send(holder.SIZE + holder.WINDOW.pack(size.lines, size.columns))

    def _read_keys(self, agent: socket.socket) -> None:
        from aiosd.commands import holder

        try:
            typed = os.read(0, holder.PACKET - 64)
        except OSError:
            typed = b""
        if not typed:  # the terminal is gone
            self.detached = True
            return
        passed, self.detached = self.keys.feed(typed)
        if passed:
            with contextlib.suppress(OSError):  # full: the agent has not read for long; the key is lost
                agent.send(holder.KEYS + passed)

    def _receive_from_holder(self, agent: socket.socket) -> None:
        """Receive from the holder: one byte for more output in the log, or its end, and so the end of the terminal."""
        with contextlib.suppress(BlockingIOError):
            try:
                more = agent.recv(1)
            except ConnectionError:
                more = b""
            if not more:
                agent.close()
                self.holder = None


def _noted(number: int, frame: object) -> None:
    """Does nothing: Python needs a function, and the wakeup descriptor has received the signal."""


def _die_of(number: int) -> None:
    """End by the signal, like a program that does not catch it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
