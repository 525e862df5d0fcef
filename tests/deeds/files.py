"""Read hidden files, and change files of others."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct

from tests.deeds.table import Stage, call, deed

_OPEN_BY_HANDLE, _NAME_TO_HANDLE, _FANOTIFY_INIT = 304, 303, 300


@deed
def read_hidden(stage: Stage) -> object:
    return open(stage["secret"]).read()


@deed
def list_hidden(stage: Stage) -> object:
    return os.listdir(stage["hidden"])


@deed
def read_shadow(stage: Stage) -> object:
    return open("/etc/shadow").read()


@deed
def read_home(stage: Stage) -> object:
    return os.listdir(stage["home"])


@deed
def read_others_workspace(stage: Stage) -> object:
    return open(stage["workspace_of_another"]).read()


@deed
def read_aiosd_data(stage: Stage) -> object:
    return os.listdir(stage["data"] + "/logs")


@deed
def create_outside(stage: Stage) -> object:
    return os.close(os.open(stage["hidden"] + "/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL))


@deed
def append_outside(stage: Stage) -> object:
    return os.close(os.open(stage["victim_file"], os.O_WRONLY | os.O_APPEND))


@deed
def truncate_outside(stage: Stage) -> object:
    return os.truncate(stage["victim_file"], 1)


@deed
def remove_outside(stage: Stage) -> object:
    return os.unlink(stage["removable"])


@deed
def make_folder_outside(stage: Stage) -> object:
    return os.mkdir(stage["hidden"] + "/folder")


@deed
def make_fifo_outside(stage: Stage) -> object:
    return os.mkfifo(stage["hidden"] + "/fifo")


@deed
def make_link_outside(stage: Stage) -> object:
    return os.symlink("x", stage["hidden"] + "/link")


@deed
def change_what_is_readable(stage: Stage) -> object:
    return os.close(os.open(stage["readable"], os.O_WRONLY))


@deed
def truncate_what_is_readable(stage: Stage) -> object:
    return os.truncate(stage["readable"], 0)


@deed
def read_through_symbolic_link(stage: Stage) -> object:
    with contextlib.suppress(FileExistsError):
        os.symlink(stage["secret"], "a-link")
    return open("a-link").read()


@deed
def read_through_hard_link(stage: Stage) -> object:
    os.link(stage["secret"], stage["beside"])
    return open(stage["beside"]).read()


@deed
def move_in(stage: Stage) -> object:
    os.rename(stage["movable"], stage["beside"] + "-moved")
    return open(stage["beside"] + "-moved").read()


@deed
def move_out(stage: Stage) -> object:
    path = stage["beside"] + "-mine"
    open(path, "w").close()
    return os.rename(path, stage["hidden"] + "/mine")


@deed
def open_by_path_descriptor(stage: Stage) -> object:
    fd = os.open(stage["secret"], os.O_PATH)
    return open(f"/proc/self/fd/{fd}").read()


@deed
def read_relative_to_folder(stage: Stage) -> object:
    os.chdir(stage["hidden"])
    return open("secret.txt").read()


@deed
def read_through_proc_root(stage: Stage) -> object:
    return open("/proc/self/root" + stage["secret"]).read()


@deed
def read_inherited_descriptor(stage: Stage) -> object:
    """Read a descriptor that the process that started the agent had open."""
    return os.pread(stage["inherited"], 10, 0)


@deed
def open_by_handle(stage: Stage) -> object:
    handle = bytearray(struct.pack("=Ii", 128, 0) + bytes(128))
    buffer = (ctypes.c_char * len(handle)).from_buffer(handle)
    mount = ctypes.c_int()
    call(_NAME_TO_HANDLE, -100, stage["secret"].encode(), buffer, ctypes.byref(mount), 0)
    folder = os.open("/", os.O_RDONLY)
    return call(_OPEN_BY_HANDLE, folder, buffer, 0)


@deed
def watch_all_files(stage: Stage) -> object:
    return call(_FANOTIFY_INIT, 0, 0)


@deed
def write_shared_memory_folder(stage: Stage) -> object:
    path = "/dev/shm/" + stage["tag"]
    open(path, "w").close()
    return os.unlink(path)


@deed
def write_common_tmp(stage: Stage) -> object:
    path = "/tmp/" + stage["tag"]
    open(path, "w").close()
    return os.unlink(path)


@deed
def open_others_terminal(stage: Stage) -> object:
    return os.open(stage["terminal"], os.O_RDWR | os.O_NOCTTY)


@deed
def open_new_terminals(stage: Stage) -> object:
    return os.openpty()


@deed
def make_device(stage: Stage) -> object:
    return os.mknod("a-device", 0o600 | 0x2000, os.makedev(1, 3))


@deed
def write_kernel_setting(stage: Stage) -> object:
    path = "/proc/sys/kernel/domainname"
    with open(path, "r+") as file:
        text = file.read()
        file.seek(0)
        return file.write(text)


@deed
def lower_own_oom_score(stage: Stage) -> object:
    with open("/proc/self/oom_score_adj", "w") as file:
        return file.write("-500")


@deed
def make_immutable(stage: Stage) -> object:
    fd = os.open(stage["readable"], os.O_RDONLY)
    flags = bytearray(8)
    fcntl.ioctl(fd, 0x80086601, flags)
    return fcntl.ioctl(fd, 0x40086602, flags)


@deed
def give_away(stage: Stage) -> object:
    return os.chown(stage["victim_file"], 65534, 65534)


@deed
def run_hidden_program(stage: Stage) -> object:
    return os.execv(stage["program"], ["program"])


# ── what flat permits: names and attributes of files, not their content ───────────────────────────────────


@deed
def see_that_it_is_there(stage: Stage) -> object:
    return os.stat(stage["secret"])


@deed
def change_mode_of_hidden(stage: Stage) -> object:
    return os.chmod(stage["victim_file"], 0o600)


@deed
def change_times_of_hidden(stage: Stage) -> object:
    return os.utime(stage["victim_file"])


@deed
def tag_hidden(stage: Stage) -> object:
    return os.setxattr(stage["victim_file"], "user.aios", b"x")


@deed
def watch_hidden(stage: Stage) -> object:
    return call(254, call(294, 0), stage["secret"].encode(), 0x20)
