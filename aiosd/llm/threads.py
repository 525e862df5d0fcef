"""How many threads compute a step. The number is measured: with a small model one thread is faster than two (a step
takes less time than waking the others), and with a large model it is not.

Agents share the machine with the model, so other processes may be busy during the measurement. Therefore candidates
take turns, and the fastest step of each counts: other processes make some steps slower and none faster. The time is
limited, however long a step takes. The load of other processes is kept with the choice; a choice made on a busy machine
is made again when the machine is quiet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiosd.errors import WorldError
from aiosd.llm import llama

#: A measurement ends with the first step that ends after MEASURE_S seconds, or after ROUNDS rounds.
MEASURE_S, ROUNDS = 0.8, 8

#: Where one step takes this part of the time, more threads pay off, and trying fewer would take too long.
LONG_STEP = 1 / 4

#: More threads are chosen only if a step takes less than this part of its time with fewer: the agents need the cores
#: too, and threads that wait for each other waste them.
GAIN = 0.8

#: The most steps of a measurement, on a machine with 512 cores, and so the most tokens in a slot.
MOST_STEPS = 128

#: If other processes used more cores than this, the measurement is repeated later.
QUIET = 0.3


@dataclass(frozen=True, slots=True)
class Threads:
    number: int
    why: str  # for people: given, assumed or measured, and how busy the machine was
    again: bool = False  # measured on a busy machine


def measure(
    context: llama.LlamaContext,
    slots: list[int],
    report: Callable[[float], None] = lambda fraction: None,
    *,
    seconds: float = MEASURE_S,
    clock: Callable[[], float] = time.perf_counter,
    busy: Callable[[], float] | None = None,
) -> Threads:
    """Measure decode steps with one row in each of these slots, which must be empty and are left empty. `busy`: seconds
    that all cores together have worked for other processes so far."""
    busy = busy or busy_for_others
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return Threads(1, "the only core")
    began, others = clock(), busy()
    best = _take_turns(context, _batch(slots), _candidates(cores), report, seconds, clock)
    for slot in slots:
        context.cut(slot, 0)
    used = (busy() - others) / max(clock() - began, 1e-6)
    beside = f"while others used {used:.1f} of {cores} cores" if used > QUIET else "on a quiet machine"
    if len(best) == 1:
        [(number, step)] = best.items()
        why = f"assumed {beside}: fewer would take too long to try (a step takes {1000 * step:.0f} ms)"
        return Threads(number, why, again=used > QUIET)
    steps = ", ".join(f"{number}: {1000 * step:.1f} ms" for number, step in sorted(best.items()))
    return Threads(_fastest(best), f"measured {beside} ({steps} a step)", again=used > QUIET)


def _candidates(cores: int) -> list[int]:
    """Most threads first: if these already take long, fewer need not be tried."""
    return sorted({1, *(2**i for i in range(1, 9) if 2**i < cores), cores}, reverse=True)


def _batch(slots: list[int]) -> llama.BatchBuffer:
    batch = llama.BatchBuffer(len(slots))
    batch.size = len(slots)
    batch.sequences[:] = slots
    batch.wanted[:] = 1
    return batch


def _take_turns(
    context: llama.LlamaContext,
    batch: llama.BatchBuffer,
    candidates: list[int],
    report: Callable[[float], None],
    seconds: float,
    clock: Callable[[], float],
) -> dict[int, float]:
    """The fastest step of each candidate. A candidate with long steps is dropped, and so are those with fewer threads;
    the one with the most threads is always kept. The first round does not count, because caches are cold."""
    best: dict[int, float] = {}
    deadline = clock() + seconds
    for i, threads in enumerate(candidates):
        report(0.0)
        context.set_threads(threads)
        took = _step(context, batch, clock)
        if took > seconds * LONG_STEP:
            took = min(took, _step(context, batch, clock))
        if took > seconds * LONG_STEP:
            if not i:
                return {threads: took}
            candidates = candidates[:i]
            break
    for turn in range(ROUNDS):
        report(turn / ROUNDS)
        for threads in candidates:
            context.set_threads(threads)
            took = _step(context, batch, clock)
            best[threads] = min(took, best.get(threads, took))
            if clock() > deadline and len(best) == len(candidates):
                return best
    return best


def _step(context: llama.LlamaContext, batch: llama.BatchBuffer, clock: Callable[[], float]) -> float:
    began = clock()
    if context.decode(batch) != llama.OK:
        raise WorldError("llama.cpp could not decode a first step")
    context.logits(1)
    batch.positions[:] += 1
    return clock() - began


def _fastest(best: dict[int, float]) -> int:
    chosen, least = 1, float("inf")
    for threads in sorted(best):
        if best[threads] < GAIN * least:
            chosen, least = threads, best[threads]
    return chosen


def busy_for_others() -> float:
    """Seconds that all cores together have worked for other processes since the machine started."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in file.readline().split()[1:9])
    mine = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def machine_is_quiet() -> bool:
    """Judged by about the last minute."""
    return os.getloadavg()[0] < QUIET
