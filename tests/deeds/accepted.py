"""Deeds that a level of the sandbox permits, and why. It must prevent all others."""

from __future__ import annotations

import os

NAMES = "Landlock does not hide names, sizes and times"
OWN = "modes and times of the user's own files: programs such as git, tar and pip must change those of theirs"
PROC = "/proc shows which processes there are"
PRIVATE = "it has one of its own, in its own memory, which no other process sees"
AMOUNT = "what it may use of this is a matter of its budget, not of its sandbox"
USERS = "Linux counts processes by user: an agent with too many is ended by the kernel, which takes samples"
ROOT = "Linux limits no processes of uid 0: an agent with too many is ended by the kernel, which takes samples"
NET = "the agent was given a network"
ALONE = "it has a network of its own, in which no other process is, and no route leads out"

ACCEPTED: dict[str, dict[str, str]] = {
    "flat": {
        "see_that_it_is_there": NAMES,
        "watch_hidden": NAMES,
        "change_mode_of_hidden": OWN,
        "change_times_of_hidden": OWN,
        "tag_hidden": OWN,
        "see_its_command_line": PROC,
        "see_its_status": PROC,
        "fork_bomb": USERS,
        "fill_own_folder": AMOUNT,
        "memory_without_map": AMOUNT,
    },
    "cage": {
        "see_its_command_line": PROC,
        "see_its_status": PROC,
        "write_common_tmp": PRIVATE,
        "write_shared_memory_folder": PRIVATE,
        "open_new_terminals": PRIVATE,
        "fill_own_folder": AMOUNT,
        "memory_without_map": AMOUNT,
        **({"fork_bomb": ROOT} if os.getuid() == 0 else {}),
    },
}
#: In addition with `--net all`.
WITH_NETWORK = dict.fromkeys(("tcp_local", "tcp_fast_open", "tcp_listen", "tcp_listen_unbound", "udp", "udp_six"), NET)
WITH_NETWORK |= dict.fromkeys(("routes", "socket_of_32_bits"), NET)
#: In addition with `--net HOST`.
WITH_HOSTS = dict.fromkeys(("tcp_listen", "tcp_listen_unbound", "udp", "udp_six", "routes", "socket_of_32_bits"), ALONE)
