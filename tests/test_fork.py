"""The state of `threading` and `logging` in a forked child, where their repairs are left out (`birth/fork.py`).

It is tested in a process of its own with one thread, like the supervisor.
"""

import subprocess
import sys

import pytest

COMMON = """
import contextlib, logging, os, threading
from aiosd.birth.fork import fork, fork_again
logging.basicConfig()
handler = logging.root.handlers[0]
hooks = threading._after_fork, logging._after_at_fork_child_reinit_locks
codes = [hook.__code__ for hook in hooks]

def exit_code(ospid):
    return os.waitstatus_to_exitcode(os.waitpid(ospid, 0)[1])

def free_for_others():
    found = []
    def take():
        for lock in (logging._lock, handler.lock):
            found.append(lock.acquire(timeout=10))
            lock.release()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found == [True, True]

@contextlib.contextmanager
def lock_held_by_a_thread():
    held, done = threading.Event(), threading.Event()
    def hold():
        with handler.lock:
            held.set()
            done.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    yield
    done.set()
    thread.join()
"""

CHILD = """
assert exit_code(fork(lambda: 0 if free_for_others() else 1)) == 0, "a lock is held in the child"
assert exit_code(fork(lambda: exit_code(fork_again(lambda: 0 if free_for_others() else 1)))) == 0, "in its child"
assert free_for_others(), "in the parent"
"""

OWN_FORKS = """
def with_held_locks():
    assert [hook.__code__ for hook in hooks] == codes
    with lock_held_by_a_thread():
        child = os.fork()
        if child == 0:
            os._exit(0 if free_for_others() and threading.active_count() == 1 else 1)
    return exit_code(child)

assert exit_code(fork(with_held_locks)) == 0
assert [hook.__code__ for hook in hooks] == codes
"""

BESIDE_A_THREAD = """
with lock_held_by_a_thread():
    assert exit_code(fork(lambda: 0 if free_for_others() else 1)) == 0
"""


@pytest.mark.parametrize("script", [CHILD, OWN_FORKS, BESIDE_A_THREAD], ids=["child", "own forks", "beside a thread"])
def test_no_lock_is_held_in_a_child(script: str) -> None:
    argv = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + script]  # of forks beside threads
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
