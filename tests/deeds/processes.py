"""Inspect, signal or slow down other processes of the same user."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from tests.deeds.table import Stage, call, deed

_PTRACE, _READV, _WRITEV, _GETFD, _KCMP, _PERF, _TGKILL = 101, 310, 311, 438, 312, 298, 234
_SETATTR, _MOVE_PAGES, _MADVISE, _IOPRIO, _SETNS = 314, 279, 440, 251, 308


def _proc(stage: Stage, name: str) -> str:
    return f"/proc/{stage['victim']}/{name}"


@deed
def read_environment(stage: Stage) -> object:
    return open(_proc(stage, "environ")).read()


@deed
def read_memory(stage: Stage) -> object:
    return open(_proc(stage, "mem"), "rb").close()


@deed
def read_memory_map(stage: Stage) -> object:
    return open(_proc(stage, "maps")).read()


@deed
def enter_its_folder(stage: Stage) -> object:
    return os.listdir(_proc(stage, "cwd"))


@deed
def enter_its_root(stage: Stage) -> object:
    return os.listdir(_proc(stage, "root") + stage["hidden"])


@deed
def open_its_descriptor(stage: Stage) -> object:
    return open(_proc(stage, "fd/0")).close()


@deed
def enter_its_namespace(stage: Stage) -> object:
    return os.open(_proc(stage, "ns/mnt"), os.O_RDONLY)


@deed
def trace(stage: Stage) -> object:
    call(_PTRACE, 16, stage["victim"], 0, 0)
    os.waitpid(stage["victim"], 0x40000000)
    return call(_PTRACE, 17, stage["victim"], 0, 0)


@deed
def read_its_memory(stage: Stage) -> object:
    return call(_READV, stage["victim"], 0, 0, 0, 0, 0)


@deed
def write_its_memory(stage: Stage) -> object:
    return call(_WRITEV, stage["victim"], 0, 0, 0, 0, 0)


@deed
def take_its_descriptor(stage: Stage) -> object:
    return call(_GETFD, os.pidfd_open(stage["victim"]), 0, 0)


@deed
def compare_with_it(stage: Stage) -> object:
    return call(_KCMP, os.getpid(), stage["victim"], 1, 0, 0)


@deed
def signal_it(stage: Stage) -> object:
    return os.kill(stage["victim"], signal.SIGCONT)


@deed
def signal_its_thread(stage: Stage) -> object:
    return call(_TGKILL, stage["victim"], stage["victim"], int(signal.SIGCONT))


@deed
def signal_by_descriptor(stage: Stage) -> object:
    return signal.pidfd_send_signal(os.pidfd_open(stage["victim"]), signal.SIGCONT)


@deed
def probe_it(stage: Stage) -> object:
    return os.kill(stage["victim"], 0)


@deed
def signal_aiosd(stage: Stage) -> object:
    return os.kill(stage["supervisor"], signal.SIGCONT)


@deed
def limit_it(stage: Stage) -> object:
    limits = resource.prlimit(stage["victim"], resource.RLIMIT_CPU)
    return resource.prlimit(stage["victim"], resource.RLIMIT_CPU, limits)


@deed
def slow_it_down(stage: Stage) -> object:
    return os.setpriority(os.PRIO_PROCESS, stage["victim"], 1)


@deed
def slow_all_of_the_user(stage: Stage) -> object:
    """PRIO_USER with 0 means all processes of the caller's user."""
    return os.setpriority(os.PRIO_USER, 0, os.getpriority(os.PRIO_USER, 0))


@deed
def move_to_one_processor(stage: Stage) -> object:
    return os.sched_setaffinity(stage["victim"], os.sched_getaffinity(stage["victim"]))


@deed
def schedule_it(stage: Stage) -> object:
    return os.sched_setscheduler(stage["victim"], os.SCHED_BATCH, os.sched_param(0))


@deed
def make_its_disk_access_idle(stage: Stage) -> object:
    return call(_IOPRIO, 1, stage["victim"], 0x4000)


@deed
def count_its_instructions(stage: Stage) -> object:
    attr = ctypes.create_string_buffer(128)
    attr[0], attr[4] = b"\x01", b"\x80"
    return call(_PERF, attr, stage["victim"], -1, -1, 0)


@deed
def move_its_pages(stage: Stage) -> object:
    return call(_MOVE_PAGES, stage["victim"], 0, 0, 0, 0, 0)


@deed
def join_its_namespace(stage: Stage) -> object:
    return call(_SETNS, os.pidfd_open(stage["victim"]), 0x04000000)  # UTS


@deed
def real_time(stage: Stage) -> object:
    return os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


# ── what flat permits ─────────────────────────────────────────────────────────────────────────────────────


@deed
def see_its_command_line(stage: Stage) -> object:
    return open(_proc(stage, "cmdline")).read()


@deed
def see_its_status(stage: Stage) -> object:
    return open(_proc(stage, "status")).read()
