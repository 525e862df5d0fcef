"""Reading /proc of real processes."""

from __future__ import annotations

import os
import subprocess
import sys

from aiosd import procfs

NOBODY = 1 << 30


def test_a_process_that_is_gone_is_no_error() -> None:
    assert procfs.read_stat(NOBODY) is None
    assert procfs.children(NOBODY) == []
    assert procfs.descendants(NOBODY) == []
    assert procfs.pss_bytes(NOBODY) == procfs.threads_below(NOBODY, 9) == 0


def test_finds_grandchildren() -> None:
    script = "import subprocess,sys; p=subprocess.Popen(['cat']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert child.pid in procfs.children(os.getpid())
        assert procfs.descendants(child.pid) == [grandchild]
        stat = procfs.read_stat(grandchild)
        assert stat is not None
        assert stat.ppid == child.pid
        assert procfs.pss_bytes(child.pid) > 0
        assert procfs.threads_below(child.pid, 9) >= 2


def test_a_name_full_of_parentheses_and_spaces_is_read_right() -> None:
    script = "open('/proc/self/comm','w').write(') R 1 ('); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        stat = procfs.read_stat(child.pid)
        assert stat is not None
        assert stat.ppid == os.getpid()
        child.communicate(b"\n")
