"""The holder: a small process that keeps the terminal of an agent which was started with `aios-run -d -t`.

    aios-run -d -t ──fork──▶ holder ──spawn──▶ kernel        aios-attach ──keys, sizes──▶ holder ──▶ pty ──▶ agent
                              pty ──▶ holder ──▶ 7.log ──▶ aios-attach

The holder has the master of the pty. It writes the agent's output to the agent's log and nowhere else: `aios-attach`
reads the log, as for any detached agent, and gets only one byte from the holder when there is more. So a reader that
stops reading delays nothing, and one that comes later sees earlier output.

`aios-attach` connects to a socket in a folder of the home that only the user can enter, and sends packets: KEYS with
what was typed, SIZE with rows and columns.

The holder is a process of the person who typed `aios-run`: a client of the kernel with a person's rights, and not a
descendant of any process of aiosd. It ends when the agent has ended, or when no aiosd runs any more. If the holder is
killed, Linux hangs the terminal up, and the agent gets HUP.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import TypeVar

from aiosd.commands import terminal
from libaios.client import Client, NoKernel
from libaios.connection import Pending
from libaios.home import Home
from libaios.wire import Spawn, Spawned, Sys, Wait

KEYS, SIZE = b"k", b"w"  # the first byte of a packet
WINDOW = struct.Struct("=HH")  # rows, columns
PACKET = 4096  # the largest packet, in bytes
MORE = b"+"  # to aios-attach: there is more in the log
CHUNK = 1 << 16
TYPED_MAX = 1 << 16  # if the agent has not read this many keys, no more are received
LOOK_AGAIN_S = 0.2  # seconds between two checks of a terminal that no process has open
LAST_OUTPUT_S = 2.0  # how long output is still read after the agent's end
DEFAULT_SIZE = (24, 80)  # rows and columns, if aios-run has no terminal itself

T = TypeVar("T")


# ── the socket ────────────────────────────────────────────────────────────────────────────────────────────


def folder_of(home: Home) -> str:
    return os.path.join(home.texts["data"], "terminals")


def connect(home: Home, pid: int) -> socket.socket | None:
    """Connect to the holder of agent `pid`; None: the agent has no held terminal."""
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        return _at_folder(home, lambda place: _connected(f"{place}/{pid}"))
    return None


def _connected(path: str) -> socket.socket:
    sock = _new_socket()
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _listen(home: Home, pid: int) -> socket.socket:
    os.makedirs(folder_of(home), mode=0o700, exist_ok=True)
    sock = _new_socket()
    _at_folder(home, lambda place: sock.bind(f"{place}/{pid}"))
    os.chmod(os.path.join(folder_of(home), str(pid)), 0o600)
    sock.listen()
    return sock


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _at_folder(home: Home, act: Callable[[str], T]) -> T:
    """Call `act` with a short path of the folder in /proc, because a socket's path is limited to 107 bytes."""
    folder = os.open(folder_of(home), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return act(f"/proc/self/fd/{folder}")
    finally:
        os.close(folder)


# ── starting one ──────────────────────────────────────────────────────────────────────────────────────────


def start(spawn: Spawn) -> int:
    """Start the agent on a held terminal; returns its pid. Raises OSError as the spawn does."""
    ours = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
    master, slave = terminal.open_pty(ours)
    if ours is None:
        _set_size(master, *DEFAULT_SIZE)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:  # forked twice: the holder is no child that aios-run, or its shell, waits for
                _become_holder(spawn, master, slave, writing)
        finally:
            os._exit(0)
    for fd in (master, slave, writing):
        os.close(fd)
    os.waitpid(child, 0)
    with open(reading, "rb") as file:
        return _outcome(file.read().decode("utf-8", "surrogateescape"))


def _outcome(outcome: str) -> int:
    """Read the holder's answer: a pid (`7`), or an errno and a sentence."""
    number, space, words = outcome.partition(" ")
    if not number:
        raise OSError(errno.EIO, "the process that was to hold the terminal has died")
    if space:
        error = NoKernel if int(number) == errno.ECONNREFUSED else OSError
        raise error(int(number), words)
    return int(number)


def _become_holder(spawn: Spawn, master: int, slave: int, report: int) -> None:
    os.setsid()
    _let_go({master, slave, report})
    with open(report, "wb", buffering=0) as answer:
        try:
            client = Client()
            client.fileno()  # makes it readable, from now on, whenever a reply has come
            spawned: Spawned = client.call(Sys.SPAWN, spawn, Spawned, fds=(slave, slave, slave))
            os.close(slave)
            held = Holder(client, spawned, master)
        except OSError as err:
            words = err.strerror or str(err)
            answer.write(f"{err.errno or errno.EIO} {words}".encode("utf-8", "surrogateescape"))
            return
        answer.write(str(spawned.pid).encode())
    held.run()


def _let_go(kept: set[int]) -> None:
    """Close everything that belongs to the terminal and the shell where aios-run was typed."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the descriptor that was used to list them
                os.close(int(name))
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with open("/proc/self/comm", "w") as file:
        file.write("aios-holder")


# ── holding ───────────────────────────────────────────────────────────────────────────────────────────────


class Holder:
    """The loop of the holder's process, which runs until the agent has ended."""

    def __init__(self, client: Client, spawned: Spawned, master: int) -> None:
        self.client, self.master = client, master
        self.home = Home()
        self.path = os.path.join(folder_of(self.home), str(spawned.pid))
        self.listener = _listen(self.home, spawned.pid)
        self.log = os.open(spawned.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.end: Pending = client.submit(Sys.WAIT, Wait(spawned.pid))
        self.attached: dict[int, socket.socket] = {}
        self.typed = bytearray()  # keys that the agent has not read yet

    def run(self) -> None:
        try:
            while not self._over():
                self._turn()
            self._last_output()
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _over(self) -> bool:
        """Whether the agent has ended, or aiosd has, with all agents."""
        self.client.pump()
        if self.client.socket.reborn:
            self.client.pump()
        return self.end.final is not None

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLIN)
        poll.register(self.listener, select.POLLIN)
        for fd in self.attached:
            poll.register(fd, select.POLLIN if len(self.typed) < TYPED_MAX else 0)
        open_somewhere = not self._hung_up()
        if open_somewhere:
            poll.register(self.master, select.POLLIN | (select.POLLOUT if self.typed else 0))
        ready = dict(poll.poll(None if open_somewhere else LOOK_AGAIN_S * 1000))
        if ready.get(self.master, 0) & select.POLLIN:
            self._pass_output()
        if ready.get(self.master, 0) & select.POLLOUT:
            self._pass_keys()
        if self.listener.fileno() in ready:
            self._accept()
        for fd in [fd for fd in self.attached if fd in ready]:
            self._receive(fd)

    def _hung_up(self) -> bool:
        """Whether no process has the terminal open now. Then poll would return at once, again and again."""
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        return dict(poll.poll(0)).get(self.master) == select.POLLHUP

    # the terminal

    def _pass_output(self) -> bool:
        """Copy output from the terminal to the log; False: there was none."""
        try:
            data = os.read(self.master, CHUNK)
        except OSError:  # EAGAIN, or EIO: no process has it open
            return False
        with contextlib.suppress(OSError):  # a full disk loses output, not the agent
            while data:
                data = data[os.write(self.log, data) :]
        for sock in self.attached.values():
            with contextlib.suppress(OSError):  # its socket is full of them, or it has gone
                sock.send(MORE)
        return True

    def _pass_keys(self) -> None:
        try:
            del self.typed[: os.write(self.master, self.typed)]
        except BlockingIOError:
            return
        except OSError:  # EIO: no process has it open, so none will read them
            self.typed.clear()

    def _last_output(self) -> None:
        deadline = time.monotonic() + LAST_OUTPUT_S
        while self._pass_output() and time.monotonic() < deadline:
            pass

    # the attached clients

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            sock.setblocking(False)
            self.attached[sock.fileno()] = sock

    def _receive(self, fd: int) -> None:
        try:
            packet = self.attached[fd].recv(PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.attached.pop(fd).close()
        elif packet.startswith(KEYS):
            self.typed += packet[1:]
        elif packet.startswith(SIZE) and len(packet) == 1 + WINDOW.size:
            self._resize(*WINDOW.unpack(packet[1:]))

    def _resize(self, rows: int, columns: int) -> None:
        """Set the window size. If it is the same, send WINCH all the same: then a full-screen program draws its screen
        anew, which a client that has just attached needs."""
        same = _size(self.master) == (rows, columns)
        _set_size(self.master, rows, columns)
        if same:
            with contextlib.suppress(OSError):
                os.killpg(os.tcgetpgrp(self.master), signal.SIGWINCH)


def _size(fd: int) -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return rows, columns


def _set_size(fd: int, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
