"""Interfaces of Linux: namespaces, mounts, modules, objects shared by name, calls that might pass the filter."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import subprocess
import time

from tests.deeds.table import Stage, call, deed, prctl

NEW_USER = 0x10000000


@deed
def mount_bind(stage: Stage) -> object:
    call(165, stage["hidden"].encode(), stage["mount_point"].encode(), None, 4096, 0)
    return call(166, stage["mount_point"].encode(), 0)


@deed
def mount_new(stage: Stage) -> object:
    return call(430, b"tmpfs", 0)


@deed
def mount_tree(stage: Stage) -> object:
    return call(428, -100, b"/", 0)


@deed
def change_root(stage: Stage) -> object:
    return os.chroot(stage["hidden"])


@deed
def unshare_user(stage: Stage) -> object:
    return call(272, NEW_USER)


@deed
def unshare_mounts(stage: Stage) -> object:
    return call(272, 0x00020000)


@deed
def clone_user(stage: Stage) -> object:
    pid = call(56, NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@deed
def clone_three(stage: Stage) -> object:
    args = ctypes.create_string_buffer(NEW_USER.to_bytes(8, "little") + bytes(24) + b"\x11" + bytes(55), 88)
    pid = call(435, args, 88)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@deed
def become_another_user(stage: Stage) -> object:
    return os.setuid(65534)


@deed
def become_another_group(stage: Stage) -> object:
    return os.setgroups([])


@deed
def gain_by_program(stage: Stage) -> object:
    """Execute a program that gets capabilities."""
    text = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    found = int(next(line for line in text.splitlines() if line.startswith("CapEff")).split()[1], 16)
    if not found:
        raise PermissionError(1, "no capability")
    return found


@deed
def new_privileges(stage: Stage) -> object:
    """Check that a set-uid program would get its rights."""
    if prctl(39):
        raise PermissionError(1, "no_new_privs")
    return 0


@deed
def set_host_name(stage: Stage) -> object:
    return socket.sethostname(socket.gethostname())


@deed
def set_clock(stage: Stage) -> object:
    return time.clock_settime(time.CLOCK_REALTIME, time.time())


@deed
def read_kernel_log(stage: Stage) -> object:
    return call(103, 10, 0, 0)


@deed
def io_uring(stage: Stage) -> object:
    return os.close(call(425, 1, ctypes.create_string_buffer(120)))


@deed
def page_faults(stage: Stage) -> object:
    return os.close(call(323, 1))


@deed
def page_faults_by_flag(stage: Stage) -> object:
    return os.close(call(323, 0))


@deed
def programs_in_the_kernel(stage: Stage) -> object:
    attr = ctypes.create_string_buffer(b"\x02\0\0\0\x04\0\0\0\x04\0\0\0\x01\0\0\0", 72)
    return os.close(call(321, 0, attr, 72))


@deed
def keys(stage: Stage) -> object:
    return call(250, 0, -3, 1)


@deed
def join_keys(stage: Stage) -> object:
    return call(250, 1, 0)


@deed
def load_module(stage: Stage) -> object:
    try:
        return call(313, -1, b"", 0)
    except OSError as err:
        if err.errno != 9:  # EBADF: the call was permitted
            raise
        return None


@deed
def reboot_keys(stage: Stage) -> object:
    """Disable Ctrl-Alt-Del, the least harmful command of `reboot`."""
    try:
        return call(169, 0xFEE1DEAD, 672274793, 0, 0)
    except OSError as err:
        if err.errno != 22:
            raise
        return None


@deed
def personality(stage: Stage) -> object:
    return call(135, 0x0040000)


@deed
def local_descriptor_table(stage: Stage) -> object:
    return call(154, 0, ctypes.create_string_buffer(64), 64)


@deed
def input_and_output(stage: Stage) -> object:
    return call(172, 0)


@deed
def splice_user_memory(stage: Stage) -> object:
    _, writing = os.pipe()
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    return call(278, writing, vector, 1, 0)


@deed
def shared_memory_by_number(stage: Stage) -> object:
    number = call(29, 0, 4096, 0o1600)
    return call(31, number, 0, 0)


@deed
def semaphores_by_number(stage: Stage) -> object:
    number = call(64, 0, 1, 0o1600)
    return call(66, number, 0, 0, 0)


@deed
def messages_by_number(stage: Stage) -> object:
    number = call(68, 0, 0o1600)
    return call(71, number, 0, 0)


@deed
def message_queue(stage: Stage) -> object:
    name = stage["tag"].encode()
    fd = call(240, name, os.O_CREAT | os.O_RDWR, 0o600, 0)
    call(241, name)
    return os.close(fd)


@deed
def quota(stage: Stage) -> object:
    try:
        return call(179, 0x80000100, None, 0, 0)
    except OSError as err:
        if err.errno in (1, 38):
            raise
        return None


@deed
def accounting(stage: Stage) -> object:
    return call(163, None)


@deed
def secret_memory(stage: Stage) -> object:
    return os.close(call(447, 0))


@deed
def handle_of_file(stage: Stage) -> object:
    handle = ctypes.create_string_buffer(b"\x80\0\0\0", 136)
    return call(303, -100, b"/etc/passwd", handle, ctypes.byref(ctypes.c_int()), 0)


@deed
def future_call(stage: Stage) -> object:
    """Make a call that no Linux has. It gives ENOSYS outside, too; the filter must reject it in the same way."""
    if not stage["inside"]:
        return None
    return call(500)


@deed
def call_of_another_abi(stage: Stage) -> object:
    if not stage["inside"]:
        return None
    return call(0x40000000 | 39)


@deed
def call_of_32_bits(stage: Stage) -> object:
    """Call getpid by `int 0x80`, whose numbers differ from those of 64 bits that the filter compares."""
    code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    return function()


@deed
def allow_tracing_by_all(stage: Stage) -> object:
    """Permit any process to trace this one, which would let it act with this one's rights."""
    return call(101, 0, 0, 0, 0)
