"""An agent's new objects must not be scattered over pages that it shares (`birth/heap.py`).

This is tested in a process of its own, in which holes are made between objects that stay, on hundreds of pages.
"""

import subprocess
import sys

COMMON = """
import ctypes, sys
from aiosd.birth import heap
from aiosd.birth.fork import malloc
from aiosd.kin import LIBC

def pages(places):
    return len({place // 4096 for place in places})
"""

OBJECTS = """
row = [bytes(100) for _ in range(20_000)]
del row[::100]  # 200 holes
before = [bytes(100) for _ in range(20)]
assert pages(map(id, before)) >= 15, "no holes: the test tests nothing"
heap.fill_holes()
after = [bytes(100) for _ in range(20)]
print(pages(map(id, after)), len(heap._kept))
"""

BLOCKS = """
row = [malloc(1200) for _ in range(2000)]
for block in row[::10]:
    LIBC.free(ctypes.c_void_p(block))
before = [malloc(1200) for _ in range(20)]
assert pages(before) >= 15, "no holes: the test tests nothing"
heap.fill_holes()
after = [malloc(1200) for _ in range(20)]
print(pages(after), len(heap._kept))
"""


def pages_and_kept(script: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", COMMON + script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    pages, kept = map(int, done.stdout.split())
    return pages, kept


def test_new_objects_lie_side_by_side() -> None:
    pages, kept = pages_and_kept(OBJECTS)
    assert pages <= 3
    assert kept < 10_000, "it does not see where the holes end"


def test_new_blocks_lie_side_by_side() -> None:
    assert pages_and_kept(BLOCKS)[0] <= 8  # of 24,000 bytes
