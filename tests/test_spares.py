"""Many agents at once are forked in batches, ahead of need, and behave as if they were not."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aiosd.birth import modules
from aiosd.birth.rehearsal import rehearse
from aiosd.birth.spares import BATCH, FRESH_S, PID, Brooder, Spares, pair
from aiosd.init.supervisor import _backoff
from aiosd.ipc import link
from aiosd.timers import Timers
from tests.conftest import System, descriptors, eventually, segments

PARENT = """
import json, os, sys
import libaios as aios
os.environ["COLOUR"] = "green"
pids = [aios.proc.spawn("child.py", str(n), name=f"child{n}") for n in range(int(sys.argv[1]))]
assert len(set(pids)) == len(pids)
print([aios.proc.wait(pid)[1] for pid in pids])
"""

CHILD = """
import os, random, sys
import libaios as aios
line = [os.environ["COLOUR"], os.getcwd(), str(aios.proc.getppid() > 1), str(os.getsid(0) == os.getpid())]
line += [open("/proc/self/comm").read().strip(), str(random.getrandbits(64)), str(len(os.listdir("/proc/self/fd")))]
os.write(1, (" ".join(line) + "\\n").encode())
sys.exit(int(sys.argv[1]))
"""


def spares(system: System) -> list[psutil.Process]:
    found = []
    supervisor = psutil.Process(next(entry["ospid"] for entry in system.ps() if entry["name"] == "supervisor"))
    for process in supervisor.children():
        with contextlib.suppress(psutil.Error):
            if process.name() == "aios:spare":
                found.append(process)
    return found


def crowd(system: System, folder: Path, number: int) -> list[list[str]]:
    (folder / "parent.py").write_text(textwrap.dedent(PARENT))
    (folder / "child.py").write_text(textwrap.dedent(CHILD))
    done = system.run("aios-run", "parent.py", str(number), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, statuses = done.stdout.splitlines()
    assert statuses == str(list(range(number)))
    return [line.split() for line in lines]


def test_each_of_a_crowd_is_the_agent_it_should_be(aiosd: System, tmp_path: Path) -> None:
    lines = crowd(aiosd, tmp_path, 80)
    assert len(lines) == 80
    assert {tuple(line[:4]) for line in lines} == {("green", str(tmp_path), "True", "True")}
    assert {line[4] for line in lines} == {f"child{n}" for n in range(80)}
    assert len({line[5] for line in lines}) == 80  # no two have the same random numbers
    assert {line[6] for line in lines} == {"7"}  # three, bell, channel and its mapping, the folder being listed


LOOKS = r"""
import errno, json, os, re
import libaios as aios
def tried(path):
    try:
        return len(os.listdir(path)) > 0 if os.path.isdir(path) else len(open(path, "rb").read(1))
    except OSError as err:
        return errno.errorcode[err.errno]
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
fds = sorted(re.sub(r"\d+", "N", os.readlink(link)) for link in links if os.path.lexists(link))
paths = ("/etc/passwd", "/etc/shadow", "/etc", "/usr/bin", "/bin/sh", "/root", "/", "/proc/1/environ", "/tmp",
         "/dev/null", "/dev/shm", "/sys/fs/cgroup", "/sys/kernel", os.path.dirname(os.getcwd()), os.__file__)
status = [line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs", "Seccomp:"))]
aios.msg.send(aios.proc.getppid(), json.dumps([{path: tried(path) for path in paths}, status, fds]))
"""

CROWD_LOOKS = """
import sys
import libaios as aios
pids = [aios.proc.spawn("looks.py", sandbox=sys.argv[1], detached=True) for _ in range(int(sys.argv[2]))]
for text in sorted({aios.msg.recv()[1] for _ in pids}):
    print(text)
"""


@pytest.mark.parametrize("level", ["flat", "cage"])
def test_an_agent_that_was_forked_ahead_is_confined_as_one_that_was_not(
    aiosd: System, tmp_path: Path, level: str
) -> None:
    (tmp_path / "looks.py").write_text(LOOKS)
    (tmp_path / "crowd.py").write_text(CROWD_LOOKS)
    alone = aiosd.run("aios-run", "--sandbox", "none", "crowd.py", level, "1", cwd=tmp_path)
    many = aiosd.run("aios-run", "--sandbox", "none", "crowd.py", level, "24", cwd=tmp_path)
    assert (alone.stderr, many.stderr) == ("", "")
    assert len(alone.stdout.splitlines()) == 1
    assert many.stdout == alone.stdout


@pytest.mark.alone  # spares are made for spawns that come within 0.1 s
def test_spares_end_when_they_are_not_needed(aiosd: System, tmp_path: Path) -> None:
    assert eventually(lambda: crowd(aiosd, tmp_path, 3) and spares(aiosd), 60)  # on a busy machine they may have ended
    assert aiosd.run("aiosd", "status", "--check").returncode == 0
    assert eventually(lambda: not spares(aiosd))


def test_agents_start_although_spares_were_killed(aiosd: System, tmp_path: Path) -> None:
    crowd(aiosd, tmp_path, 3)
    for process in spares(aiosd)[::2]:
        os.kill(process.pid, signal.SIGKILL)
    assert len(crowd(aiosd, tmp_path, 50)) == 50


def test_one_agent_makes_no_spares(aiosd: System) -> None:
    assert eventually(lambda: not spares(aiosd))
    aiosd.run("aios-run", "--", "true", check=True)
    assert not spares(aiosd)


def test_the_next_batch_is_ordered_when_a_quarter_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not later, because a batch is forked while spawns use up the one before."""
    spares, left, ordered = Spares(Timers(lambda: 0.0)), list(range(BATCH[1])), []
    spares._batch = BATCH[1]
    fork = link.Fork((1, 1), 1, 0, 0, "x", 0, "g", 0, False, False, False)
    monkeypatch.setattr(spares, "_waiting", left)
    monkeypatch.setattr(spares, "_turn_spare", lambda payload, fds: (left.pop(), None))
    monkeypatch.setattr(spares, "_order", lambda: ordered.append(len(left)))
    monkeypatch.setattr(modules, "hide", lambda: None)
    while left and not ordered:
        spares.start(fork, 1, "/", (0, 1, 2), 3, 4, 5)
    assert ordered == [BATCH[1] * 3 // 4]


# ── the brooder's end ─────────────────────────────────────────────────────────────────────────────────────

BROODER = 1 << 22  # no process has this pid or the next ones


@pytest.fixture
def brooding() -> Iterator[tuple[Spares, list[socket.socket], int]]:
    """Three spares that are being forked: the spares' ends of their sockets, and the brooder's end of the pipe."""
    spares, pairs = Spares(Timers(lambda: 0.0)), [pair() for _ in range(3)]
    pipe, reports = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    spares._brooder = Brooder(BROODER, [ours for ours, _ in pairs], pipe)
    spares._batch *= 2
    yield spares, [theirs for _, theirs in pairs], reports
    spares.dismiss()
    os.close(reports)
    for _, theirs in pairs:
        theirs.close()


def report(reports: int, *ospids: int) -> None:
    os.write(reports, b"".join(map(PID.pack, ospids)))


def dismissed(theirs: socket.socket) -> bool:
    try:
        return theirs.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def test_spares_wait_once_their_brooder_has_ended(brooding: tuple[Spares, list[socket.socket], int]) -> None:
    spares, ends, reports = brooding
    report(reports, BROODER + 1, BROODER + 2, BROODER + 3)
    assert spares.ospids() == {BROODER, BROODER + 1, BROODER + 2, BROODER + 3}  # none of them is an orphan
    assert spares.ended(BROODER)
    assert spares.ospids() == {BROODER + 1, BROODER + 2, BROODER + 3}
    assert [dismissed(end) for end in ends] == [False, False, False]
    assert spares.ended(BROODER + 2)  # killed while it waited
    assert [dismissed(end) for end in ends] == [False, True, False]
    assert not spares.ended(BROODER + 2)  # another process with its pid
    spares.dismiss()
    assert spares.ospids() == {BROODER + 1, BROODER + 3}  # until they have ended
    assert spares.ended(BROODER + 1)
    assert spares.ended(BROODER + 3)
    assert spares.ospids() == set()


@pytest.mark.parametrize("born", [(), (BROODER + 1,)])
def test_a_brooder_that_was_killed_or_could_not_fork(
    brooding: tuple[Spares, list[socket.socket], int], born: tuple[int, ...]
) -> None:
    spares, ends, reports = brooding
    report(reports, *born)
    assert spares.ended(BROODER)
    assert spares.ospids() == set(born)
    assert [dismissed(end) for end in ends] == [number >= len(born) for number in range(3)]


def test_a_spare_that_ended_before_its_brooder_is_not_used(
    brooding: tuple[Spares, list[socket.socket], int],
) -> None:
    spares, ends, reports = brooding
    report(reports, BROODER + 1, BROODER + 2)
    assert spares.ended(BROODER + 1)
    assert spares.ended(BROODER)
    assert spares.ospids() == {BROODER + 2}
    assert [dismissed(end) for end in ends] == [True, False, True]


def test_spares_dismissed_before_they_are_forked_end(brooding: tuple[Spares, list[socket.socket], int]) -> None:
    spares, ends, reports = brooding
    spares.dismiss()
    report(reports, BROODER + 1, BROODER + 2, BROODER + 3)
    assert spares.ended(BROODER)
    assert all(map(dismissed, ends))
    assert spares.ospids() == {BROODER + 1, BROODER + 2, BROODER + 3}


def test_a_spare_that_has_waited_for_long_is_not_used(brooding: tuple[Spares, list[socket.socket], int]) -> None:
    """Files whose rules it has may have been replaced since its brooder opened them."""
    spares, ends, reports = brooding
    report(reports, BROODER + 1, BROODER + 2, BROODER + 3)
    assert spares.ended(BROODER)
    turned = spares._turn_spare(b"x", ())
    assert turned is not None
    turned[1].close()
    spares._timers.clock = lambda: FRESH_S + 1
    assert spares._turn_spare(b"x", ()) is None
    assert [dismissed(end) for end in ends[1:]] == [True, True]
    assert spares.ospids() == {BROODER + 2, BROODER + 3}  # until they have ended


def test_the_rehearsal_leaves_nothing_behind() -> None:
    before = descriptors() | segments()
    rehearse()
    assert descriptors() | segments() == before


def test_restarts_back_off_in_a_crash_loop_only() -> None:
    wait, waits = 0.1, []
    for _ in range(8):
        wait = _backoff(wait, lived_s=0.1)
        waits.append(wait)
    assert waits == sorted(waits)
    assert waits[0] < 0.2
    assert waits[-1] == 5.0
    assert _backoff(5.0, lived_s=60.0) == 0.1  # a long life
    assert _backoff(0.1, lived_s=1.0) == 0.1  # killed once
