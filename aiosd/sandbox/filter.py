"""The seccomp program: the system calls that a confined agent can make.

Landlock guards files. This closes everything that is no file: other processes, the kernel's own interfaces, sockets. A
call is

    refused      with EPERM; with ENOSYS if programs then use another way
    inspected    when it depends on an argument: `clone` of a new thread is allowed, of a new namespace it is not
    allowed      all other calls that this list knows; calls of later Linux versions (larger numbers) get ENOSYS

Only the low half of an int argument is compared, because Linux ignores the other half. Numbers are searched as in a
sorted array, by ranges: a program that compares one after the other takes many times as long to install.

Only for x86-64: other processors number their calls differently.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

MACHINE = "x86_64"
_ARCH = 0xC000003E
_LAST = 469  # the largest number that is known here

_KILL, _ERRNO, _ASK, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_LOAD, _IF_EQUAL, _IF_GREATER, _IF_AT_LEAST, _IF_ANY, _AND, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
_JUMP = 0x05
_NUMBER_AT, _ARCH_AT, _ARGS_AT = 0, 4, 16

EPERM, ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
EAFNOSUPPORT, EOPNOTSUPP = _ERRNO | errno.EAFNOSUPPORT, _ERRNO | errno.EOPNOTSUPP

#: Programs that get ENOSYS for these use another way. No filter sees io_uring's operations; clone3 has its flags in
#: memory.
_MISSING = {
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435,
    "memfd_secret": 447,
}  # fmt: skip

_DENIED = {
    # other processes
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438,
    "process_madvise": 440, "process_mrelease": 448, "perf_event_open": 298, "move_pages": 279, "migrate_pages": 256,
    # mounts and namespaces
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "move_mount": 429, "open_tree": 428, "open_tree_attr": 467, "mount_setattr": 442, "unshare": 272,
    "setns": 308,
    # access to files without their paths
    "open_by_handle_at": 304, "name_to_handle_at": 303, "fanotify_init": 300, "fanotify_mark": 301, "quotactl": 179,
    "quotactl_fd": 443, "acct": 163, "swapon": 167, "swapoff": 168, "file_setattr": 469,
    # the machine
    "reboot": 169, "sethostname": 170, "setdomainname": 171, "kexec_load": 246, "kexec_file_load": 320,
    "init_module": 175, "finit_module": 313, "delete_module": 176, "settimeofday": 164, "clock_settime": 227,
    "clock_adjtime": 305, "adjtimex": 159, "iopl": 172, "ioperm": 173, "syslog": 103, "vhangup": 153,
    # the kernel's own interfaces, and rarely used calls
    "bpf": 321, "add_key": 248, "request_key": 249, "keyctl": 250, "lookup_dcookie": 212, "modify_ldt": 154,
    "uselib": 134, "ustat": 136, "sysfs": 139, "personality": 135, "vmsplice": 278, "lsm_set_self_attr": 460,
    # memory and messages that are shared by name
    "shmget": 29, "shmat": 30, "shmctl": 31, "shmdt": 67, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220,
    "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241, "mq_timedsend": 242,
    "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245,
}  # fmt: skip

_CLONE, _IOCTL, _SOCKET, _SOCKETPAIR, _PRLIMIT, _SETPRIORITY, _IOPRIO_SET = 56, 16, 41, 53, 302, 141, 251
_SCHEDULING = {"sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314}
_MKNOD, _MKNODAT = 133, 259

_NAMESPACES = 0x7E020000  # all CLONE_NEW… flags of clone
_IOCTLS = (
    0x5412,  # TIOCSTI: types into a terminal
    0x541C,  # TIOCLINUX
    0x5423,  # TIOCSETD
    0x40086602, 0x40046602,  # FS_IOC_SETFLAGS: chattr
    0x401C5820,  # FS_IOC_FSSETXATTR
)  # fmt: skip
_FILE_TYPES = (0, 0x1000, 0x8000, 0xC000)  # of mknod: none (a file), FIFO, file, socket; no device
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DATAGRAM, _PACKETS = 1, 2, 5
_TCP, _UDP = 6, 17
_TYPE_MASK = 0xF

Instruction = tuple[int, int, int, int]  # code, jumps if true and if false, operand
_ALL = 1 << 32


def known_here() -> bool:
    return platform.machine() == MACHINE


def program(network: bool, doors: bool) -> bytes:
    """The program for an agent with or without a network. `doors`: a new Unix socket becomes a request to a listener
    (see `doors`), without a network one of the internet, too; without it these are refused."""
    head = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, _ARCH),
        _return(_KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_GREATER, 0, 1, _LAST),  # includes all of x32, whose numbers begin at 2 to the 30th
        _return(ENOSYS),
    ]
    return b"".join(struct.pack("=HBBI", *one) for one in [*head, *_search(actions(network, doors))])


def actions(network: bool, doors: bool) -> dict[int, list[Instruction]]:
    """What happens to each call that is not simply allowed: a block of instructions."""
    door = _ASK if doors else EAFNOSUPPORT
    looked_into = {
        _CLONE: _mask(0, _NAMESPACES, EPERM),
        _IOCTL: _one_of(1, _IOCTLS, then=EPERM, other=_ALLOW),
        _SOCKET: _socket(door, _ALLOW if network else door, _ALLOW if network else EAFNOSUPPORT),
        _SOCKETPAIR: _socketpair(),
        _PRLIMIT: _own_or_reading(),
        _SETPRIORITY: _own_priority(2),
        _IOPRIO_SET: _own_priority(3),
        _MKNOD: _file_type(1),
        _MKNODAT: _file_type(2),
        **dict.fromkeys(_SCHEDULING.values(), _one_of(0, (0,), then=_ALLOW, other=EPERM)),
        _SCHEDULING["sched_setscheduler"]: _own_scheduling(),
    }
    found: dict[int, list[Instruction]] = {number: [_return(EPERM)] for number in _DENIED.values()}
    found |= {number: [_return(ENOSYS)] for number in _MISSING.values()}
    return found | looked_into


# ── blocks: each ends in a return on every way ────────────────────────────────────────────────────────────


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _argument(number: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGS_AT + 8 * number)


def _mask(argument: int, bits: int, action: int) -> list[Instruction]:
    return [_argument(argument), (_IF_ANY, 0, 1, bits), _return(action), _return(_ALLOW)]


def _one_of(argument: int, values: Iterable[int], then: int, other: int) -> list[Instruction]:
    tests = list(values)
    block = [_argument(argument)]
    for position, value in enumerate(tests):
        block.append((_IF_EQUAL, len(tests) - position, 0, value))
    return [*block, _return(other), _return(then)]


def _file_type(argument: int) -> list[Instruction]:
    loaded, *rest = _one_of(argument, _FILE_TYPES, then=_ALLOW, other=EPERM)
    return [loaded, (_AND, 0, 0, 0xF000), *rest]


def _own_priority(user: int) -> list[Instruction]:
    """Priority of the caller or its own group: number 0. The first argument `user` stands for all processes of a
    user."""
    return [
        _argument(0),
        (_IF_EQUAL, 2, 0, user),
        _argument(1),
        (_IF_EQUAL, 1, 0, 0),
        _return(EPERM),
        _return(_ALLOW),
    ]


def _own_scheduling() -> list[Instruction]:
    """Scheduling of the caller: number 0. C libraries name threads by numbers, which cannot be distinguished from
    those of processes here. libzmq (Jupyter) ends the program if it may not set the ordinary policy for its own
    threads, which they already have: that call is answered with success, and nothing is done."""
    return [
        _argument(0),
        (_IF_EQUAL, 4, 0, 0),
        _argument(1),
        (_IF_EQUAL, 1, 0, 0),
        _return(EPERM),
        _return(_ERRNO),
        _return(_ALLOW),
    ]


def _own_or_reading() -> list[Instruction]:
    """prlimit64 of the caller, or without new limits: pid 0, or a null pointer (both halves)."""
    pointer = _ARGS_AT + 8 * 2
    return [
        _argument(0),
        (_IF_EQUAL, 4, 0, 0),
        (_LOAD, 0, 0, pointer),
        (_IF_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, pointer + 4),
        (_IF_EQUAL, 0, 1, 0),
        _return(_ALLOW),
        _return(EPERM),
    ]


def _socketpair() -> list[Instruction]:
    """Pairs of Unix sockets. Not for datagrams: such a socket can send to any other one by its path."""
    return [
        _argument(0),
        (_IF_EQUAL, 0, 4, _UNIX),
        _argument(1),
        (_AND, 0, 0, _TYPE_MASK),
        (_IF_EQUAL, 2, 0, _STREAM),
        (_IF_EQUAL, 1, 0, _PACKETS),
        _return(EPERM),
        _return(_ALLOW),
    ]


def _socket(unix: int, internet: int, routes: int) -> list[Instruction]:
    """The actions for a Unix socket of streams, for TCP and UDP, and for netlink queries about routes."""
    block = _if_family(_UNIX, _kind(_STREAM, (0,), unix))
    streams_and_datagrams = [*_kind(_STREAM, (0, _TCP), internet)[:-1], *_kind(_DATAGRAM, (0, _UDP), internet)]
    for family in (_INET, _INET6):
        block += _if_family(family, streams_and_datagrams)
    block += _if_family(_NETLINK, _one_of(2, (0,), then=routes, other=EAFNOSUPPORT))
    return [*block, _return(EAFNOSUPPORT)]


def _if_family(family: int, block: list[Instruction]) -> list[Instruction]:
    return [_argument(0), (_IF_EQUAL, 0, len(block), family), *block]


def _kind(kind: int, protocols: tuple[int, ...], action: int) -> list[Instruction]:
    """A type of socket with one of these protocols. The last instruction decides about all other types."""
    inside = _one_of(2, protocols, then=action, other=EAFNOSUPPORT)
    return [
        _argument(1),
        (_AND, 0, 0, _TYPE_MASK),
        (_IF_EQUAL, 0, len(inside), kind),
        *inside,
        _return(EAFNOSUPPORT),
    ]


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────


_FARTHEST = 255  # instructions that a conditional jump can skip


class _Tail:
    """The end of a program, written from its last instruction to its first: what a jump leads to is there already, and
    the same block is there once for all jumps that reach it. Places are counted from the end."""

    def __init__(self) -> None:
        self._backwards: list[Instruction] = []
        self._places: dict[tuple[Instruction, ...], int] = {}

    def instructions(self) -> list[Instruction]:
        return self._backwards[::-1]

    def block(self, block: tuple[Instruction, ...]) -> int:
        """The place of a block that ends in a return on every way."""
        place = self._places.get(block)
        if place is None or len(self._backwards) - place > _FARTHEST - 2:  # room for the test, and one more block
            self._backwards += block[::-1]
            place = self._places[block] = len(self._backwards)
        return place

    def test(self, number: int, at_least: int, less: int) -> int:
        """The place of a test that leads to one of two places."""
        if len(self._backwards) - less > _FARTHEST:
            less = self._jump(less)
        if len(self._backwards) - at_least > _FARTHEST:
            at_least = self._jump(at_least)
        here = len(self._backwards)
        self._backwards.append((_IF_AT_LEAST, here - at_least, here - less, number))
        return here + 1

    def _jump(self, place: int) -> int:
        self._backwards.append((_JUMP, 0, 0, len(self._backwards) - place))
        return len(self._backwards)


def _search(actions: dict[int, list[Instruction]]) -> list[Instruction]:
    """A search tree over the ranges of numbers with the same action; the accumulator holds the number of the call.
    Linux translates the program for every agent anew, which takes as long as it has instructions: so each is there as
    seldom as possible."""
    tail = _Tail()
    _tree(tail, _ranges(actions))
    return tail.instructions()


def _ranges(actions: dict[int, list[Instruction]]) -> list[tuple[int, tuple[Instruction, ...]]]:
    """The first number of each range, and its block; from one to the next the block changes."""
    found: list[tuple[int, tuple[Instruction, ...]]] = []
    for number in range(_LAST + 1):
        block = tuple(actions.get(number, (_return(_ALLOW),)))
        if not found or found[-1][1] != block:
            found.append((number, block))
    return found


def _tree(tail: _Tail, ranges: list[tuple[int, tuple[Instruction, ...]]]) -> int:
    """Returns the place where the tree begins."""
    if len(ranges) == 1:
        return tail.block(ranges[0][1])
    middle = len(ranges) // 2
    high = _tree(tail, ranges[middle:])
    low = _tree(tail, ranges[:middle])
    return tail.test(ranges[middle][0], high, low)
