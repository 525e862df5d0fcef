"""The machine's figures, for `aiosd status` and aios-top: processors, memory, load, disk of the data folder.

Only these two import it, and only when they show the figures, because importing psutil takes long.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil

from aiosd.units import format_size


class Figures(NamedTuple):
    cpus: int
    cpu_percent: float | None  # of all processors together; None: not known yet
    load: tuple[float, float, float]  # of the last 1, 5 and 15 minutes
    memory_used: int
    memory_total: int
    disk_free: int | None  # None: not known


def measure(folder: str, interval_s: float | None = None) -> Figures:
    """The figures. `interval_s`: how long to measure the processors; None: their use since the last call (unknown at
    the first)."""
    cpu: float | None = psutil.cpu_percent(interval_s)
    if interval_s is None and not _asked_before():
        cpu = None
    memory = psutil.virtual_memory()
    try:
        disk = psutil.disk_usage(folder)
    except OSError:
        disk = None
    return Figures(
        cpus=psutil.cpu_count() or 1,
        cpu_percent=cpu,
        load=os.getloadavg(),
        memory_used=memory.total - memory.available,
        memory_total=memory.total,
        disk_free=disk.free if disk else None,
    )


_asked: list[bool] = []  # not empty: there was a call before, with which psutil compares


def _asked_before() -> bool:
    before, _asked[:] = bool(_asked), [True]
    return before


def one_line(machine: Figures) -> str:
    """`2 CPUs 35% busy, load 0.51 0.40 0.38, memory 3.2G of 15.6G, disk 76.0G free`"""
    cpus = f"{machine.cpus} CPU{'s' * (machine.cpus != 1)}"
    if machine.cpu_percent is not None:
        cpus += f" {machine.cpu_percent:.0f}% busy"
    parts = [cpus, "load " + " ".join(f"{load:.2f}" for load in machine.load)]
    parts.append(f"memory {format_size(machine.memory_used)} of {format_size(machine.memory_total)}")
    if machine.disk_free is not None:  # without its size: that would not fit into a window of 80 columns
        parts.append(f"disk {format_size(machine.disk_free)} free")
    return ", ".join(parts)
