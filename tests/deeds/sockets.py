"""Sockets to other programs of the user, to this machine, and to the network."""

from __future__ import annotations

import fcntl
import os
import socket

from tests.deeds.table import Stage, call, deed

FAST_OPEN = 0x20000000


@deed
def unix_by_path(stage: Stage) -> object:
    return socket.socket(socket.AF_UNIX).connect(stage["unix"])


@deed
def unix_datagram(stage: Stage) -> object:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", stage["unix_datagram"])


@deed
def unix_datagram_by_pair(stage: Stage) -> object:
    """Make a datagram pair, of which an end can send to any address."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", stage["unix_datagram"])


@deed
def unix_by_pair(stage: Stage) -> object:
    """Send by one end of a pair. (Outside a plain socket is used, because a pair is connected already.)"""
    kind = socket.SOCK_STREAM
    sock = socket.socketpair(socket.AF_UNIX, kind)[0] if stage["inside"] else socket.socket(socket.AF_UNIX, kind)
    return sock.connect(stage["unix"])


@deed
def unix_abstract(stage: Stage) -> object:
    return socket.socket(socket.AF_UNIX).connect("\0" + stage["abstract"])


@deed
def unix_abstract_after_shutdown(stage: Stage) -> object:
    sock = socket.socket(socket.AF_UNIX)
    if stage["inside"]:
        sock.shutdown(socket.SHUT_RDWR)
    return sock.connect("\0" + stage["abstract"])


@deed
def unix_listen(stage: Stage) -> object:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("listening")
    os.unlink("listening")
    return sock.listen()


@deed
def tcp_local(stage: Stage) -> object:
    return socket.create_connection(("127.0.0.1", stage["tcp"]), 5).close()


@deed
def tcp_fast_open(stage: Stage) -> object:
    return socket.socket().sendto(b"x", FAST_OPEN, ("127.0.0.1", stage["tcp"]))


@deed
def multipath_tcp(stage: Stage) -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).connect(("127.0.0.1", stage["tcp"]))


@deed
def tcp_listen(stage: Stage) -> object:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock.listen()


@deed
def tcp_listen_unbound(stage: Stage) -> object:
    return socket.socket().listen()


@deed
def udp(stage: Stage) -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", stage["udp"]))


@deed
def udp_six(stage: Stage) -> object:
    return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


@deed
def raw(stage: Stage) -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)


@deed
def packets(stage: Stage) -> object:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


@deed
def routes(stage: Stage) -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


@deed
def audit(stage: Stage) -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)


@deed
def crypto(stage: Stage) -> object:
    return socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)


@deed
def machines(stage: Stage) -> object:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


@deed
def socket_of_32_bits(stage: Stage) -> object:
    """Set the upper half of an int argument, which Linux ignores, so that the filter must ignore it, too."""
    return os.close(call(41, (1 << 32) | socket.AF_INET, socket.SOCK_STREAM, 0))


@deed
def type_into_terminal(stage: Stage) -> object:
    return fcntl.ioctl(stage["own_terminal"] if not stage["inside"] else 0, 0x5412, b"x")


@deed
def door_as_person(stage: Stage) -> object:
    """Use more rights over aiosd's control socket than an agent has."""
    from libaios import wire  # after the fork: it belongs to the process that connects
    from libaios.client import Client

    with Client() as client:
        return client.call(wire.Sys.SET, wire.Set("log_level", "info"), list[str])
