"""Finds the process at the other end of a TCP connection on this machine.

A Unix socket has its peer's pid, a TCP socket does not. But Linux reports the number (inode) of the socket at the other
end, by NETLINK_SOCK_DIAG, and lists each process's sockets by inode in /proc. So the gateway can show that a connection
belongs to an agent or one of its descendants: one of these processes has the socket. In the same way it can show that a
connection comes from outside: a process of aiosd's own user has the socket, and no process of the system has it.

Only a socket that is connected to ours is the other end. If that one is closed already, Linux may report another
socket: one that listens at its port, or one that begins to connect from there. It may belong to anybody.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from aiosd import procfs

MOST_DESCRIPTORS = 100_000  # descriptors read in /proc for one connection at most
LOOKS = 3  # how often the process tree is read if it changes meanwhile

_NETLINK_SOCK_DIAG = 4  # Python has no name for it
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_PORTS = struct.Struct(">HH")
_INTERFACE = struct.Struct("=III")  # interface, and a cookie: any
_ANY_COOKIE = (0, 0xFFFFFFFF, 0xFFFFFFFF)
_UID_AT = 16 + 64  # in the answer, after its header: the last but one field of inet_diag_msg; the last is the inode
_STATE_AT, _PORTS_AT = 16 + 1, 16 + 4
_CONNECTED = (1, 4, 5)  # TCP_ESTABLISHED, and TCP_FIN_WAIT1 and 2: it sends no more, but still reads


class SocketAddress(NamedTuple):
    host: str
    port: int


class Socket(NamedTuple):
    inode: int  # 0: there is none
    uid: int


def other_end(theirs: SocketAddress, ours: SocketAddress) -> Socket:
    """The socket that is connected from `theirs` to `ours`."""
    family = socket.AF_INET6 if ":" in theirs.host else socket.AF_INET
    addresses = (socket.inet_pton(family, host).ljust(16, b"\0") for host in (theirs.host, ours.host))
    ident = _PORTS.pack(theirs.port, ours.port) + b"".join(addresses) + _INTERFACE.pack(*_ANY_COOKIE)
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ident
    frame = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.sendto(frame, (0, 0))
        answer = netlink.recv(4096)
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR or answer[_STATE_AT] not in _CONNECTED:
        return Socket(0, 0)
    if _PORTS.unpack_from(answer, _PORTS_AT) != (theirs.port, ours.port):
        return Socket(0, 0)
    uid, inode = struct.unpack_from("=II", answer, _UID_AT)
    return Socket(inode, uid)


def holder(theirs: SocketAddress, ours: SocketAddress) -> int:
    """A process that has the other end of this connection; 0: none was found."""
    inode = other_end(theirs, ours).inode
    if not inode:
        return 0
    wanted = f"socket:[{inode}]"
    return next((pid for pid in reversed(_processes()) if _has(pid, wanted, MOST_DESCRIPTORS)[0]), 0)


def belongs(theirs: SocketAddress, ours: SocketAddress, ospid: int) -> bool:
    """Whether the process of this number, or one that descends from it, has the other end of this connection."""
    inode = other_end(theirs, ours).inode
    if not inode:
        return False
    wanted, left = f"socket:[{inode}]", MOST_DESCRIPTORS
    for _ in range(LOOKS):
        for pid in (ospid, *procfs.descendants(ospid)):
            found, looked = _has(pid, wanted, left)
            left -= looked
            if found or left <= 0:
                return found
    return False


def is_outside(theirs: SocketAddress, ours: SocketAddress, supervisor: int) -> bool:
    """Whether a process of aiosd's own user (or root) has the other end of this connection, and no process below the
    supervisor has it. A process whose descriptors cannot be read counts as one that does not have it."""
    inode, uid = other_end(theirs, ours)
    if not inode or uid not in (os.getuid(), 0):
        return False
    wanted = f"socket:[{inode}]"
    holders = [pid for pid in _processes() if _has(pid, wanted, MOST_DESCRIPTORS)[0]]
    return bool(holders) and all(procfs.descends(pid, supervisor) is False for pid in holders)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _has(pid: int, wanted: str, most: int) -> tuple[bool, int]:
    """Whether the process has this socket open, and how many of its descriptors were read."""
    looked = 0
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                looked += 1
                try:
                    if os.readlink(entry.path) == wanted:
                        return True, looked
                except OSError:  # closed meanwhile
                    continue
                if looked >= most:
                    break
    except OSError:  # it has ended
        pass
    return False, looked
