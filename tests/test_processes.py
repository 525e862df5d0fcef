"""Processes as agents see them: families, signals, messages, budgets; in a real system, from inside real agents."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import System, eventually

HEADER = "import json, os, signal, sys, time\nimport libaios as aios\n"


@pytest.fixture
def agent(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write an agent's script; returns its path."""

    def write(code: str, name: str = "agent.py") -> Path:
        path = tmp_path / name
        path.write_text(HEADER + textwrap.dedent(code))
        return path

    return write


Write = Callable[..., Path]


def run(system: System, script: Path, *args: str, **options: Any) -> str:
    done = system.run("aios-run", script, *args, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


# ── families ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_child_knows_its_parent_and_the_parent_gets_its_status(aiosd: System, agent: Write) -> None:
    agent("print(aios.proc.getppid(), flush=True); sys.exit(int(sys.argv[1]))", "child.py")
    parent = agent("""
        pid = aios.proc.spawn("child.py", "7")
        assert aios.proc.wait(pid) == (pid, 7)
        print(aios.proc.getpid())
    """)
    theirs, mine = run(aiosd, parent, cwd=parent.parent).split()
    assert theirs == mine


def test_a_child_inherits_stdout_environment_and_folder(aiosd: System, agent: Write, tmp_path: Path) -> None:
    parent = agent("""
        print("before")
        os.environ["COLOUR"] = "green"
        aios.proc.wait(aios.proc.spawn("sh", "-c", "echo $COLOUR; pwd; cat"))
        print("after")
    """)
    out = run(aiosd, parent, cwd=tmp_path, input="from stdin\n")
    assert out.split("\n") == ["before", "green", str(tmp_path), "from stdin", "after", ""]


def test_a_dead_child_is_a_zombie_until_it_is_waited_for(aiosd: System, agent: Write) -> None:
    parent = agent("""
        pid = aios.proc.spawn("sh", "-c", "exit 3")
        def state():
            return {p.pid: (p.stat, p.exit) for p in aios.proc.ps(all=True)}.get(pid)
        while state() != ("Z", 3): pass
        assert aios.proc.wait() == (pid, 3)
        assert state() is None
        try: aios.proc.wait()
        except ChildProcessError as err: print(err.strerror)
    """)
    assert run(aiosd, parent) == "the caller has no children\n"


def test_wait_without_blocking_and_with_a_timeout(aiosd: System, agent: Write) -> None:
    parent = agent("""
        pid = aios.proc.spawn("sleep", "1000")
        assert aios.proc.wait(pid, block=False) == (0, 0)
        try: aios.proc.wait(pid, timeout=0.05)
        except TimeoutError: print("timeout")
        aios.proc.kill(pid, signal.SIGKILL)
        assert aios.proc.wait(pid) == (pid, -9)
    """)
    assert run(aiosd, parent) == "timeout\n"


def test_wait_for_any_takes_each_child_once(aiosd: System, agent: Write) -> None:
    parent = agent("""
        pids = {aios.proc.spawn("sh", "-c", f"exit {n}"): n for n in range(5)}
        assert dict(aios.proc.wait() for _ in pids) == pids
        print("all")
    """)
    assert run(aiosd, parent) == "all\n"


def test_of_two_waits_for_one_child_one_gets_it_and_the_other_an_error(aiosd: System, agent: Write) -> None:
    parent = agent("""
        import errno, threading
        child = aios.proc.spawn("sh", "-c", "read x")
        got, up = [], threading.Barrier(4)
        def wait(pid):
            up.wait()
            try:
                got.append(aios.proc.wait(pid))
            except OSError as error:
                got.append(error.errno)
        threads = [threading.Thread(target=wait, args=(pid,)) for pid in (child, child, 0)]
        [thread.start() for thread in threads]
        up.wait()
        print("up", flush=True)
        [thread.join() for thread in threads]
        assert sorted(got, key=str) == sorted([(child, 0), errno.ECHILD, errno.ECHILD], key=str), got
    """)
    job = aiosd.popen("aios-run", parent)
    assert job.stdout is not None
    assert job.stdin is not None
    assert job.stdout.readline() == "up\n"
    job.stdin.write("\n")
    job.stdin.close()
    assert job.wait(30) == 0, job.stderr


def test_a_child_can_be_killed_as_soon_as_it_is_there(aiosd: System, agent: Write) -> None:
    """In its first microseconds it has no session of its own."""
    parent = agent("""
        for number in 40 * (signal.SIGKILL, signal.SIGTERM):
            pid = aios.proc.spawn("sleep", "1000")
            aios.proc.kill(pid, number)
            assert aios.proc.wait(pid, timeout=20) == (pid, -number)
    """)
    run(aiosd, parent)


def test_a_child_that_is_stopped_as_soon_as_it_is_there_goes_on(aiosd: System, agent: Write) -> None:
    parent = agent("""
        for _ in range(20):
            pid = aios.proc.spawn("sh", "-c", "exit 3")
            aios.proc.kill(pid, signal.SIGSTOP)
            aios.proc.kill(pid, signal.SIGCONT)
            assert aios.proc.wait(pid, timeout=20) == (pid, 3)
    """)
    run(aiosd, parent)


def test_stop_and_cont_at_once_leave_no_command_waiting(aiosd: System, agent: Write) -> None:
    """Linux may report neither."""
    child = agent(
        """
        while True:
            aios.llm.complete([5] * 8, max_tokens=4, ignore_eos=True)
            aios.msg.send(aios.proc.getppid(), "on")
    """,
        "busy.py",
    )
    parent = agent(f"""
        import asyncio
        from libaios import aio
        pid = aios.proc.spawn({str(child)!r})
        async def main():
            for _ in range(40):
                both = aio.proc.kill(pid, signal.SIGSTOP), aio.proc.kill(pid, signal.SIGCONT)
                await asyncio.wait_for(asyncio.gather(*both), 20)
        asyncio.run(main())
        while True:  # what it said before all this is of no interest
            try:
                aios.msg.recv(timeout=0)
            except TimeoutError:
                break
        assert aios.msg.recv(timeout=20)[1] == "on"
        aios.proc.kill(pid, signal.SIGKILL)
        assert aios.proc.wait(pid) == (pid, -signal.SIGKILL)
    """)
    run(aiosd, parent)


def test_orphans_go_to_pid_1_which_reaps_them(aiosd: System, agent: Write) -> None:
    parent = agent("print(aios.proc.spawn('sleep', '1000', detached=True))")
    pid = int(run(aiosd, parent))
    orphan = next(entry for entry in aiosd.ps() if entry["pid"] == pid)
    assert orphan["ppid"] == 1
    aiosd.run("aios-kill", "-KILL", str(pid), check=True)
    assert eventually(lambda: pid not in {entry["pid"] for entry in aiosd.ps()})  # no zombie is left
    assert aiosd.run("aios-wait", str(pid)).returncode == 137


def test_only_children_can_be_waited_for(aiosd: System, agent: Write) -> None:
    script = agent("""
        for pid in (1, 999999):
            try: aios.proc.wait(pid)
            except ChildProcessError as err: print(err.strerror)
    """)
    assert run(aiosd, script) == "1: is part of aiosd itself (see aiosd status, aiosd stop)\n999999: no such agent\n"


def test_a_program_that_cannot_be_started_is_an_error_with_its_errno(
    aiosd: System, agent: Write, tmp_path: Path
) -> None:
    (tmp_path / "plain").write_text("text")
    script = agent("""
        for target in ("nonesuch", "nonesuch.py", "./plain", "./"):
            try: aios.proc.spawn(target)
            except OSError as err: print(type(err).__name__, err.strerror)
    """)
    assert run(aiosd, script, cwd=tmp_path).splitlines() == [
        "FileNotFoundError nonesuch: not found",
        "FileNotFoundError nonesuch.py: not found",
        "PermissionError ./plain: permission denied",
        "PermissionError ./: is a directory",
    ]


# ── signals ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_may_not_touch_strangers(aiosd: System, agent: Write) -> None:
    stranger = int(aiosd.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout)
    script = agent("""
        for pid in (int(sys.argv[1]), 1):
            for act in (lambda: aios.proc.kill(pid), lambda: aios.proc.kill(pid, 0), lambda: aios.proc.nice(1, pid)):
                try: act()
                except PermissionError: print("denied")
    """)
    assert run(aiosd, script, str(stranger)) == "denied\n" * 6
    aiosd.run("aios-kill", str(stranger), check=True)


def test_commands_inside_an_agent_have_its_rights(aiosd: System, agent: Write) -> None:
    stranger = int(aiosd.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout)
    done = aiosd.run("aios-run", "--", "sh", "-c", f"aios-kill {stranger}; setsid aios-kill {stranger}; aiosd stop")
    assert done.returncode == 1
    assert done.stderr.count("permission denied") == 2
    assert "an agent may not stop the system" in done.stderr
    aiosd.run("aios-kill", str(stranger), check=True)


def test_a_group_is_signalled_as_one(aiosd: System, agent: Write) -> None:
    agent("aios.msg.send(aios.proc.getppid(), 'up'); aios.msg.recv()", "child.py")
    leader = agent("""
        pids = [aios.proc.spawn("child.py") for _ in range(3)]
        for _ in pids: aios.msg.recv()
        print(aios.proc.getpid(), flush=True)
        aios.msg.recv()
    """)
    job = aiosd.popen("aios-run", leader, cwd=leader.parent)
    assert job.stdout is not None
    group = int(job.stdout.readline())
    assert len(aiosd.agents()) == 4
    aiosd.run("aios-kill", "-KILL", "--", f"-{group}", check=True)
    assert job.wait(30) == 137
    assert eventually(lambda: aiosd.agents() == [])


def test_stop_parks_the_whole_family_and_cont_resumes_it(aiosd: System, agent: Write) -> None:
    agent("aios.msg.send(aios.proc.getppid(), 'up'); aios.msg.recv()", "child.py")
    parent = agent("""
        aios.proc.spawn("child.py")
        aios.msg.recv()
        print(aios.proc.getpid(), flush=True)
        aios.msg.recv()
    """)
    job = aiosd.popen("aios-run", parent, cwd=parent.parent)
    assert job.stdout is not None
    pid = job.stdout.readline().strip()
    aiosd.run("aios-kill", "-STOP", pid, check=True)
    assert {entry["stat"] for entry in aiosd.agents()} == {"T"}
    aiosd.run("aios-kill", "-CONT", pid, check=True)
    assert eventually(lambda: {entry["stat"] for entry in aiosd.agents()} == {"S"})
    aiosd.run("aios-kill", "-KILL", "agent", "child", check=True)
    assert job.wait(30) == 137


def test_a_stop_from_outside_aiosd_is_noticed(aiosd: System) -> None:
    aiosd.run("aios-run", "-d", "--name", "sleeper", "--", "sleep", "1000", check=True)
    (entry,) = aiosd.agents()
    os.kill(entry["ospid"], signal.SIGSTOP)
    assert eventually(lambda: aiosd.agents()[0]["stat"] == "T")
    os.kill(entry["ospid"], signal.SIGCONT)
    assert eventually(lambda: aiosd.agents()[0]["stat"] == "S")
    aiosd.run("aios-kill", "sleeper", check=True)


def test_all_processes_of_an_agent_die_with_it(aiosd: System, agent: Write) -> None:
    """Also detached ones, in sessions of their own, that ignore TERM."""
    script = agent("""
        code = "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'%d\\\\n' % os.getpid())"
        code += "; signal.pause()"
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv(sys.executable, [sys.executable, "-c", code])
                os._exit(0)
        os.write(1, b"done\\n")
        sys.stdin.readline()
    """)
    job = aiosd.popen("aios-run", script)
    assert job.stdout is not None
    assert job.stdin is not None
    lines = [job.stdout.readline().strip() for _ in range(4)]
    pids = [int(line) for line in lines if line != "done"]
    assert len(pids) == 3
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.wait(30) == 0
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


# ── nice ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_may_only_raise_its_nice_value_and_children_inherit_it(aiosd: System, agent: Write) -> None:
    agent("print(aios.proc.nice(), flush=True)", "child.py")
    script = agent("""
        print(aios.proc.nice(3), flush=True)
        for act in (lambda: aios.proc.nice(-1), lambda: aios.proc.spawn("child.py", nice=2)):
            try: act()
            except PermissionError: print("denied", flush=True)
        aios.proc.wait(aios.proc.spawn("child.py"))
    """)
    assert run(aiosd, script, cwd=script.parent) == "3\ndenied\ndenied\n3\n"


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_carry_objects_and_the_true_sender(aiosd: System, agent: Write) -> None:
    agent("sender, obj = aios.msg.recv(); aios.msg.send(sender, [obj, aios.proc.getpid()])", "echo.py")
    script = agent("""
        me = aios.proc.getpid()
        aios.msg.send(me, {"to": "myself"})
        assert aios.msg.recv() == (me, {"to": "myself"})
        pid = aios.proc.spawn("echo.py")
        for obj in (None, True, 2**40, 1.5, "ü", b"\\x00", [1, [2]], {"a": {"b": None}}):
            aios.msg.send(me, obj)
            assert aios.msg.recv()[1] == obj
        aios.msg.send(pid, "hello")
        assert aios.msg.recv(timeout=30) == (pid, ["hello", pid])
        print("ok")
    """)
    assert run(aiosd, script, cwd=script.parent) == "ok\n"


def test_messages_keep_their_order(aiosd: System, agent: Write) -> None:
    script = agent("""
        me = aios.proc.getpid()
        for n in range(500): aios.msg.send(me, n)
        assert [aios.msg.recv()[1] for _ in range(500)] == list(range(500))
        print("ok")
    """)
    assert run(aiosd, script) == "ok\n"


def test_a_full_mailbox_refuses_and_loses_nothing(aiosd: System, agent: Write) -> None:
    script = agent("""
        me, sent = aios.proc.getpid(), 0
        try:
            while True: aios.msg.send(me, sent); sent += 1
        except BlockingIOError as err: print(err.strerror)
        assert [aios.msg.recv()[1] for _ in range(sent)] == list(range(sent))
        aios.msg.send(me, "room again")
    """)
    assert "mailbox is full (1000 messages)" in run(aiosd, script)


def test_a_message_that_fits_into_no_mailbox_is_not_to_be_tried_again(aiosd: System, agent: Write) -> None:
    script = agent("""
        import errno
        try: aios.msg.send(aios.proc.getpid(), b"x" * 5_000_000)
        except OSError as err: print(errno.errorcode[err.errno], err.strerror)
    """)
    assert run(aiosd, script).startswith("EMSGSIZE a message of 500")


def test_errors_of_messages(aiosd: System, agent: Write) -> None:
    script = agent("""
        for act in (lambda: aios.msg.send(999999, 1), lambda: aios.msg.send(aios.proc.getpid(), object()),
                    lambda: aios.msg.recv(timeout=0.01)):
            try: act()
            except Exception as err: print(type(err).__name__)
    """)
    assert run(aiosd, script) == "ProcessLookupError\nTypeError\nTimeoutError\n"


# ── budgets ───────────────────────────────────────────────────────────────────────────────────────────────


def test_time_budget(aiosd: System) -> None:
    done = aiosd.run("aios-run", "--time", "0.2", "--", "sleep", "1000")
    assert done.returncode == 124
    assert "time budget of 0.2 s used up" in done.stderr


def test_time_budget_ends_descendants_too(aiosd: System, agent: Write) -> None:
    script = agent("aios.proc.spawn('sleep', '1000'); aios.msg.recv()")
    assert aiosd.run("aios-run", "--time", "0.5", script).returncode == 124
    assert eventually(lambda: aiosd.agents() == [])


def test_memory_budget(aiosd: System, agent: Write) -> None:
    script = agent("block = b'x' * (300 << 20); aios.msg.recv()")
    done = aiosd.run("aios-run", "--memory", "100M", script)
    assert done.returncode == 124
    assert "memory budget" in done.stderr


def test_token_budget_cuts_the_call_and_refuses_the_next(aiosd: System, agent: Write) -> None:
    script = agent("""
        r = aios.llm.complete("Once upon a time", max_tokens=500, ignore_eos=True)
        print(r.finish_reason, r.usage.prompt_tokens - r.usage.cached_tokens + r.usage.completion_tokens)
        for call in (lambda: aios.llm.complete("more", max_tokens=1), lambda: aios.llm.embed(["more"])):
            try: call()
            except OSError as err: print(err.strerror)
    """)
    done = aiosd.run("aios-run", "--tokens", "60", script)
    assert done.returncode == 124
    assert done.stdout == "limit 60\n" + 2 * "token budget of 60 used up\n"
    assert "token budget of 60 used up" in done.stderr


def test_children_share_the_budget_of_their_parent(aiosd: System, agent: Write) -> None:
    agent("print(aios.llm.complete('x', max_tokens=500, ignore_eos=True).finish_reason, flush=True)", "child.py")
    script = agent("aios.proc.wait(aios.proc.spawn('child.py'))")
    done = aiosd.run("aios-run", "--tokens", "40", script, cwd=script.parent)
    assert done.stdout == "limit\n"
    assert done.returncode == 124


def test_the_charge_equals_the_generated_tokens(aiosd: System, agent: Write) -> None:
    script = agent("""
        total = [aios.llm.complete(f"Text {n}", max_tokens=10 + n, ignore_eos=True).usage for n in range(3)]
        mine = next(p for p in aios.proc.ps() if p.pid == aios.proc.getpid())
        assert mine.completion_tokens == sum(u.completion_tokens for u in total) == 33, (mine, total)
        assert mine.prompt_tokens == sum(u.prompt_tokens for u in total)
        assert mine.cached_tokens == sum(u.cached_tokens for u in total)
        assert mine.ctx_tokens == 0
        print("ok")
    """)
    assert run(aiosd, script) == "ok\n"


# ── programs ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_program_finds_its_channel_in_its_environment(aiosd: System) -> None:
    script = (
        "import os; m, b, o = map(int, os.environ['AIOS_CHANNEL'].split(':'))\n"
        "os.fstat(m); os.fstat(b); print(o == os.getpid())"
    )
    assert aiosd.run("aios-run", "--", "python", "-c", script, check=True).stdout == "True\n"


def test_an_agent_that_executes_another_program_stays_connected(aiosd: System, agent: Write) -> None:
    script = agent("""
        if len(sys.argv) == 1:
            pid = aios.proc.getpid()
            os.execv(sys.executable, [sys.executable, __file__, str(pid)])
        print(aios.proc.getpid() == int(sys.argv[1]))
    """)
    assert run(aiosd, script) == "True\n"


def test_a_forked_child_has_no_connection_and_its_commands_have(aiosd: System, agent: Write) -> None:
    script = agent("""
        import subprocess
        pid = aios.proc.getpid()
        if os.fork() == 0:
            try: aios.proc.getpid()
            except OSError as err: print(err.strerror, flush=True)
            os._exit(0)
        os.wait()
        code = "import libaios as aios; print(aios.proc.getpid())"
        assert int(subprocess.check_output([sys.executable, "-c", code])) == pid
    """)
    assert "forked" in run(aiosd, script)


def test_inspect_shows_how_an_agent_ended(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--time", "0.1", "--", "sleep", "1000", check=True).stdout.strip()
    assert aiosd.run("aios-wait", pid).returncode == 124
    (found,) = json.loads(aiosd.run("aios-inspect", pid, check=True).stdout)
    assert found["budget"] == "time"
    assert "time budget" in found["reason"]
    assert found["state"] == "reaped"
