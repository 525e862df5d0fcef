"""aiosd's own attention on the CPU, in llama.cpp's graphs (`native/attention.c` describes it).

It is faster for two reasons. A row reads only the cells that it may see, not as many as the longest row of its batch;
and tokens that many sequences share are read once for all of them, from the store (`bases.py`), not from a copy in
each slot.

It is compiled when the package is installed. If that failed, or for another processor, a GPU, or a model whose
attention it cannot compute, llama.cpp's own attention is used: `load` raises Unavailable, or `trial.py` finds a reason
when the model is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosd.llm.ggml import C, Ints

_RUN = np.dtype([("data", "<u8"), ("tokens", "<i8")])
_MOST_OPERATIONS = 256
_MOST_THREADS = 512


class _Struct(ctypes.Structure):
    """`struct attention` of attention.c."""

    _fields_ = [
        ("op_flash", ctypes.c_int32),
        ("op_custom", ctypes.c_int32),
        ("enabled", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("streams", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("key_at", ctypes.c_void_p),
        ("value_at", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("base_run", ctypes.c_void_p),
        ("base_length", ctypes.c_void_p),
        ("rewritten", ctypes.c_int64),
        ("refused", ctypes.c_int64),
        ("why", ctypes.c_char_p),
        ("judging", ctypes.c_int32),
        ("skip", ctypes.c_int32),
        ("theirs", ctypes.c_double),
        ("ours", ctypes.c_double),
        ("based", ctypes.c_double),
        ("scratch", ctypes.c_void_p * _MOST_THREADS),
    ]


class Unavailable(Exception):
    """Our own attention cannot be used here; the text gives the reason."""


class Attention:
    """The attention of one context, and the state outside of its cache that its sequences read (runs).

    Changes take effect with the next decode. The arrays that runs point to must live until the runs are replaced.
    """

    def __init__(self, library: Any, operations: tuple[int, int], streams: int) -> None:
        self._library = library
        self._struct = struct = _Struct()
        struct.op_flash, struct.op_custom = operations
        struct.streams, struct.enabled = streams, 1
        self.callback = ctypes.cast(library.aios_attention_rewrite, ctypes.c_void_p)
        self.data = ctypes.addressof(struct)
        self.base_run: Ints = np.zeros(streams, np.int32)
        self.base_length: Ints = np.zeros(streams, np.int32)
        struct.base_run = self.base_run.ctypes.data
        struct.base_length = self.base_length.ctypes.data
        self._places: npt.NDArray[np.int64] = np.zeros((2, 0), np.int64)
        self.set_runs([])

    @classmethod
    def load(cls, streams: int) -> Attention:
        """Load the compiled part. Raises Unavailable: not compiled, unsuitable processor, or ggml has another
        layout."""
        spec = importlib.util.find_spec("aiosd.llm._attention")
        if spec is None or spec.origin is None:
            raise Unavailable("aiosd was installed without its part in C")
        try:
            library = ctypes.CDLL(spec.origin)
        except OSError as error:
            raise Unavailable(f"aiosd's part in C cannot be loaded: {error}") from error
        operations = _operations()
        width = int(os.environ.get("AIOS_VECTOR_WIDTH", "0"))  # at most this wide, to test other processors
        if operations is None or not _tensors_as_known(library, operations[2]):
            raise Unavailable("this llama.cpp lays out its tensors in another way")
        if not library.aios_attention_start(width):
            raise Unavailable("this processor has neither AVX2 nor AVX-512")
        library.aios_attention_free.argtypes = [ctypes.c_void_p]
        return cls(library, operations[:2], streams)

    def close(self) -> None:
        """Free the scratch buffers. Call only after the context is closed, when no thread can use them any more."""
        self._library.aios_attention_free(self.data)

    @property
    def enabled(self) -> bool:
        return bool(self._struct.enabled)

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._struct.enabled = enabled

    def set_threads(self, threads: int) -> None:
        """Nodes with fewer units of work than threads are left to llama.cpp, unless they read a base."""
        self._struct.threads = threads

    @property
    def used(self) -> bool:
        """Has it computed every attention so far?"""
        return self._struct.rewritten > 0 and not self._struct.refused

    @property
    def refusal(self) -> str:
        """Why an attention could not be computed, or ''."""
        return str(self._struct.why.decode()) if self._struct.refused else ""

    @contextlib.contextmanager
    def judged(self, skip: int = 0) -> Iterator[None]:
        """Inside this block, compare every attention with exact arithmetic on the same inputs. `skip`: also test ours
        as if the first `skip` cells of a stream lay in its base only."""
        self._struct.judging, self._struct.skip = (2 if skip else 1), skip
        try:
            yield
        finally:
            self._struct.judging = 0

    @property
    def errors(self) -> tuple[float, float, float]:
        """The largest errors, as a part of the largest value: of llama.cpp's attention, ours, ours with a base."""
        return self._struct.theirs, self._struct.ours, self._struct.based

    def set_layout(self, sizes: list[int]) -> None:
        """Bytes per token in a run: K of each layer, then V of each. Until this is called, no runs are read."""
        places = np.cumsum([0, *sizes[:-1]], dtype=np.int64).reshape(2, -1)
        self._places = places
        self._struct.key_at, self._struct.value_at = places[0].ctypes.data, places[1].ctypes.data
        self._struct.layers = places.shape[1]

    def set_runs(self, runs: list[tuple[int, int]]) -> None:
        """(address, tokens) of each run; `base_run` holds indices into this list."""
        self._runs = np.array(runs, _RUN) if runs else np.zeros(1, _RUN)
        self._struct.runs = self._runs.ctypes.data


def _operations() -> tuple[int, int, int] | None:
    """The numbers of FLASH_ATTN_EXT, CUSTOM and SCALE in this ggml."""
    name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(("ggml_op_name", C._lib))
    numbers: dict[bytes, int] = {}
    for number in range(_MOST_OPERATIONS):  # ggml must not be called with a number beyond the last operation
        numbers[name(number)] = number
        if b"CUSTOM" in numbers:
            break
    found = [numbers[word] for word in (b"FLASH_ATTN_EXT", b"CUSTOM", b"SCALE") if word in numbers]
    return (found[0], found[1], found[2]) if len(found) == 3 else None


def _tensors_as_known(library: Any, operation: int) -> bool:
    """Do the tensors of this ggml have the layout that attention.c assumes? `operation`: the number of SCALE."""
    ggml = C._lib
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("ggml_free", ggml))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    new = ctypes.CFUNCTYPE(pointer, pointer, ctypes.c_int, integer, integer)(("ggml_new_tensor_2d", ggml))
    scale = ctypes.CFUNCTYPE(pointer, pointer, pointer, ctypes.c_float)(("ggml_scale", ggml))
    view = ctypes.CFUNCTYPE(pointer, pointer, pointer, integer, ctypes.c_size_t)(("ggml_view_1d", ggml))
    set_name = ctypes.CFUNCTYPE(pointer, pointer, ctypes.c_char_p)(("ggml_set_name", ggml))

    class Params(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    init = ctypes.CFUNCTYPE(ctypes.c_void_p, Params)(("ggml_init", ggml))
    context = init(Params(1 << 16, None, False))
    if not context:
        return False
    try:
        tensor = new(context, 0, 3, 5)
        set_name(tensor, b"probe")
        part = view(context, tensor, 2, 8)
        scaled = scale(context, tensor, 2.0)
        library.aios_attention_knows.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int]
        return bool(library.aios_attention_knows(tensor, part, scaled, operation))
    finally:
        free(context)
