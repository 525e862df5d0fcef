"""Attacks that must fail: an agent that is taken for the person, a home that another user can change."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd import procfs
from aiosd.errors import UsageError
from aiosd.init import guardian
from aiosd.init.signals import SignalInfo
from aiosd.init.supervisor import Supervisor
from aiosd.kernel import ancestry
from aiosd.kernel.access import Access, Clearance
from aiosd.kernel.ancestry import TRIES, Origin, Unproven, Unsettled, agent_above, is_child, peer_of
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import ProcTable
from libaios import wire
from libaios.home import Home
from tests.conftest import System, eventually

Fresh = Callable[..., System]
HEADER = "import os, signal, socket, struct, subprocess, sys\nimport libaios as aios\nfrom libaios import wire\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(code: str, name: str = "agent.py") -> Path:
        path = tmp_path / name
        path.write_text(HEADER + textwrap.dedent(code))
        return path

    return make


Write = Callable[..., Path]


def ospid(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


# ── descendants of agents ─────────────────────────────────────────────────────────────────────────────────


def test_a_descendant_is_one_however_deep(aiosd: System, write: Write) -> None:
    """Seventy forks below its agent, and below a process that has left its session and lost its parents."""
    script = write("""
        def below(depth, last):
            pid = os.fork()
            if pid:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if depth:
                below(depth - 1, last)
            last()
        def detached():
            os.setsid()
            reading, writing = os.pipe()
            if os.fork():
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            os.execvp("aiosd", ["aiosd", "set", "policy", "rr"])
        if not os.fork():
            below(70, lambda: os.execvp("aiosd", ["aiosd", "set", "policy", "rr"]))
        os.wait()
        if not os.fork():
            below(3, detached)
        while True:
            try: os.wait()
            except ChildProcessError: break
    """)
    done = aiosd.run("aios-run", script)
    assert done.stderr.count("an agent may not change settings") == 2, done.stderr
    assert aiosd.status()["policy"] == "fair"


HELD_SOCKET = """
def framed(obj):
    data = wire.encode(obj)
    return struct.pack("<I", len(data)) + data

def connect_by_child():
    "A socket of ours that a child connected, which is dead by now."
    sock = socket.socket(socket.AF_UNIX)
    pid = os.fork()
    if pid == 0:
        sock.connect(os.environ["AIOS_HOME"] + "/aiosd.sock")
        os._exit(0)
    os.waitpid(pid, 0)
    return sock

def served(sock):
    "What a call that only a person may make gets: an errno, or None when nothing is answered at all."
    sock.settimeout(30)
    try:
        sock.sendall(framed(wire.Hello(wire.VERSION)))
        if not sock.recv(4096): return None
        sock.sendall(framed(wire.Request(1, wire.Sys.SET, wire.raw(wire.Set("policy", "rr")))))
        data = sock.recv(4096)
        return wire.decode_reply(data[4:]).errno if data else None
    except ConnectionError:
        return None
"""


def test_a_socket_that_a_dead_child_has_connected_has_no_rights(aiosd: System, write: Write) -> None:
    """The child connects, and has ended before the kernel accepts the connection."""
    script = write(
        HELD_SOCKET + "print('up', flush=True)\nsys.stdin.readline()\nsock = connect_by_child()\n"
        "print('connected', flush=True)\nprint(served(sock))\n"
    )
    job = aiosd.popen("aios-run", script)
    assert job.stdin is not None
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    kernel = ospid(aiosd, "kernel")
    os.kill(kernel, signal.SIGSTOP)
    try:
        print(file=job.stdin, flush=True)
        assert job.stdout.readline() == "connected\n"
    finally:
        os.kill(kernel, signal.SIGCONT)
    assert job.stdout.read() == "None\n"
    assert aiosd.status()["policy"] == "fair"


def test_such_a_socket_has_no_rights_in_forty_tries_at_any_moment(aiosd: System, write: Write) -> None:
    """If it was accepted while the child lived, it is the agent's."""
    script = write(HELD_SOCKET + "print(*{served(connect_by_child()) for _ in range(40)})\n")
    assert set(aiosd.run("aios-run", script).stdout.split()) <= {"None", str(errno.EPERM)}
    assert aiosd.status()["policy"] == "fair"


# ── ancestors of a process ────────────────────────────────────────────────────────────────────────────────


class Processes:
    """A fake /proc: parent and start time by Linux pid. `then` changes it at a given look."""

    def __init__(self, **more: Callable[[], None]) -> None:
        self.parents: dict[int, tuple[int, int]] = {}
        self.states: dict[int, str] = {}
        self.looks = 0
        self.then: dict[int, Callable[[], None]] = {}

    def read_stat(self, ospid: int) -> procfs.Stat | None:
        self.looks += 1
        if self.looks in self.then:
            self.then[self.looks]()
        if ospid not in self.parents:
            return None
        ppid, started = self.parents[ospid]
        return procfs.Stat(self.states.get(ospid, "S"), ppid, ospid, ospid, 0.0, started)


SUPERVISOR, AGENT = 100, 200
AGENTS = {AGENT: "the agent"}


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    made.parents = {1: (0, 1), 50: (1, 2), SUPERVISOR: (50, 3), AGENT: (SUPERVISOR, 4), 300: (AGENT, 5), 400: (300, 6)}
    monkeypatch.setattr(ancestry.procfs, "read_stat", made.read_stat)
    return made


@pytest.fixture
def alive() -> Iterator[int]:
    """A pidfd of a process that does not end."""
    fd = os.pidfd_open(os.getpid())
    yield fd
    os.close(fd)


def above(ospid: int, pidfd: int) -> str | None:
    return agent_above(Origin(ospid, 0, pidfd), AGENTS, SUPERVISOR)


def test_ancestors(proc: Processes, alive: int) -> None:
    assert [above(ospid, alive) for ospid in (AGENT, 300, 400)] == 3 * ["the agent"]
    assert [above(ospid, alive) for ospid in (1, 50)] == [None, None]


def test_only_its_agent_decides_about_an_orphan(proc: Processes, alive: int) -> None:
    """A child of the supervisor that is not in the table is an agent's orphan, or an agent just forked."""
    proc.parents[500] = (SUPERVISOR, 7)
    with pytest.raises(Unsettled):
        above(500, alive)


def test_a_service_is_a_live_child_of_the_supervisor(proc: Processes, alive: int) -> None:
    """The pid from the supervisor is not enough: it may now be that of another process, or of a dead one."""
    proc.parents[500] = (SUPERVISOR, 7)
    assert is_child(Origin(500, 0, alive), SUPERVISOR)
    assert not is_child(Origin(400, 0, alive), SUPERVISOR)
    assert not is_child(Origin(600, 0, alive), SUPERVISOR)
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait()
    assert not is_child(Origin(500, 0, pidfd), SUPERVISOR)
    os.close(pidfd)


def test_a_service_may_request_vectors_and_nothing_else() -> None:
    approvals: Any = None  # it is not asked
    access = Access(ProcTable(10), set, approvals, lambda args, parent: "")
    peer: Any = SimpleNamespace(service="store", proc=None)
    for row in wire.TABLE.values():
        call = Call(peer, 1, row)
        if row.sys == wire.Sys.EMBED:
            assert access.check(call, wire.Embed(["x"]), lambda: None) is Clearance.NOW
        else:
            with pytest.raises(PermissionError, match="store: a service may not call"):
                access.check(call, None, lambda: None)


@pytest.mark.parametrize("gone", [300, 400])
def test_an_incomplete_chain_of_ancestors_proves_nothing(proc: Processes, alive: int, gone: int) -> None:
    del proc.parents[gone]
    with pytest.raises(Unproven):
        above(400, alive)
    assert proc.looks >= TRIES


@pytest.mark.parametrize("dead", [300, 400])
@pytest.mark.parametrize("state", ["Z", "X"])
def test_an_ended_process_has_no_ancestors(proc: Processes, alive: int, dead: int, state: str) -> None:
    proc.states[dead] = state
    with pytest.raises(Unproven):
        above(400, alive)


@given(at=st.integers(1, 8))
def test_a_parent_that_dies_while_we_look(at: int) -> None:
    """Its child is then the agent's child. The answer is the agent or none, whatever the moment of the death."""
    with pytest.MonkeyPatch.context() as patch:
        made = Processes()
        made.parents = {1: (0, 1), SUPERVISOR: (1, 3), AGENT: (SUPERVISOR, 4), 300: (AGENT, 5), 400: (300, 6)}

        def die() -> None:
            del made.parents[300]
            made.parents[400] = (AGENT, 6)

        made.then[at] = die
        patch.setattr(ancestry.procfs, "read_stat", made.read_stat)
        pidfd = os.pidfd_open(os.getpid())
        try:
            assert above(400, pidfd) == "the agent"
        finally:
            os.close(pidfd)


def test_a_pid_that_was_given_to_another_process(proc: Processes, alive: int) -> None:
    """Between two looks the parent has died, and its pid is that of a person's process. No two looks agree."""

    def reused() -> None:
        proc.parents[300] = (50, 7)

    proc.then[2] = reused
    proc.then[5] = lambda: proc.parents.update({400: (AGENT, 6)})
    assert above(400, alive) == "the agent"


def test_a_process_that_always_changes_its_parents_is_refused(proc: Processes, alive: int) -> None:
    for look in range(1, 10 * TRIES):
        proc.then[look] = lambda look=look: proc.parents.update({300: (AGENT, 1000 + look)})  # type: ignore[misc]
    with pytest.raises(Unproven, match="too fast"):
        above(400, alive)


def test_a_process_that_has_ended_is_refused_whatever_its_number_is_now(proc: Processes) -> None:
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait()
    try:
        with pytest.raises(Unproven, match="has ended"):
            above(50, pidfd)
    finally:
        os.close(pidfd)


def test_processes_of_one_agent_have_one_agent(proc: Processes) -> None:
    """Processes are identified by pid and start time, because a pid may be used again."""
    me, started = os.getpid(), 7
    other = 201
    proc.parents |= {me: (300, started), other: (SUPERVISOR, 8)}
    agents = {AGENT: "the agent", other: "another"}
    with subprocess.Popen(["sleep", "60"]) as child:
        proc.parents[child.pid] = (AGENT, 9)
        named = [(me, started), (child.pid, 9)]
        assert ancestry.agent_above_all(named, agents, SUPERVISOR) == "the agent"
        for parent in (other, 50):
            proc.parents[child.pid] = (parent, 9)
            with pytest.raises(Unproven, match="not of one agent"):
                ancestry.agent_above_all(named, agents, SUPERVISOR)
        proc.parents[child.pid] = (SUPERVISOR, 9)
        with pytest.raises(Unsettled):
            ancestry.agent_above_all(named, agents, SUPERVISOR)
        child.kill()
    for wrong in ([(me, started + 1)], [(child.pid, 9)], [(0, 1)], []):
        with pytest.raises(Unproven):
            ancestry.agent_above_all(wrong, agents, SUPERVISOR)


def whose(sock: socket.socket) -> str | None:
    origin = peer_of(sock)
    try:
        return agent_above(origin, AGENTS, 1 << 30)
    finally:
        os.close(origin.pidfd)


def test_the_connection_names_the_process_that_made_it(tmp_path: Path) -> None:
    """A process that has ended before the connection was accepted cannot be taken for a later one with its pid."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        code = f"import socket, sys; s = socket.socket(1); s.connect({str(tmp_path / 's')!r}); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
            sock, _ = listener.accept()
            with sock:
                origin = peer_of(sock)
                assert (origin.ospid, origin.uid) == (child.pid, os.getuid())
                assert not ancestry.has_ended(origin.pidfd)
                os.close(origin.pidfd)
                assert child.stdin is not None
                child.stdin.close()
                child.wait()
                with pytest.raises(Unproven):
                    whose(sock)


# ── homes ─────────────────────────────────────────────────────────────────────────────────────────────────

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to give folders away")


@needs_root
@pytest.mark.parametrize("folder", [".", "data", "data/logs"])
def test_root_does_not_serve_in_a_folder_of_another_user(fresh_aiosd: Fresh, tmp_path: Path, folder: str) -> None:
    home = tmp_path / "home"
    (home / "data" / "logs").mkdir(parents=True)
    os.chown(home / folder, 12345, -1)
    done = fresh_aiosd("--threads", "1", home=home, start=False).run("aiosd")
    assert done.returncode == 1, done.stderr
    assert f"{(home / folder).resolve()} belongs to another user (12345)" in done.stderr


@needs_root
def test_root_does_not_serve_with_a_socket_in_a_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIOS_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "aios").mkdir()
    os.chown(tmp_path / "aios", 12345, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        guardian.prepare(Home())


@needs_root
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "real")
    guardian.prepare(Home(tmp_path / "home"))
    os.lchown(tmp_path / "home", 12345, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        guardian.prepare(Home(tmp_path / "home"))


def test_a_folder_that_every_user_can_change_is_refused(tmp_path: Path) -> None:
    guardian.prepare(Home(tmp_path))
    (tmp_path / "data").chmod(0o777)
    with pytest.raises(UsageError, match="can be changed by every user"):
        guardian.prepare(Home(tmp_path))


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────

BAD = ["", ".", "..", "a\n", "a b", "a/b", "/", "a\x7f", "a\0", "\n", "a\r", "x" * 65]


@pytest.mark.parametrize("text", BAD)
def test_invalid_names(text: str) -> None:
    decode = wire.decode_args[wire.Sys.SPAWN]
    for field in ("name", "group"):
        spec = wire.Spawn("exec", "true", **{field: text})
        with pytest.raises(msgspec.ValidationError, match="xpected"):
            decode(wire.encode(spec))
    with pytest.raises(msgspec.ValidationError):
        wire.decode_args[wire.Sys.CTX_RESTORE](wire.encode(wire.NamedContext(text)))


@pytest.mark.parametrize("text", ["a", "...", "..a", ".a", "a.", "ü-1_x", "x" * 64])
def test_valid_names(text: str) -> None:
    wire.decode_args[wire.Sys.SPAWN](wire.encode(wire.Spawn("exec", "true", name=text, group=text)))


@pytest.mark.parametrize("kind", ["file\n", "", "shell"])
def test_invalid_kinds(kind: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_args[wire.Sys.SPAWN](wire.encode(wire.Spawn(kind, "true")))


# ── signals to aiosd ──────────────────────────────────────────────────────────────────────────────────────


def test_signals_are_read_with_their_senders() -> None:
    """In a process of its own, because in this one another thread could get the signals."""
    script = """
import os, signal, subprocess, sys
from aiosd.init.signals import SignalInfo, open_signals, read_signals
fd = open_signals([signal.SIGUSR1, signal.SIGUSR2])
assert read_signals(fd) == []
os.kill(os.getpid(), signal.SIGUSR1)
assert read_signals(fd) == [SignalInfo(signal.SIGUSR1, os.getpid())]
with subprocess.Popen(["sh", "-c", f"kill -USR2 {os.getpid()}"]) as child:
    child.wait()
assert read_signals(fd) == [SignalInfo(signal.SIGUSR2, child.pid)]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("how", ["itself", "child", "dead child"])
@pytest.mark.parametrize("target", ["supervisor", "guardian"])
@pytest.mark.parametrize("number", ["TERM", "HUP", "USR1"])
def test_an_agent_does_not_stop_the_system(aiosd: System, how: str, target: str, number: str) -> None:
    """In an agent's shell script `kill $PPID` signals the supervisor; it must not end the system."""
    if (target, number) == ("guardian", "USR1"):
        pytest.skip("not blocked there: as deadly as KILL")
    if target == "guardian" and how != "child":
        pytest.skip("the sender may have ended by then, as a person's `kill` has, which is obeyed")
    assert aiosd.daemon is not None
    pid = ospid(aiosd, "supervisor") if target == "supervisor" else aiosd.daemon.pid
    kill = f"kill -{number} {pid}"
    code = {
        "itself": kill,
        "child": f"python3 -c 'import os, signal; os.kill({pid}, signal.SIG{number}); input()'",
        "dead child": f"sh -c '{kill}; true'; true",
    }[how]
    began = len(aiosd.log())
    job = aiosd.popen("aios-run", "--", "sh", "-c", code)
    refused = f"SIG{number} from pid "
    if number != "USR1":
        assert eventually(lambda: refused in aiosd.log()[began:]), aiosd.log()[began:]
        assert "ignored" in aiosd.log()[began:]
    job.stdin.close()  # type: ignore[union-attr]
    assert job.wait(30) in (0, 1)
    assert "stopping" not in aiosd.log()[began:]
    assert "settings" not in aiosd.log()[began:]
    assert aiosd.run("aios-run", "--", "true").returncode == 0


def test_orders_come_from_the_guardian_or_from_linux() -> None:
    supervisor = object.__new__(Supervisor)
    supervisor.children, supervisor.guardian = {}, 77
    assert not supervisor._is_refused(SignalInfo(signal.SIGTERM, 77))
    assert not supervisor._is_refused(SignalInfo(signal.SIGTERM, 0))
    assert supervisor._is_refused(SignalInfo(signal.SIGTERM, os.getpid()))
    assert supervisor._is_refused(SignalInfo(signal.SIGTERM, 1 << 30))


def test_the_person_stops_it_and_the_log_names_the_sender(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--threads", "1")
    assert system.stop() == 0
    assert f"SIGTERM from pid {os.getpid()} (" in system.log()
    assert "stopping (SIGTERM)" in system.log(), "not that it comes from aiosd itself, which passes it on"


def sent_by(sender: int, supervisor: int) -> bool:
    info = SimpleNamespace(si_signo=signal.SIGTERM, si_pid=sender)
    return not guardian._is_refused(info, supervisor)  # type: ignore[arg-type]


def test_whose_signals_the_guardian_obeys() -> None:
    assert sent_by(0, os.getpid())
    assert sent_by(os.getppid(), os.getpid())
    assert not sent_by(os.getpid(), os.getpid())
    assert sent_by(1 << 30, os.getpid())  # a sender that has ended, as `kill` and `pkill` have
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert not sent_by(child.pid, os.getpid())
        child.stdin.close()  # type: ignore[union-attr]
