#!/usr/bin/env python
"""Hostile bytes: agents and clients that send invalid data, beside honest agents that time their calls.

    $ python benchmarks/fuzz.py --frames 2000000 --seed 1
    frames                       tried     ended their sender
    real traffic, mutated      801,234                    211
    …

A real aiosd with the embedded model. *Neighbours* call getpid steadily and time each call. Beside them work, in turns
(A B B A), a group (*crew*) of honest agents (A) and one of as many offenders (B). Most of a crew are *players*: they
copy batches of frames into their ring, many frames for one doorbell, a batch every --pace seconds (0: as fast as the
kernel takes them). The frames of players are:

    honest      frames as the SDK makes them, recorded from it
    mutated     the same with bits flipped, fields swapped, ends cut off, slices doubled, two frames spliced
    structured  valid framing and msgpack, but wrong types, huge and negative numbers, deep nesting, unknown calls, or
                pids of others
    reused      ids that are in use, cancelled, or were used shortly before
    epochs      frames of earlier epochs, and of epochs that have not begun

A frame that is no request ends its sender, so a player sends such a frame only as its last. Others of the crew are
*actors*: they write random bytes, false lengths and counters, a frame of 1 GB, a frame without end or an invalid
header, flood the doorbell, never read replies, close their ends, resize the segment, or die inside a frame. Honest
agents in their place start and end as often. The control socket gets garbage, incomplete messages and many clients that
send nothing, on side A as many honest clients. Each agent that ends is replaced. All frames are made in advance, from
the seed.

A frame counts when the kernel's counter has passed it, or when it ended its sender. Kernel deaths are read from
`aiosd status --json`, the reasons of ends from aios-inspect. Results go to benchmarks/results/fuzz.json. Exit status 1:
the kernel died, the books do not balance, an honest agent was harmed, or a segment could be resized.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import mmap
import os
import random
import re
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import RESULTS, Aiosd, cpu_name, model_path, write  # noqa: E402
from libaios import wire  # noqa: E402
from libaios.wire import Sys  # noqa: E402

FIRST, LAST = 1 << 31, 1 << 30
RING = 1 << 16  # bytes of an agent's ring of submissions
BATCH = RING // 16  # bytes copied into the ring at a time
KINDS = ["honest", "mutated", "structured", "reused", "epochs", "random", "acts", "control"]
ERRNOS = 32  # index of the players' first counter of errnos; before it are the counters of frames by kind
COUNTERS = ERRNOS + 256
PLAYS = ["mutated", "structured", "reused", "epochs"]
PHASE_S = 5.0
SETTLE_S = 1.0  # at the beginning of a phase, not measured
LIFE_S = 2.0  # how long a player lives
TURN_S = 0.4  # least time between two agents of a place: honest actors must not start more often than offenders
PATIENCE_S = 60.0

encode = msgspec.msgpack.encode


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────


def recorded() -> list[tuple[int, bytes]]:
    """Requests as the SDK sends them: (number of the call, frame). The id is 0; `with_id` replaces it."""
    import libaios as aios
    from libaios.plan import plan_of

    spec = wire.Spawn(kind="exec", target="/nonexistent", detached=True)
    plans = [(Sys.GETPID, wire.NoArgs())] * 12 + [(Sys.GETPPID, wire.NoArgs())] * 4
    for function, args in (
        (aios.proc.ps, ()),
        (aios.proc.nice, (0,)),
        (aios.proc.wait, (7,)),
        (aios.msg.send, (1 << 40, {"text": "hello", "list": [1, 2.5, None, b"x"]})),
        (aios.msg.recv, (0.0,)),
        (aios.llm.tokenize, ("Once upon a time",)),
        (aios.llm.detokenize, ([5, 6, 7],)),
        (aios.llm.models, ()),
    ):
        plan = plan_of(function)(*args)
        plans.append((plan.sys, plan.args))
    plans += [
        (Sys.KILL, wire.Kill(1 << 40, 0)),
        (Sys.INSPECT, wire.PidArgs(1 << 40)),
        (Sys.WAIT, wire.Wait(0, False)),
        (Sys.CANCEL, wire.Cancel(3)),
        (Sys.MEM_GET, wire.MemGet(1)),
        (Sys.CTX_LIST, wire.ListContexts()),
    ]
    rare = [
        (Sys.SPAWN, spec),
        (Sys.GENERATE, wire.Generate(prompt="Once", sampling=wire.Sampling(max_tokens=1))),
        (Sys.GENERATE, wire.Generate(messages=[{"role": "user", "content": "hi"}], sampling=wire.Sampling(1))),
        (Sys.STATUS, wire.Status()),
        (Sys.PS, wire.Ps(pids=[1, 2, 3])),
    ]
    frames = [(int(sys), encode([0, sys, args])) for sys, args in plans]
    return frames * 40 + [(int(sys), encode([0, sys, args])) for sys, args in rare]


def with_id(frame: bytes, number: int) -> bytes:
    """A recorded frame with another id."""
    return frame[:1] + encode(number) + frame[2:]


def is_request(frame: bytes) -> bool:
    try:
        wire.decode_request(frame)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def acts_for_the_user(frame: bytes) -> bool:
    """Whether a client of the user may do harm by this call by design: stop the system, change it, signal agents."""
    try:
        return wire.decode_request(frame).sys in (Sys.SHUTDOWN, Sys.SET, Sys.SPAWN, Sys.KILL, Sys.NICE, Sys.CTX_REMOVE)
    except (msgspec.MsgspecError, RecursionError):
        return False


class Maker:
    """Makes frames of each kind from one seed."""

    def __init__(self, seed: int | str) -> None:
        self.chance = random.Random(seed)
        self.traffic = recorded()
        self.numbers = 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def honest(self) -> bytes:
        return with_id(self.chance.choice(self.traffic)[1], self.number())

    def mutated(self) -> bytes:
        chance, frame = self.chance, bytearray(self.honest())
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            how, at = chance.randrange(6), chance.randrange(len(frame) or 1)
            if how == 0 and frame:
                frame[at] ^= 1 << chance.randrange(8)
            elif how == 1 and frame:
                other = chance.randrange(len(frame))
                frame[at], frame[other] = frame[other], frame[at]
            elif how == 2:
                del frame[at:]
            elif how == 3:
                frame[at:at] = frame[at : at + chance.randrange(40)]
            elif how == 4:
                frame += chance.randbytes(chance.randrange(1, 30))
            else:
                other_frame = self.honest()
                frame[at:] = other_frame[chance.randrange(len(other_frame)) :]
        return bytes(frame)

    def structured(self) -> bytes:
        chance = self.chance
        number = chance.choice([self.number(), self.number(), 0, (1 << 63) - 1, chance.randrange(1 << 62)])
        sys, frame = chance.choice(self.traffic)
        known = msgspec.msgpack.decode(frame)[2]
        if chance.random() < 0.3:
            sys = chance.choice([*Sys, *Sys, 0, 9, 255, (1 << 63) - 1])
            if sys in (Sys.SPAWN, Sys.GENERATE) and chance.random() < 0.95:
                sys = Sys.GETPID
        if chance.random() < 0.05:
            depth = chance.choice([10, 100, 390, 800])
            return encode([number, sys]).replace(b"\x92", b"\x93", 1) + b"\x91" * depth + b"\xc0"
        args = known
        if not known or chance.random() < 0.3:
            args = [self.junk(2) for _ in range(chance.randrange(4))]
        else:
            args[chance.randrange(len(args))] = self.junk(3)
        return encode([number, sys, args])

    def junk(self, depth: int) -> Any:
        chance = self.chance
        how = chance.randrange(12 if depth else 9)
        if how < 3:
            return chance.choice(
                [0, 1, -1, 2, 5, 300, 1 << 31, -(1 << 31), 1 << 53, (1 << 63) - 1, -(1 << 63), 1 << 63]
            )
        if how == 3:
            return chance.choice([0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 5e-324])
        if how == 4:
            return chance.choice([None, True, False])
        if how == 5:
            return chance.choice(["", "x", "\0", "exec", "../..", "\u202e", "default", "x" * 5000, "nano"])
        if how == 6:
            return chance.randbytes(chance.randrange(20))
        if how == 7:
            return msgspec.Raw(
                chance.choice([b"\xa2\xff\xfe", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"])
            )
        if how == 8:
            return msgspec.msgpack.Ext(chance.randrange(-128, 128), chance.randbytes(3))
        if how == 9:
            return {chance.choice(["a", "role", 1, None]): self.junk(depth - 1) for _ in range(chance.randrange(3))}
        return [self.junk(depth - 1) for _ in range(chance.randrange(5))]

    def reused(self) -> bytes:
        chance = self.chance
        number = chance.randrange(1, 30)
        what = chance.randrange(4)
        if what == 0:
            return encode([number, Sys.RECV, [None]])
        if what == 1:
            return encode([self.number() + 100, Sys.CANCEL, [number]])
        if what == 2:
            return encode([number, Sys.WAIT, [0]])
        return with_id(chance.choice(self.traffic)[1], number)

    def batches(self, kind: str, count: int) -> list[tuple[int, int, bytes]]:
        """(kind, number of frames, bytes as they lie in the ring): `count` frames that end no sender, and then one that
        does, if this kind makes such frames."""
        make = {"honest": self.honest, "reused": self.reused, "epochs": self.honest}.get(kind) or getattr(self, kind)
        made: list[tuple[int, int, bytes]] = []
        bits, size, frames, fatal = [], 0, 0, b""
        left = count
        while left:
            frame = make()
            if not is_request(frame):
                fatal = fatal or frame
                continue
            left -= 1
            epoch = self.chance.choice([0, 0, 0, 1, 1 << 31, (1 << 32) - 1]) if kind == "epochs" else 1
            bits.append(fragment(frame, epoch))
            size, frames = size + len(bits[-1]), frames + 1
            if size >= BATCH or not left:
                made.append((KINDS.index(kind), frames, b"".join(bits)))
                bits, size, frames = [], 0, 0
        if fatal:
            made.append((KINDS.index(kind), 1, fragment(fatal, 1)))
        return made


def fragment(payload: bytes, epoch: int = 1, flags: int = FIRST | LAST) -> bytes:
    """A payload as it lies in a ring: with its header, padded to 8 bytes."""
    return struct.pack("=II", len(payload) | flags, epoch) + payload + bytes(-len(payload) % 8)


def save(batches: list[tuple[int, int, bytes]], path: Path) -> None:
    """Write batches for the players. One that ends its sender is marked with kind | 128."""
    with open(path, "wb") as file:
        for kind, frames, blob in batches:
            last = frames == 1 and not is_request(blob[8 : 8 + (struct.unpack_from("=I", blob)[0] & (LAST - 1))])
            file.write(struct.pack("=III", kind | (128 if last else 0), frames, len(blob)) + blob)


# ── inside agents ─────────────────────────────────────────────────────────────────────────────────────────

#: Calls getpid steadily; appends (begin, duration) in seconds, and the number of wrong answers so far.
NEIGHBOUR = """
import struct, sys, time
import libaios as aios
me, wrong = aios.proc.getpid(), 0
with open(sys.argv[1], "ab", buffering=0) as out:
    while True:
        begun = time.monotonic()
        wrong += aios.proc.getpid() != me
        took = time.monotonic() - begun
        out.write(struct.pack("=ddq", begun, took, wrong))
        time.sleep(float(sys.argv[2]))
"""

#: Works on the raw channel (its layout: the top of libaios/ring.py), because the SDK would prevent invalid writes.
PLAYER = r"""
import array, fcntl, mmap, os, random, select, socket, struct, sys, time
from _thread import allocate_lock
from collections import deque
from libaios import wire
from libaios.agent import own_channel

SUB, SUB_READ, KERNEL_SLEEPS, SUB_WAITS = 24, 32, 40, 48
COMP, COMP_READ, AGENT_SLEEPS = 56, 64, 72
FIRST, LAST = 1 << 31, 1 << 30
memfd, bell = own_channel()
held = mmap.mmap(memfd, os.fstat(memfd).st_size)
memory = memoryview(held)
items = memory.cast("Q")
size, comp_size = items[2], items[3]
data, replies = memory[4096:4096 + size], memory[4096 + size:]
with open(sys.argv[1], "r+b") as file:
    counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
written, taken = items[SUB], items[COMP_READ]
under_way = deque()
epoch = items[8]


def ring():
    allocate_lock().acquire()
    if items[KERNEL_SLEEPS]:
        items[KERNEL_SLEEPS] = 0
        try:
            os.write(bell, b"\0")
        except BlockingIOError:
            pass


def put(blob):
    global written
    at = written & (size - 1)
    room = size - at
    if len(blob) <= room:
        data[at:at + len(blob)] = blob
    else:
        data[at:size] = blob[:room]
        data[:len(blob) - room] = blob[room:]
    written += len(blob)
    items[SUB] = written
    ring()


def account():
    done = items[SUB_READ]
    while under_way and under_way[0][0] <= done:
        _, kind, frames = under_way.popleft()
        counts[kind] += frames


def read_replies():
    global taken
    end = items[COMP]
    while taken < end:
        at = taken & (comp_size - 1)
        head = int.from_bytes(replies[at:at + 4], "little")
        length = head & (LAST - 1)
        if head & FIRST:
            at = (at + 8) & (comp_size - 1)
            start = bytes(replies[at:at + 24])
            if len(start) < 24:
                start += bytes(replies[:24 - len(start)])
            number = errno_of(start)
            if number is not None:
                counts[32 + min(number, 255)] += 1
        taken += (8 + length + 7) & ~7
    items[COMP_READ] = taken
    if items[80]:
        items[80] = 0
        try:
            os.write(bell, b"\0")
        except BlockingIOError:
            pass


WIDTH = {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}


def errno_of(start):
    # [id, errno, more, offset, body]
    at = 1 + WIDTH.get(start[1], 1)
    value = start[at]
    return value if value < 128 else start[at + 1] if value == 0xCC else None


def wait(most):
    try:
        while os.read(bell, 4096):
            pass
        os._exit(0)
    except BlockingIOError:
        pass
    items[AGENT_SLEEPS] = items[SUB_WAITS] = 1
    allocate_lock().acquire()
    if items[COMP] == taken and size - (written - items[SUB_READ]) < size // 2:
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        poll.poll(most * 1000)


def rest(seconds, reads):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if reads:
            read_replies()
        account()
        wait(max(0.0, until - time.monotonic()))


def play(path, seconds, reads=True, pace=0.0):
    with open(path, "rb") as file:
        corpus = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    batches, at, last = [], 0, None
    while at < len(corpus):
        kind, frames, length = struct.unpack_from("=III", corpus, at)
        batch = (kind & 127, frames, at + 12, at + 12 + length)
        if kind & 128:
            last = batch
        else:
            batches.append(batch)
        at += 12 + length
    random.shuffle(batches)
    until = time.monotonic() + seconds
    now = 0
    while time.monotonic() < until:
        kind, frames, begin, end = batches[now % len(batches)]
        now += 1
        while size - (written - items[SUB_READ]) < end - begin:
            account()
            if reads:
                read_replies()
            wait(0.05)
            if time.monotonic() > until:
                break
        else:
            put(corpus[begin:end])
            under_way.append((written, kind, frames))
            rest(pace, reads)
    settle(2.0, reads)
    if last is not None and reads:
        put(corpus[last[2]:last[3]])
        time.sleep(20)  # the kernel ends this process before that


def settle(most, reads=True):
    until = time.monotonic() + most
    while under_way and time.monotonic() < until:
        if reads:
            read_replies()
        account()
        wait(0.02)


def request(number, call, *args):
    import msgspec
    payload = msgspec.msgpack.encode([number, call, list(args)])
    return struct.pack("=II", len(payload) | FIRST | LAST, epoch) + payload + bytes(-len(payload) % 8)


def head(word, extra=b""):
    put(struct.pack("=II", word & 0xFFFFFFFF, epoch) + extra)


# what actors do; each ends by itself or is ended

def act_random(rng):
    payload = rng.randbytes(rng.randrange(300))
    put(struct.pack("=II", len(payload) | FIRST | LAST, epoch) + payload + bytes(-len(payload) % 8))

def act_heads(rng):
    put(rng.randbytes(8 * rng.randrange(1, 500)))

def act_giant(rng):
    head((LAST - 1) | FIRST | (LAST if rng.random() < 0.5 else 0), bytes(64))

def act_endless(rng):
    piece = size // 2 - 8
    for number in range(wire.MAX_FRAME // piece + 3):
        while size - (written - items[SUB_READ]) < piece + 8:
            wait(0.05)
        head(piece | (0 if number else FIRST), rng.randbytes(64) + bytes(piece - 64))

def act_half(rng):
    head((size // 2 - 8) | FIRST, bytes(size // 2 - 8))
    settle(1.0)
    os._exit(0)

def act_torn(rng):
    data[written & (size - 1):(written & (size - 1)) + 8] = struct.pack("=II", 400 | FIRST | LAST, epoch)
    os._exit(0)  # before the counter

def act_crumbs(rng):
    for _ in range(50):
        head(8, bytes(8))

def act_counter(rng):
    lies = [0, 1, size + 8, written + 4, (1 << 64) - 8, 1 << 62, written + 2 * size, rng.getrandbits(64)]
    items[SUB] = rng.choice(lies)
    os.write(bell, b"\0")

def act_reader(rng):
    items[COMP_READ] = rng.choice([8, 4, (1 << 64) - 8, 1 << 62, rng.getrandbits(64)])
    for number in range(100):
        put(request(number, 1))

def act_header(rng):
    memory[:4096] = rng.randbytes(4096)
    os.write(bell, b"\0")

def act_everything(rng):
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        at = rng.randrange(len(memory) - 64)
        memory[at:at + 64] = rng.randbytes(64)
        try:
            os.write(bell, b"\0")
        except BlockingIOError:
            pass

def act_flood(rng):
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        try:
            os.write(bell, bytes(4096))
        except BlockingIOError:
            select.select([], [bell], [], 0.01)

def act_rights(rng):
    with socket.socket(fileno=os.dup(bell)) as sock:
        for _ in range(20):
            try:
                sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [bell] * 50))])
            except OSError:
                break

def act_hang_up(rng):
    put(request(1, 17, 5.0) + request(2, 1))
    socket.socket(fileno=os.dup(bell)).shutdown(rng.choice([socket.SHUT_RDWR, socket.SHUT_WR, socket.SHUT_RD]))
    os.close(bell)
    time.sleep(0.2)

def act_memfd(rng):
    for attempt in (
        lambda: os.ftruncate(memfd, 0),
        lambda: os.ftruncate(memfd, 1 << 24),
        lambda: os.posix_fallocate(memfd, 0, 1 << 24),
        lambda: fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 8),
        lambda: os.truncate("/proc/self/fd/%d" % memfd, 4096),
    ):
        try:
            attempt()
        except OSError:
            continue
        print("the segment could be changed")
        sys.exit(3)
    other = os.memfd_create("other")
    os.ftruncate(other, 4096)
    os.dup2(other, memfd)
    put(request(1, 1))

def act_mute(rng):
    play(sys.argv[4], 1.0, reads=False)

def act_fork(rng):
    for _ in range(3):
        if os.fork() == 0:
            for number in range(200):
                put(request(number, 1))
            os._exit(0)
    for number in range(200):
        put(request(number, 1))
    for _ in range(3):
        os.wait()

def act_honest(rng):
    play(sys.argv[4], 0.1, pace=0.01)


what = sys.argv[2]
if what == "play":
    play(sys.argv[4], float(sys.argv[3]), pace=float(sys.argv[5]))
else:
    globals()["act_" + what](random.Random(sys.argv[3]))
    time.sleep(0.1)
"""

ACTS = re.findall(r"^def act_(\w+)", PLAYER, re.MULTILINE)
ACTS.remove("honest")
ONE_FRAME = {"random", "heads", "giant", "endless", "half", "crumbs", "counter", "reader", "header"}


# ── a crew ────────────────────────────────────────────────────────────────────────────────────────────────


class Crew:
    """Agents in a fixed number of places; each is replaced when it has ended."""

    def __init__(self, fuzz: Fuzz, honest: bool) -> None:
        self.fuzz, self.honest = fuzz, honest
        self.on = True
        self.chance = random.Random(f"{fuzz.options.seed} {fuzz.phases}")
        slots = [self.play] * fuzz.options.players + [self.act] * fuzz.options.actors + [self.clients]
        self.threads = [threading.Thread(target=self._slot, args=(n, do)) for n, do in enumerate(slots)]
        for thread in self.threads:
            thread.start()

    def _slot(self, number: int, do: Callable[[int], None]) -> None:
        try:
            while self.on:
                begun = time.monotonic()
                do(number)
                time.sleep(max(0.0, TURN_S - (time.monotonic() - begun)))
        except Exception as err:  # an error in a thread would be lost
            self.fuzz.harmed.append(f"slot {number}: {err!r}")

    def end(self) -> None:
        self.on = False
        for thread in self.threads:
            thread.join()

    def play(self, slot: int) -> None:
        kind = "honest" if self.honest else self.chance.choice(PLAYS)
        corpus = self.chance.choice(self.fuzz.corpora[kind])
        reason = self.fuzz.run(slot, kind, "play", str(LIFE_S), str(corpus), str(self.fuzz.options.pace))
        if "EPROTO" in reason:
            self.fuzz.add(kind, 1)

    def act(self, slot: int) -> None:
        act = "honest" if self.honest else self.chance.choice(ACTS)
        kind = "honest" if act in ("honest", "mute") else "structured"
        corpus = self.chance.choice(self.fuzz.corpora[kind])
        reason = self.fuzz.run(slot, act, act, str(self.chance.getrandbits(48)), str(corpus))
        if "EPROTO" in reason or act in ONE_FRAME:
            self.fuzz.add("random" if act == "random" else "acts", 1)

    # the control socket

    def clients(self, slot: int) -> None:
        """Connect many clients and keep them for a second; meanwhile others connect one after the other."""
        crowd: list[socket.socket] = []
        try:
            for _ in range(self.fuzz.options.clients):
                if not self.on:
                    break
                with contextlib.suppress(OSError):
                    crowd.append(self.client())
            end = time.monotonic() + 1.0
            while self.on and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    self.client().close()
                time.sleep(0.005)
        finally:
            for sock in crowd:
                sock.close()

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5.0)
        try:
            sock.connect(str(self.fuzz.system.home / "aiosd.sock"))
            hello = framed(encode([wire.VERSION, 0, ""]))
            ask = framed(encode([1, Sys.GETPID, []]))
            if self.honest:
                sock.sendall(hello + ask)
                sock.recv(1 << 12)
                return sock
            chance, maker = self.chance, self.fuzz.maker
            wild = [frame for frame in (maker.mutated(), maker.structured()) if not acts_for_the_user(frame)]
            message = chance.choice(
                [
                    b"",
                    chance.randbytes(chance.randrange(200)),
                    hello[: chance.randrange(len(hello))],
                    hello + ask[: chance.randrange(len(ask))],
                    hello + hello,
                    hello + b"".join(map(framed, wild)) * 3,
                    hello + struct.pack("<I", 1 << 30) + bytes(100),
                    struct.pack("<I", 12 << 20) + bytes(100),
                    framed(b"\x93\x01\x00\xa2\xff\xfe"),
                    framed(b"\x91" * 900),
                    framed(encode([99, 0, ""])),
                    framed(encode([wire.VERSION, 1 << 62, "x" * 5000])),
                ]
            )
            sock.sendall(message)
        except OSError:
            sock.close()
            raise
        self.fuzz.add("control", 1)
        return sock


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


class Fuzz:
    def __init__(self, options: argparse.Namespace, system: Aiosd, folder: Path) -> None:
        from libaios.client import Client
        from libaios.home import Home

        self.options, self.system, self.folder = options, system, folder
        self.client = Client(Home(system.home))
        self.maker = Maker(f"{options.seed} clients")
        self.phases = 0
        self.harmed: list[str] = []
        self.ends: Counter[str] = Counter()  # by reason
        self.ended_by: Counter[str] = Counter()  # by what the agent did
        self.players: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.own: Counter[str] = Counter()  # frames that no player counts
        self.player = folder / "player.py"
        self.player.write_text(PLAYER)
        self.slots: dict[int, memoryview] = {}
        self.corpora = self.make_corpora()
        self.samples: dict[str, list[float]] = {"honest": [], "hostile": []}
        self.medians: dict[str, list[float]] = {"honest": [], "hostile": []}

    def make_corpora(self) -> dict[str, list[Path]]:
        made: dict[str, list[Path]] = {}
        for kind in ("honest", *PLAYS):
            made[kind] = []
            for number in range(self.options.corpora):
                path = self.folder / f"{kind}-{number}"
                save(Maker(f"{self.options.seed} {kind} {number}").batches(kind, 4000), path)
                made[kind].append(path)
        return made

    # agents

    def counters(self, slot: int) -> Path:
        path = self.folder / f"counts-{slot}"
        if slot not in self.slots:
            path.write_bytes(bytes(8 * COUNTERS))
            with open(path, "r+b") as file:
                self.slots[slot] = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        return path

    def add(self, kind: str, frames: int) -> None:
        with self.lock:
            self.own[kind] += frames

    def spawn(self, script: Path, name: str, *args: str) -> int:
        spec = wire.Spawn(
            kind="file",
            target=str(script),
            args=list(args),
            env={"PYTHONPATH": str(ROOT), "AIOS_HOME": str(self.system.home)},
            cwd=str(self.folder),
            name=name,
            detached=True,
        )
        pid: int = self.client.call(Sys.SPAWN, spec, wire.Spawned, timeout=PATIENCE_S).pid
        return pid

    def run(self, slot: int, kind: str, *args: str) -> str:
        """Run a player until its end; returns the reason of its end as aios-inspect shows it."""
        from libaios.connection import decode_body  # noqa: F401  # load the SDK before threads use it

        pid = self.spawn(self.player, kind.replace("_", "-"), str(self.counters(slot)), *args)
        try:
            ended = self.client.call(Sys.WAIT, wire.Wait(pid, True, 30.0), wire.Waited, timeout=PATIENCE_S)
        except TimeoutError:  # for example, it has stopped itself
            self.client.call(Sys.KILL, wire.Kill(pid, 9, 5.0), None, timeout=PATIENCE_S)
            ended = self.client.call(Sys.WAIT, wire.Wait(pid), wire.Waited, timeout=PATIENCE_S)
        shown = self.client.call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=PATIENCE_S)
        reason = str(shown["reason"])
        with self.lock:
            self.players[kind] += 1
            if reason:
                self.ends[re.sub(r"\d+", "N", reason.partition(" - at")[0])] += 1
                self.ended_by[kind] += 1
            if kind == "honest" and (reason or ended.status):
                self.harmed.append(f"an honest agent ended with {ended.status}: {reason} {self.log(pid)}")
            if ended.status == 3:
                self.harmed.append("a segment could be resized")
            if ended.status == 1:
                self.harmed.append(f"{args}: {self.log(pid)}")
        return reason

    def log(self, pid: int) -> str:
        with contextlib.suppress(OSError):
            path = next(self.system.home.rglob(f"{pid}.log"))
            return path.read_text(errors="replace")[-600:]
        return ""

    # phases

    def frames(self) -> Counter[str]:
        found = Counter(self.own)
        for counts in self.slots.values():
            for number, kind in enumerate(KINDS):
                found[kind] += counts[number]
        return found

    def hostile(self) -> int:
        return sum(count for kind, count in self.frames().items() if kind != "honest")

    def phase(self, side: str, neighbours: list[Path]) -> None:
        self.phases += 1
        begun = time.monotonic()
        crew = Crew(self, side == "honest")
        time.sleep(self.options.phase)
        over = time.monotonic()
        crew.end()
        took = [dt for path in neighbours for at, dt, _ in samples(path) if begun + SETTLE_S < at and at + dt < over]
        if took:
            self.samples[side] += took
            self.medians[side].append(statistics.median(took))

    def storm(self) -> None:
        script = self.folder / "neighbour.py"
        script.write_text(NEIGHBOUR)
        paths = [self.folder / f"neighbour-{number}" for number in range(self.options.neighbours)]
        pids = [self.spawn(script, "neighbour", str(path), "0.002") for path in paths]
        sides: Iterator[str] = iter(())
        while self.hostile() < self.options.frames:
            if self.system.daemon.poll() is not None:
                raise SystemExit(f"aiosd ended:\n{self.system.log.read_text(errors='replace')[-3000:]}")
            side = next(sides, "")
            if not side:
                sides = iter(["hostile", "hostile", "honest"])
                side = "honest"
            self.phase(side, paths)
            if sys.stderr.isatty():
                print(f"\r{self.hostile():,} frames", end="", file=sys.stderr, flush=True)
        for side in sides:  # complete the last A B B A
            self.phase(side, paths)
        for pid in pids:
            self.client.call(Sys.KILL, wire.Kill(pid, 15, 10.0), None, timeout=PATIENCE_S)
            shown = self.client.call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=PATIENCE_S)
            if shown["signal"] != 15:
                self.harmed.append(f"a neighbour ended before its time: {shown['exit']} {shown['reason']}")
        if any(wrong for path in paths for _, _, wrong in samples(path)):
            self.harmed.append("a neighbour got a wrong answer")

    def errnos(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for counts in self.slots.values():
            for number in range(256):
                name = errno.errorcode.get(number, str(number)) if number else "a result"
                found[name] += counts[ERRNOS + number]
        return {name: count for name, count in found.most_common() if count}


def samples(path: Path) -> list[tuple[float, float, int]]:
    data = path.read_bytes()
    return list(struct.iter_unpack("=ddq", data[: len(data) // 24 * 24]))


def another_uid(system: Aiosd) -> str:
    """What the control socket answers to a process of another user that may connect to it."""
    if os.getuid():
        return "skipped: needs root"
    path = system.home / "aiosd.sock"
    modes = {one: one.stat().st_mode & 0o7777 for one in (system.home, path)}
    reading, writing = os.pipe()
    try:
        system.home.chmod(0o755)
        path.chmod(0o777)
        pid = os.fork()
        if pid == 0:
            said = b"no answer"
            try:
                os.setgid(65534)
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.settimeout(5.0)
                    sock.connect(str(path))
                    sock.sendall(framed(encode([wire.VERSION, 0, ""])))
                    said = b"served" if sock.recv(100) else b"refused"
            except ConnectionError:
                said = b"refused"
            except OSError as err:
                said = str(err).encode()
            finally:
                os.write(writing, said)
                os._exit(0)
        os.waitpid(pid, 0)
        return os.read(reading, 100).decode()
    finally:
        for one, mode in modes.items():
            one.chmod(mode)
        os.close(reading)
        os.close(writing)


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def balanced(system: Aiosd) -> list[str]:
    """What is wrong in the books; calls that are on their way get ten seconds."""
    end = time.monotonic() + 10
    while True:
        wrong: list[str] = json.loads(system.call("aiosd", "status", "--check", "--json"))["check"]
        if not wrong or time.monotonic() > end:
            return wrong
        time.sleep(0.2)


def show(found: dict[str, Any]) -> bool:
    print(f"{'frames':<28}{'tried':>12}{'players':>10}{'ended by the kernel':>22}")
    names = {"random": "raw random bytes", "acts": "lies, floods and the like", "control": "control socket"}
    acts = Counter(found["ended_by"])
    for kind in KINDS:
        players = sum(found["players"].get(one, 0) for one in (ACTS if kind == "acts" else [kind]) if one != "random")
        ended = sum(acts.get(one, 0) for one in (ACTS if kind == "acts" else [kind]) if one != "random")
        if kind == "random":
            players, ended = found["players"].get("random", 0), acts.get("random", 0)
        print(f"{names.get(kind, kind):<28}{found['frames'].get(kind, 0):>12,}{players:>10,}{ended:>22,}")
    print(f"{'hostile in all':<28}{found['hostile']:>12,}\n")
    for title, table in (("reasons in aios-inspect", found["reasons"]), ("replies", found["replies"])):
        print(title)
        for what, count in sorted(table.items(), key=lambda one: -one[1]):
            print(f"  {count:>10,}  {what}")
    ms = {side: value * 1000 for side, value in found["p50_s"].items()}
    print(
        f"\nneighbours' call, p50: beside honest agents {ms['honest']:.3f} ms, beside offenders {ms['hostile']:.3f} ms"
    )
    print(f"ratio {found['ratio']:.2f} (bar {found['bar']}: {'kept' if found['ratio'] <= found['bar'] else 'MISSED'})")
    print(f"memory of the kernel: {found['rss'][0] >> 20} → {found['rss'][1] >> 20} MiB")
    print(f"another uid: {found['another_uid']}")
    print(f"kernel deaths: {found['kernel_deaths']}, of the llm core: {found['core_deaths']}")
    print(f"books: {'; '.join(found['unbalanced'][:5]) or 'balanced'}")
    for line in found["harmed"][:10]:
        print(f"HARMED: {line}")
    bad = found["harmed"] or found["unbalanced"] or found["kernel_deaths"] or found["core_deaths"]
    return bool(bad) or found["another_uid"] == "served"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="aios-fuzz-") as folder,
        Aiosd(model_path("nano"), "--threads", "1") as system,
    ):
        fuzz = Fuzz(options, system, Path(folder))
        kernel = next(int(one["ospid"]) for one in system.processes() if one["name"] == "kernel")
        before = rss(kernel)
        try:
            fuzz.storm()
        finally:
            if options.log:
                options.log.write_bytes(system.log.read_bytes())
        uid = another_uid(system)
        unbalanced = balanced(system)
        status = system.status()
        fuzz.client.close()
        p50 = {side: statistics.median(values) for side, values in fuzz.medians.items()}
        return {
            "frames": dict(fuzz.frames()),
            "hostile": fuzz.hostile(),
            "players": dict(fuzz.players),
            "ended_by": dict(fuzz.ended_by),
            "reasons": dict(fuzz.ends),
            "replies": fuzz.errnos(),
            "p50_s": p50,
            "p50s_of_phases_s": fuzz.medians,
            "calls_timed": {side: len(values) for side, values in fuzz.samples.items()},
            "ratio": p50["hostile"] / p50["honest"],
            "bar": 1.2,
            "rss": [before, rss(kernel) if status["kernel"]["epoch"] == 1 else 0],
            "another_uid": uid,
            "kernel_deaths": status["kernel"]["epoch"] - 1,
            "core_deaths": sum(model["deaths"] for model in status["models"]),
            "offenders": status["kernel"]["offenders"],
            "unbalanced": unbalanced,
            "harmed": fuzz.harmed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--players", type=int, default=4, help="players at a time")
    parser.add_argument("--actors", type=int, default=2, help="actors at a time")
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--clients", type=int, default=1000, help="clients of the control socket at a time")
    parser.add_argument("--corpora", type=int, default=8, help="files of 4,000 frames, for each kind")
    parser.add_argument("--phase", type=float, default=PHASE_S, help="seconds of one crew's turn")
    parser.add_argument("--pace", type=float, default=0.01, help="seconds between two batches of a player")
    parser.add_argument("--log", type=Path, help="keep the log of aiosd here")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    options = parser.parse_args()
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, seed {options.seed}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{options.players} players, {options.actors} actors, {options.neighbours} neighbours, up to {options.clients}"
        " clients; model nano\n",
        flush=True,
    )
    found = measure(options)
    bad = show(found)
    settings = {
        name: getattr(options, name) for name in ("seed", "players", "actors", "neighbours", "clients", "phase")
    }
    write("fuzz", [found], options.out, model="nano", **settings)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
