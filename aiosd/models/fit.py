"""Finds out whether a model fits into the memory of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiosd.llm.modelfile import ModelFile
from aiosd.llm.spec import DEFAULT_CTX


@dataclass(frozen=True, slots=True)
class Fit:
    needs: int  # bytes: the weights, and the KV cache of one slot of the default size
    room: int  # free bytes

    @property
    def fits(self) -> bool:
        return self.needs <= self.room


def fit(file: ModelFile, room: int | None = None) -> Fit:
    ctx = min(DEFAULT_CTX, file.number("context_length") or DEFAULT_CTX)
    return Fit(file.size + file.kv_bytes_per_slot(ctx), available_memory() if room is None else room)


def available_memory() -> int:
    """Bytes that this process can still use: the free memory of the machine, or less if a cgroup limits it."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min(free, _cgroup_room())


def _cgroup_room() -> int:
    room = 1 << 62
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names, roots = ("memory.max", "memory.current"), [Path("/sys/fs/cgroup") / path.lstrip("/")]
            elif "memory" in controllers.split(","):
                base = Path("/sys/fs/cgroup/memory")
                names, roots = ("memory.limit_in_bytes", "memory.usage_in_bytes"), [base / path.lstrip("/"), base]
            else:
                continue
            for root in roots:
                try:
                    limit, used = ((root / name).read_text().strip() for name in names)
                except OSError:
                    continue
                if limit != "max" and int(limit) < 1 << 60:
                    room = min(room, max(int(limit) - int(used) + _cache(root), 0))
    except (OSError, ValueError):
        return room
    return room


def _cache(cgroup: Path) -> int:
    """Bytes of file pages in the cgroup: they count as used, but Linux frees them when memory is needed."""
    for line in (cgroup / "memory.stat").read_text().splitlines():
        key, value = line.split()
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
