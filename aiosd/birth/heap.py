"""The layout of the supervisor's memory, on which the memory of every agent depends.

An agent shares the supervisor's pages until it writes to one, which is then copied. Where imports and the first calls
have left holes between objects that stay, an agent's own objects would go into these holes: a few bytes on each of
some hundred pages, and every such page is copied. So `fill_holes` fills them before the first fork, with objects
and blocks that are never freed. After that Python and the C library take whole pages for what an agent allocates. It
saves each agent a tenth of its memory (benchmarks/spawn.py measures it), and costs the supervisor only holes that it
would hardly have used.

These are guesses about two allocators, and no guarantee depends on them: with another one it does nothing useful, and
no harm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from aiosd.birth.fork import malloc
from aiosd.kin import LIBC

# Python's allocator for small objects (Objects/obmalloc.c): blocks of one size lie in a pool, after its header.
_SIZES = range(16, 513, 16)
_POOL_BYTES = 1 << 14
_HEADER_BYTES = 48
_MOST = 4096  # objects or blocks of one size; there are some hundred holes
_FRESH = 3  # objects in a row from the beginning of a pool: then the pool is new, and no hole was left
_NEAR = 4  # blocks from one of these objects to the next: numbers and lists of this file may lie between them

# The C library's, for larger ones.
_LARGE = (1 << 13, 1 << 16)  # holes from this size on are as good as new pages; larger blocks are not in the heap
_SMALL = range(_LARGE[0] - 16, 16, -16)

_kept: list[object] = []


def tidy() -> None:
    """Before many forks: let the C library merge and sort its free blocks once here, instead of in every child."""
    LIBC.malloc_trim(0)
    LIBC.free(ctypes.c_void_p(malloc(1 << 16)))


def fill_holes() -> None:
    """Fill the holes. To be called when all is imported and rehearsed, and garbage is collected."""
    for size in _SIZES:
        _fill_pools(size, _maker(size))
    _fill_heap()


def _maker(size: int) -> Callable[[], object]:
    """A function that makes objects which take a block of this size."""
    if size == 16:
        return object
    if size == 32:
        return lambda: int("4000000000")
    return lambda: bytes(size - b"".__sizeof__())


def _fill_pools(size: int, make: Callable[[], object]) -> None:
    in_a_row = last = 0
    for _ in range(_MOST):
        _kept.append(made := make())
        place = id(made)
        if place % _POOL_BYTES == _HEADER_BYTES:
            in_a_row = 1
        elif in_a_row:
            in_a_row = in_a_row + 1 if 0 < place - last <= _NEAR * size else 0
        last = place
        if in_a_row == _FRESH:
            return


#: Fields of struct mallinfo2 (malloc.h). `keepcost`: free bytes after all blocks.
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _fill_heap() -> None:
    """Fill the small holes. The large ones are held meanwhile, so that they stay for later allocations."""
    mallinfo = getattr(LIBC, "mallinfo2", None)
    if mallinfo is None:  # another C library
        return
    mallinfo.restype = _Mallinfo
    LIBC.malloc_trim(0)
    held: list[int] = []
    size = _LARGE[1]
    while size >= _LARGE[0]:
        held += _blocks_in_holes(size, mallinfo)
        size //= 2
    for size in _SMALL:
        _blocks_in_holes(size, mallinfo)
    for block in held:
        LIBC.free(ctypes.c_void_p(block))


def _blocks_in_holes(size: int, mallinfo: Callable[[], _Mallinfo]) -> list[int]:
    """Allocate blocks of this size while they fit into holes: as long as the memory after all blocks is unchanged."""
    blocks: list[int] = []
    while len(blocks) < _MOST:
        behind = mallinfo().keepcost
        block = malloc(size)
        if mallinfo().keepcost != behind:
            LIBC.free(ctypes.c_void_p(block))
            break
        blocks.append(block)
    return blocks
