"""Clients of the control socket: finding it, errors of one sentence, and one identity across the death of a kernel."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import libaios as aios
from aiosd.commands.run import Attachment
from libaios import client as clients
from libaios import connection as connections
from libaios import greeting, wire
from libaios.client import Client, Home, NoKernel
from libaios.wire import NoArgs, Sys
from tests.conftest import eventually
from tests.fakekernel import PATIENCE_S, SocketKernel, args_of, as_process_connection, aside
from tests.test_sdk import in_child

pytestmark = pytest.mark.deadline(60)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[SocketKernel]:
    made = SocketKernel(tmp_path / "aiosd.sock")
    yield made
    made.close()


@pytest.fixture
def client(kernel: SocketKernel) -> Iterator[Client]:
    made = aside(Client, Home(kernel.path.parent))
    kernel.welcome()
    connected: Client = made.result(PATIENCE_S)
    yield connected
    connected.close()


# ── connecting ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_socket_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    words = f"no aiosd is running .no socket at {tmp_path}/aiosd.sock.; start one with"
    with pytest.raises(NoKernel, match=words) as caught:
        Client(Home(tmp_path))
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_missing_folder_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoKernel, match="no aiosd is running"):
        Client(Home(tmp_path / "nowhere"))


def test_a_socket_on_which_no_process_listens(tmp_path: Path) -> None:
    SocketKernel(tmp_path / "aiosd.sock").listener.close()
    with pytest.raises(NoKernel, match="no aiosd is running"):
        Client(Home(tmp_path))


def test_no_kernel_is_a_connection_error(tmp_path: Path) -> None:
    assert issubclass(NoKernel, ConnectionError)


def test_a_path_too_long_for_a_socket_is_reached(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    kernel = SocketKernel(folder / "aiosd.sock")
    made = aside(Client, Home(folder))
    kernel.welcome()
    made.result(PATIENCE_S).close()
    kernel.close()


def test_another_program_answers(kernel: SocketKernel) -> None:
    made = aside(Client, Home(kernel.path.parent))
    kernel.accept()
    kernel.send(b"HTTP/1.1 400 Bad Request")
    with pytest.raises(NoKernel, match="no aiosd answers"):
        made.result(PATIENCE_S)


def test_another_release_is_refused_with_its_sentence(kernel: SocketKernel) -> None:
    made = aside(Client, Home(kernel.path.parent))
    hello = kernel.accept()
    assert hello.version == wire.VERSION
    kernel.send(wire.encode(wire.Reply(0, 93, body=wire.raw(wire.Failure("version 1; this aiosd speaks 2")))))
    with pytest.raises(NoKernel, match="this aiosd speaks 2"):
        made.result(PATIENCE_S)


def test_a_kernel_that_hangs_up_at_the_greeting(kernel: SocketKernel) -> None:
    made = aside(Client, Home(kernel.path.parent))
    kernel.accept()
    kernel.die()
    with pytest.raises(NoKernel, match="does not answer"):
        made.result(PATIENCE_S)


def test_a_kernel_that_never_greets(kernel: SocketKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 0.02)
    with pytest.raises(NoKernel, match="does not answer"):
        Client(Home(kernel.path.parent))


def test_a_default_folder_of_another_user_is_not_trusted(kernel: SocketKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(kernel.path.parent)
    home.explicit = False
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if kernel.path.parent.stat().st_uid == 0:
        os.chown(kernel.path.parent, 54321, -1)
    with pytest.raises(NoKernel, match="belongs to another user"):
        Client(home)


def fill_queue(kernel: SocketKernel) -> list[socket.socket]:
    """Connections that wait to be accepted; the last one found no room in the queue."""
    kernel.listener.listen(0)
    waiting = []
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        waiting.append(sock)
        try:
            sock.connect(str(kernel.path))
        except BlockingIOError:
            return waiting


def test_the_queue_of_connections_is_full(tmp_path: Path) -> None:
    kernel = SocketKernel(tmp_path / "aiosd.sock")
    waiting = fill_queue(kernel)
    made = aside(Client, Home(tmp_path))
    for sock in waiting[:-1]:
        kernel.listener.accept()[0].close()
        sock.close()
    waiting[-1].close()
    kernel.welcome()
    made.result(PATIENCE_S).close()
    kernel.close()


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_and_their_descriptors(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int, (0, 1, 2))
    kernel.reply(kernel.take(Sys.GETPID), 0)
    assert call.result(PATIENCE_S) == 0
    assert client.release == "9.9"


def test_a_forked_child_makes_a_connection_of_its_own(
    kernel: SocketKernel, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(wire.ENV_HOME, str(tmp_path))

    def serve() -> None:
        kernel.welcome()
        kernel.reply(kernel.take(Sys.GETPID), 5)

    def act() -> int:
        try:
            client.call(Sys.GETPID, NoArgs(), int)
        except OSError as err:
            return aios.proc.getpid() if "this process was forked;" in str(err) else 1
        return 2

    with as_process_connection(client):
        serving = aside(serve)
        ours = kernel.frames
        assert in_child(act) == 5
        serving.result(PATIENCE_S)
    assert kernel.frames is not None
    kernel.frames.close()
    kernel.frames = ours


def test_a_kernel_that_reads_slowly_makes_callers_wait(kernel: SocketKernel, client: Client) -> None:
    text = "x" * (4 << 20)
    calls = [aside(client.call, Sys.TOKENIZE, wire.Tokenize(text), int) for _ in range(3)]
    for _ in calls:
        request = kernel.take(Sys.TOKENIZE)
        kernel.reply(request, len(args_of(request).text))
    assert [call.result(PATIENCE_S) for call in calls] == [len(text)] * 3


def test_descriptors_that_a_kernel_sends_are_not_kept(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    request = kernel.take()
    assert kernel.frames is not None
    kernel.frames.send(wire.encode(wire.Reply(request.id, body=wire.raw(1))), [0, 1])
    assert call.result(PATIENCE_S) == 1


# ── loops of the caller's own ─────────────────────────────────────────────────────────────────────────────


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], PATIENCE_S)[0])


def test_asking_for_the_descriptor_again_takes_nothing(kernel: SocketKernel, client: Client) -> None:
    """Otherwise a loop would sleep although a reply was taken."""
    fd = client.fileno()
    call = client.submit(Sys.GETPID, NoArgs())
    kernel.reply(kernel.take(), 5)
    assert readable(fd)
    assert client.fileno() == fd
    assert call.final is None
    client.pump()
    assert client.result(call, int) == 5


def test_aios_run_sees_a_reply_that_comes_just_before_it_sleeps(
    kernel: SocketKernel, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = Attachment(client, wire.Spawn(kind="exec", target="true"))
    attachment.wakeup, writing = os.pipe2(os.O_NONBLOCK)
    call = client.submit(Sys.GETPID, NoArgs())
    kernel.reply(kernel.take(), 5)
    looked: list[bool] = []

    def pump() -> None:
        """The first time the reply comes right after the look."""
        if looked:
            client.pump()
        else:
            looked.append(readable(client.socket.fileno()))

    monkeypatch.setattr(attachment, "_pump", pump)
    try:
        assert attachment._await(call, int) == 5
    finally:
        os.close(attachment.wakeup)
        os.close(writing)


# ── a new kernel ──────────────────────────────────────────────────────────────────────────────────────────


def test_open_calls_survive_the_kernel_under_one_identity(kernel: SocketKernel, client: Client) -> None:
    fd = client.fileno()
    calls = [aside(client.call, Sys.TOKENIZE, wire.Tokenize(str(number)), str) for number in range(3)]
    before = {request.id for request in (kernel.take(Sys.TOKENIZE) for _ in calls)}
    kernel.die()
    kernel.welcome()
    assert kernel.hello == wire.Hello(wire.VERSION, 7, "boot")
    again = [kernel.take(Sys.TOKENIZE) for _ in calls]
    assert {request.id for request in again} == before
    for request in again:
        kernel.reply(request, args_of(request).text)
    assert sorted(call.result(PATIENCE_S) for call in calls) == ["0", "1", "2"]
    assert client.fileno() == fd  # a loop that watches it need not change


def test_a_loop_of_the_callers_own_sees_the_reconnect(kernel: SocketKernel, client: Client) -> None:
    call = client.submit(Sys.GETPID, NoArgs())
    kernel.take(Sys.GETPID)
    fd = client.fileno()
    kernel.die()
    welcoming = aside(kernel.welcome)
    while client._life == 0:
        assert readable(fd)
        client.pump()
    welcoming.result(PATIENCE_S)
    kernel.reply(kernel.take(Sys.GETPID), 5)
    assert readable(fd)
    client.pump()
    assert client.result(call, int) == 5


def test_a_kernel_that_dies_again_while_it_greets(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    kernel.die()
    for _ in range(3):
        kernel.accept()
        kernel.die()
    kernel.welcome()
    kernel.reply(kernel.take(Sys.GETPID), 1)
    assert call.result(PATIENCE_S) == 1


def test_the_kernel_dies_while_a_large_call_is_sent(kernel: SocketKernel, client: Client) -> None:
    text = "x" * (4 << 20)
    call = aside(client.call, Sys.TOKENIZE, wire.Tokenize(text), int)
    while not client.transport.outbox_bytes:
        threading.Event().wait(0.002)
    kernel.die()
    kernel.welcome()
    request = kernel.take(Sys.TOKENIZE)
    assert args_of(request).text == text
    kernel.reply(request, 1)
    assert call.result(PATIENCE_S) == 1


def test_a_restarted_aiosd_is_another_system(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    kernel.boot = "another boot"
    kernel.die()
    kernel.welcome()
    with pytest.raises(OSError, match="aiosd is gone"):
        call.result(PATIENCE_S)


def test_when_no_process_listens_any_more_calls_fail_at_once(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    kernel.listener.close()
    kernel.die()
    with pytest.raises(OSError, match="aiosd is gone"):
        call.result(PATIENCE_S)


def test_closing_from_another_thread_ends_a_call(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    client.close()
    with pytest.raises(OSError, match="closed"):
        call.result(0.9)


# ── no kernel for a while ─────────────────────────────────────────────────────────────────────────────────


def test_only_waiting_calls_wait_while_there_is_no_kernel(kernel: SocketKernel, client: Client) -> None:
    """Meanwhile another thread waits for a reply, and so reads the connection."""
    waiting = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take(Sys.GETPID)
    kernel.die()
    kernel.accept()  # but send no Welcome
    client.pump()
    call = client.submit(Sys.GETPPID, NoArgs())
    with pytest.raises(TimeoutError, match="no answer"):
        client.call(Sys.PS, wire.Ps(), None, timeout=-connections.SLACK_S)
    kernel.send(wire.encode(wire.Welcome(wire.VERSION, "boot", 7, "9.9")))
    kernel.reply(kernel.take(Sys.GETPID), 5)
    kernel.reply(kernel.take(Sys.GETPPID), 6)
    assert (waiting.result(PATIENCE_S), client.result(call, int)) == (5, 6)


@pytest.mark.parametrize("greeted", [True, False])
def test_closing_while_there_is_no_kernel_ends_calls_at_once(
    kernel: SocketKernel, client: Client, monkeypatch: pytest.MonkeyPatch, greeted: bool
) -> None:
    """Both while the client waits for a Welcome, and while it waits to try again."""
    monkeypatch.setattr(clients, "RETRY_S", 1000.0)
    monkeypatch.setattr(clients, "BACKSTOP_S", 1000.0)
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    kernel.die()
    kernel.accept()
    if not greeted:
        kernel.die()
        assert eventually(lambda: client.socket._search and client.socket._search.frames is None)
    client.close()
    with pytest.raises(OSError, match="closed"):
        call.result(PATIENCE_S)


def test_a_full_queue_at_the_reconnect(kernel: SocketKernel, client: Client) -> None:
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    waiting = fill_queue(kernel)
    kernel.die()
    assert eventually(lambda: client.socket._search)
    for sock in waiting[:-1]:
        kernel.listener.accept()[0].close()
        sock.close()
    waiting[-1].close()
    kernel.welcome()
    kernel.reply(kernel.take(Sys.GETPID), 1)
    assert call.result(PATIENCE_S) == 1


def test_a_kernel_that_does_not_come_back(
    kernel: SocketKernel, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "RECONNECT_S", 0.05)
    monkeypatch.setattr(greeting, "GREETING_S", 0.02)
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    kernel.die()
    with pytest.raises(OSError, match="does not answer"):
        call.result(PATIENCE_S)


def test_a_reply_and_the_end_of_the_system_at_once(kernel: SocketKernel, client: Client) -> None:
    """Both are seen: the answered call has its result, the other one an error."""
    answered, other = client.submit(Sys.GETPID, NoArgs()), client.submit(Sys.GETPPID, NoArgs())
    request = kernel.take(Sys.GETPID)
    kernel.take(Sys.GETPPID)
    kernel.reply(request, 5)
    kernel.listener.close()
    kernel.die()
    client.pump()
    assert client.result(answered, int) == 5
    with pytest.raises(OSError, match="aiosd is gone"):
        client.result(other, int)


def test_kernel_sends_a_frame_that_is_too_long(kernel: SocketKernel, client: Client) -> None:
    """No kernel of aiosd does so: connect again."""
    call = aside(client.call, Sys.GETPID, NoArgs(), int)
    kernel.take()
    assert kernel.frames is not None
    kernel.frames._sock.sendall(struct.pack("<I", 1 << 31))
    kernel.die()
    kernel.welcome()
    kernel.reply(kernel.take(), 1)
    assert call.result(PATIENCE_S) == 1


# ── homes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_aios_home_puts_everything_under_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIOS_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    home = Home()
    root = tmp_path / "relative"
    assert (home.socket, home.data, home.config) == (root / "aiosd.sock", root / "data", root / "aiosd.toml")


def test_without_aios_home_the_xdg_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AIOS_HOME", raising=False)
    for name in ("RUNTIME_DIR", "STATE_HOME", "CONFIG_HOME"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / name))
    home = Home()
    assert home.socket == tmp_path / "RUNTIME_DIR" / "aios" / "aiosd.sock"
    assert home.data == tmp_path / "STATE_HOME" / "aios"
    assert home.config == tmp_path / "CONFIG_HOME" / "aios" / "aiosd.toml"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert Home().socket == tmp_path / f"aios-{os.getuid()}" / "aiosd.sock"


def test_the_wait_that_a_signal_handler_interrupted_ends_after_it(client: Client) -> None:
    """The handler may have received the reply that the wait is for. Only this one wait ends; the next one sleeps."""
    transport = client.transport
    assert not transport.wait(0)
    for _ in range(2):
        transport.rouse()
        transport.rouse()
        assert transport.wait(0)
        assert transport.receive() == []
        assert not transport.wait(0)
