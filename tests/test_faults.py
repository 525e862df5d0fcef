"""Processes of aiosd die while agents work: what the agents notice."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from aiosd.kernel.journal import MAGIC, VERSION
from libaios import agent, aio, wire
from libaios.client import Client
from libaios.home import Home
from tests import impatient
from tests.conftest import System, eventually
from tests.ticker import Ticker

Fresh = Callable[..., System]

pytestmark = pytest.mark.alone  # how soon a hang is found

STREAM = """
import sys
import libaios as aios
for piece in aios.llm.complete("Once", max_tokens=400, temperature=0.0, ignore_eos=True, stream=True):
    sys.stdout.write(piece.text)
    sys.stdout.flush()
print("|", piece.finish_reason, piece.usage.completion_tokens)
"""


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream.py"
    path.write_text(STREAM)
    return path


def ospid(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


def finish(job: subprocess.Popen[str]) -> tuple[str, str]:
    """The rest of a process's output. (`communicate` would lose the part that was read already.)"""
    assert job.stdout is not None
    assert job.stderr is not None
    out, err = job.stdout.read(), job.stderr.read()
    job.wait(30)
    return out, err


def kill(system: System, name: str) -> None:
    """kill -9 one of aiosd's processes, and wait until its successor runs."""
    old = ospid(system, name)
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def send_signal(system: System, name: str, number: int) -> None:
    """Send a signal to an agent without a command: until one has started, the generation might be over."""
    with Client(Home(system.home)) as client:
        (pid,) = [one.pid for one in client.call(wire.Sys.PS, wire.Ps(), list[wire.ProcInfo]) if one.name == name]
        client.call(wire.Sys.KILL, wire.Kill(pid, number), None)


def test_a_dead_core_costs_a_pause(fresh_aiosd: Fresh, stream: Path) -> None:
    system = fresh_aiosd("--threads", "1", "--exact")
    expected = system.run("aios-run", stream, check=True).stdout
    job = system.popen("aios-run", stream)
    assert job.stdout is not None
    begun = job.stdout.read(10)
    kill(system, "llm")
    rest, errors = finish(job)
    assert (job.returncode, errors) == (0, "")
    assert begun + rest == expected
    (model,) = system.status()["models"]
    assert model["deaths"] == 1
    assert "SIGKILL" in model["last_death"]


POISONED = """
import os
from aiosd.commands import main
from aiosd.llm.request import Requests
tokens = Requests._tokens
def deadly(self, text):
    if "POISON" in text:
        os.abort()
    return tokens(self, text)
Requests._tokens = deadly
main("aiosd")
"""


def test_a_call_whose_parsing_ends_the_core_is_blamed_alone(fresh_aiosd: Fresh, stream: Path) -> None:
    """Other calls, running and waiting ones, go on with the right text, however often the call is repeated."""
    system = fresh_aiosd("--threads", "1", "--exact", "--slots", "2", program=(sys.executable, "-c", POISONED))
    expected = system.run("aios-run", stream, check=True).stdout
    jobs = [system.popen("aios-run", stream) for _ in range(4)]
    begun = [job.stdout.read(10) for job in jobs[:1] if job.stdout is not None]
    with Client(Home(system.home)) as client:
        poison = wire.Generate(prompt="POISON", sampling=wire.Sampling(max_tokens=5))
        with pytest.raises(OSError, match="died twice while this call was running") as caught:
            client.call(wire.Sys.GENERATE, poison, wire.Generated, timeout=60.0)
    assert caught.value.errno == errno.EIO
    for job, first in zip(jobs, [*begun, "", "", ""], strict=True):
        rest, errors = finish(job)
        assert (job.returncode, errors) == (0, "")
        assert first + rest == expected
    (model,) = system.status()["models"]
    assert model["deaths"] == 2


def test_a_dead_kernel_costs_a_pause(fresh_aiosd: Fresh, stream: Path) -> None:
    """Agents, pids and names are kept; an open stream goes on; aios-run gets the exit code."""
    system = fresh_aiosd("--threads", "1", "--exact")
    expected = system.run("aios-run", stream, check=True).stdout
    detached = system.run("aios-run", "-d", "--name", "sleeper", "-n", "3", "--", "sleep", "1000", check=True)
    sleeper = detached.stdout.strip()
    job = system.popen("aios-run", stream)
    assert job.stdout is not None
    begun = job.stdout.read(10)
    pid = next(entry["pid"] for entry in system.ps() if entry["name"] == "stream")
    kill(system, "kernel")
    rest, errors = finish(job)
    assert (job.returncode, errors) == (0, "")
    assert begun + rest == expected
    (found,) = json.loads(system.run("aios-inspect", str(pid), check=True).stdout)
    assert found["completion_tokens"] == 400  # none counted twice, none lost
    entry = next(entry for entry in system.ps() if entry["name"] == "sleeper")
    assert (str(entry["pid"]), entry["nice"], entry["stat"]) == (sleeper, 3, "S")
    assert system.run("aios-kill", "--timeout", "5", "sleeper").returncode == 0
    assert system.run("aios-wait", sleeper).returncode == 143


def test_a_child_is_not_spawned_twice_and_its_status_not_lost(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import libaios as aios\n"
        "pids = [aios.proc.spawn('sh', '-c', 'read x; exit 5') for _ in range(3)]\n"
        "print(len(set(pids)), flush=True)\n"
        "print(sorted(aios.proc.wait() for _ in pids) == [(pid, 5) for pid in sorted(pids)])\n"
    )
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", script)
    assert job.stdout is not None
    assert job.stdin is not None
    assert job.stdout.readline() == "3\n"
    kill(system, "kernel")
    job.stdin.close()  # the children end while there is no kernel, or soon after
    assert job.stdout.read() == "True\n"
    assert job.wait(30) == 0
    assert len([entry for entry in system.ps() if entry["name"] == "sh"]) == 0


def test_a_spawn_that_is_submitted_again_has_its_descriptors(fresh_aiosd: Fresh) -> None:
    """Even if the caller has closed its own by then."""
    system = fresh_aiosd("--threads", "1")
    kernel = ospid(system, "kernel")
    reading, writing = os.pipe()
    with Client(Home(system.home)) as client:
        os.kill(kernel, signal.SIGSTOP)
        spawn = wire.Spawn("exec", "sh", args=["-c", "echo here"], env={"PATH": os.environ["PATH"]})
        call = client.submit(wire.Sys.SPAWN, spawn, (writing, writing, writing))
        os.close(writing)
        os.kill(kernel, signal.SIGKILL)
        client.result(call, wire.Spawned, 20.0)
        with open(reading) as output:
            assert output.read() == "here\n"


def test_the_event_loop_of_a_client_goes_on_while_there_is_no_kernel(
    fresh_aiosd: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fresh_aiosd("--threads", "1")
    monkeypatch.setenv(wire.ENV_HOME, str(system.home))
    pid = int(system.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout)
    kernel, supervisor = ospid(system, "kernel"), ospid(system, "supervisor")

    async def main() -> tuple[int, int]:
        waiting = asyncio.create_task(aio.proc.wait(pid))
        assert len(await aio.proc.ps()) == 1
        ticker = Ticker()
        os.kill(supervisor, signal.SIGSTOP)  # no new kernel meanwhile
        os.kill(kernel, signal.SIGKILL)
        meanwhile = asyncio.create_task(aio.proc.ps())
        await ticker.turn()
        os.kill(supervisor, signal.SIGCONT)
        assert len(await meanwhile) == 1
        await aio.proc.kill(pid)
        status = await waiting
        await ticker.turn(1)
        ticker.stop()
        return status

    try:
        assert asyncio.run(main()) == (pid, -signal.SIGTERM)
    finally:
        agent.reset()


def connected(system: System) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.connect(str(system.home / "aiosd.sock"))
    return sock


def exchange(sock: socket.socket, message: object) -> bytes:
    """Send one frame; returns the next one that arrives."""
    data = wire.encode(message)
    sock.sendall(struct.pack("<I", len(data)) + data)
    (length,) = struct.unpack("<I", sock.recv(4, socket.MSG_WAITALL))
    return sock.recv(length, socket.MSG_WAITALL)


def test_a_relative_nice_that_is_sent_again_is_done_once(fresh_aiosd: Fresh) -> None:
    """The reply was lost with the kernel that gave it."""
    system = fresh_aiosd("--threads", "1")
    pid = int(system.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout)
    nice = wire.raw(wire.NiceArgs(pid, 3, relative=True))
    with connected(system) as sock:
        welcome = msgspec.msgpack.decode(exchange(sock, wire.Hello(wire.VERSION)), type=wire.Welcome)
        reply = wire.decode_reply(exchange(sock, wire.Request(1, wire.Sys.NICE, nice)))
        assert (reply.errno, msgspec.msgpack.decode(reply.body)) == (0, 3)
    kill(system, "kernel")
    assert system.agents()[0]["nice"] == 3
    with connected(system) as sock:
        exchange(sock, wire.Hello(wire.VERSION, welcome.client, welcome.boot))
        for number, again, value in ((1, True, 3), (2, False, 6)):
            reply = wire.decode_reply(exchange(sock, wire.Request(number, wire.Sys.NICE, nice, again)))
            assert (reply.errno, msgspec.msgpack.decode(reply.body)) == (0, value)
    assert system.agents()[0]["nice"] == 6


WAITER = """
import errno, os, sys
from msgspec import msgpack
from libaios import wire
from libaios.agent import own_channel
from libaios.channel import Channel, Side
from libaios.wire import Spawn, Sys, Wait
channel = Channel(*own_channel(), Side.AGENT)
def call(number, sys_, args, again=False):
    channel.send(wire.encode(wire.Request(number, sys_, wire.raw(args), again)))
    while not (frames := channel.receive()):
        channel.wait(1.0)
    reply = wire.decode_reply(frames[0])
    return reply.errno or msgpack.decode(reply.body)[:2]
pid, _ = call(1, Sys.SPAWN, Spawn("exec", "sh", ["-c", "exit 7"], dict(os.environ), "/"))
print(call(2, Sys.WAIT, Wait(pid)) == [pid, 7], flush=True)
while not channel.reborn:
    channel.wait(1.0)
channel.receive()
channel.renew()
print(call(2, Sys.WAIT, Wait(pid), again=True) == [pid, 7], call(3, Sys.WAIT, Wait(pid)) == errno.ECHILD)
"""


def test_a_wait_that_is_sent_again_gets_the_same_status_once(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    script = tmp_path / "waiter.py"
    script.write_text(WAITER)
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", script)
    assert job.stdout is not None
    assert job.stdout.readline() == "True\n"
    kill(system, "kernel")
    assert finish(job) == ("True True\n", "")


def test_agents_that_end_while_there_is_no_kernel(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """The next kernel reaps them, and their children get another parent."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import libaios as aios\naios.proc.spawn('sleep', '1000')\n"
        "aios.proc.spawn('sh', '-c', 'exit 3')\naios.msg.recv()\n"
    )
    system = fresh_aiosd("--threads", "1")
    pids = [system.run("aios-run", "-d", "--name", "parent", script, check=True).stdout.strip() for _ in range(2)]
    assert eventually(lambda: len([one for one in system.ps() if one["exit"] == 3]) == 2), "zombies of live parents"
    assert len([one for one in system.agents() if one["name"] == "sleep"]) == 2
    supervisor, kernel = ospid(system, "supervisor"), ospid(system, "kernel")
    parents = [one["ospid"] for one in system.agents() if one["name"] == "parent"]
    os.kill(supervisor, signal.SIGSTOP)  # so that it finds all three dead at once
    for victim in (kernel, *parents):
        os.kill(victim, signal.SIGKILL)
    os.kill(supervisor, signal.SIGCONT)
    assert eventually(lambda: not psutil.pid_exists(kernel))
    assert eventually(lambda: all(one["exit"] is None for one in system.ps())), system.ps()
    assert [(one["name"], one["ppid"]) for one in system.agents()] == 2 * [("sleep", 1)]
    assert [system.run("aios-wait", pid).returncode for pid in pids] == [137, 137]
    assert system.run("aiosd", "status", "--check").returncode == 0


def test_the_system_dies_with_its_supervisor(fresh_aiosd: Fresh) -> None:
    check_death(fresh_aiosd(), lambda system: ospid(system, "supervisor"))


def test_the_system_dies_with_its_guardian(fresh_aiosd: Fresh) -> None:
    check_death(fresh_aiosd(), lambda system: system.daemon.pid)  # type: ignore[union-attr]


def check_death(system: System, victim: Callable[[System], int]) -> None:
    """Check that soon no process is left, not even detached descendants that ignore TERM."""
    deaf = "trap '' TERM HUP; (setsid sh -c 'trap \"\" TERM HUP; sleep 1000' &); sleep 1000"
    for _ in range(3):
        system.run("aios-run", "-d", "--", "sh", "-c", deaf, check=True)
    assert eventually(lambda: len(system.processes()) >= 9)
    os.kill(victim(system), signal.SIGKILL)
    assert eventually(lambda: not system.processes())
    system.daemon.wait(30)  # type: ignore[union-attr]
    system.start()
    assert system.run("aios-run", "--", "true").returncode == 0


def test_an_agent_gets_hup_when_its_aios_run_is_killed(aiosd: System) -> None:
    job = aiosd.popen("aios-run", "--name", "orphaned", "--", "sleep", "1000")
    assert eventually(lambda: aiosd.agents())
    (entry,) = aiosd.agents()
    job.kill()
    job.wait()
    assert eventually(lambda: not aiosd.agents())
    assert aiosd.run("aios-wait", str(entry["pid"])).returncode == 128 + signal.SIGHUP


def test_a_parked_generation_goes_on_as_if_nothing_had_happened(aiosd: System, stream: Path) -> None:
    stream.write_text(STREAM.replace("400", "1900"))
    aiosd.run("aios-run", stream, check=True)  # now its prompt is cached, which may change the last bits
    expected = aiosd.run("aios-run", stream, check=True).stdout
    job = aiosd.popen("aios-run", "--name", "parked", stream)
    assert job.stdout is not None
    begun = job.stdout.read(10)
    send_signal(aiosd, "parked", signal.SIGSTOP)
    (entry,) = aiosd.agents()
    assert entry["stat"] == "T"
    assert aiosd.agents()[0]["completion_tokens"] == entry["completion_tokens"] < 1900
    aiosd.run("aios-kill", "-CONT", "parked", check=True)
    assert begun + finish(job)[0] == expected


def test_what_was_parked_when_the_kernel_died_goes_on_at_cont(fresh_aiosd: Fresh, stream: Path) -> None:
    stream.write_text(STREAM.replace("400", "1900"))
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", "--name", "parked", stream)
    assert job.stdout is not None
    begun = job.stdout.read(10)
    send_signal(system, "parked", signal.SIGSTOP)
    kill(system, "kernel")
    assert eventually(lambda: system.status()["models"][0]["state"] == "ready")
    assert system.agents()[0]["stat"] == "T"
    system.run("aios-kill", "-CONT", "parked", check=True)
    rest, errors = finish(job)
    assert (job.returncode, errors) == (0, "")
    assert len(begun + rest) > 1000


def test_a_killed_agent_frees_its_slot(aiosd: System, stream: Path) -> None:
    stream.write_text(STREAM.replace("400", "1900"))  # it must not end before the kill
    job = aiosd.popen("aios-run", "--name", "victim", stream)
    assert job.stdout is not None
    job.stdout.read(10)
    send_signal(aiosd, "victim", signal.SIGKILL)
    assert job.wait(30) == 137
    assert eventually(lambda: aiosd.status()["models"][0]["stats"]["slots"]["used"] == 0)


@pytest.mark.parametrize("name", ["kernel", "llm"])
def test_a_part_that_hangs_is_replaced(fresh_aiosd: Fresh, stream: Path, name: str) -> None:
    system = fresh_aiosd("--threads", "1", "--exact", program=impatient.PROGRAM)
    expected = system.run("aios-run", stream, check=True).stdout
    job = system.popen("aios-run", stream)
    assert job.stdout is not None
    begun = job.stdout.read(10)
    os.kill(ospid(system, name), signal.SIGSTOP)
    rest, errors = finish(job)
    assert (job.returncode, errors) == (0, "")
    assert begun + rest == expected
    assert f"hangs (no heartbeat for {impatient.HANG_S:g} s)" in system.log()


def test_a_supervisor_that_hangs_ends_the_system(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    os.kill(ospid(system, "supervisor"), signal.SIGSTOP)
    assert system.daemon is not None
    assert system.daemon.wait(30) == 1
    assert eventually(lambda: not system.processes())


def test_messages_are_delivered_once_and_in_order_over_kernel_deaths(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    (tmp_path / "sink.py").write_text(
        "import libaios as aios\n"
        "parent = aios.proc.getppid()\n"
        "for n in range(3000):\n"
        "    sender, obj = aios.msg.recv()\n"
        "    assert (sender, obj) == (parent, n), (sender, obj, n)\n"
        "print('all', flush=True)\n"
    )
    (tmp_path / "source.py").write_text(
        "import libaios as aios, sys\n"
        "pid = aios.proc.spawn('sink.py')\n"
        "n = 0\n"
        "while n < 3000:\n"
        "    try: aios.msg.send(pid, n)\n"
        "    except BlockingIOError: continue\n"
        "    n += 1\n"
        "    if n == 100: print('going', flush=True)\n"
        "print(aios.proc.wait(pid)[1])\n"
    )
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", "source.py", cwd=tmp_path)
    assert job.stdout is not None
    assert job.stdout.readline() == "going\n"
    for _ in range(3):
        kill(system, "kernel")
    out, errors = finish(job)
    assert (out, errors, job.returncode) == ("all\n0\n", "", 0)


def test_an_agent_that_ruins_its_header_ends_alone(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """Both while the kernel runs, and when only the next kernel reads the header."""
    script = tmp_path / "vandal.py"
    script.write_text(
        "import os, sys\n"
        "memfd = int(os.environ['AIOS_CHANNEL'].split(':')[0])\n"
        "os.pwrite(memfd, b'\\xff' * 4096, 0)\n"
        "print('ruined', flush=True)\n"
        "sys.stdin.read()\n"
    )
    system = fresh_aiosd("--threads", "1")
    system.run("aios-run", "-d", "--name", "bystander", "--", "sleep", "1000", check=True)
    job = system.popen("aios-run", script)
    assert job.stdout is not None
    seen_at_once = job.stdout.readline() != "ruined\n"  # the kernel has just looked into its ring
    if not seen_at_once:
        kill(system, "kernel")
    assert eventually(lambda: job.poll() == 137)
    assert [entry["name"] for entry in system.agents()] == ["bystander"]
    assert system.status()["kernel"]["epoch"] == (1 if seen_at_once else 2)


def test_a_journal_of_another_release_ends_the_system_with_a_sentence(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--threads", "1")
    files = Path(f"/proc/{ospid(system, 'supervisor')}/fd")
    for number in os.listdir(files):
        if "aios-journal" in os.readlink(files / number):
            with open(files / number, "r+b") as journal:
                journal.write(struct.pack("=2Q", MAGIC, VERSION + 1))
    assert system.daemon is not None
    os.kill(ospid(system, "kernel"), signal.SIGKILL)
    assert system.daemon.wait(30) == 1
    assert f"a journal of version {VERSION + 1}; this is version {VERSION}" in system.log()
