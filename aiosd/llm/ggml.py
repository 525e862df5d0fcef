"""llama.cpp's shared library in this process: its handle, its log, its last message when it aborts. No models here.

What `llama_cpp` declares is called through `C`; functions of ggml that it does not declare are found in `C._lib`.
All other modules that use llama.cpp (`llama.py`, `attention.py`) import this one, so they need not import each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp
import numpy as np
import numpy.typing as npt

C: Any = llama_cpp.llama_cpp  # Any: its type hints do not allow numpy arrays

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

_ERROR_LEVEL = 4

_last_errors: deque[str] = deque(maxlen=8)
_verbose = False


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _data: object) -> None:
    line = text.decode(errors="replace")
    if level == _ERROR_LEVEL and line.strip():
        _last_errors.append(line.strip())
    if _verbose:
        sys.stderr.write(line)


_abort_type = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_set_abort = ctypes.CFUNCTYPE(ctypes.c_void_p, _abort_type)(("ggml_set_abort_callback", C._lib))
_last_words: Callable[[str], None] | None = None


@_abort_type  # type: ignore[untyped-decorator]
def _abort(text: bytes) -> None:
    """Called when an assertion inside llama.cpp fails; the process ends when this returns."""
    line = text.decode(errors="replace").strip()
    sys.stderr.write(f"llama.cpp: {line}\n")
    if _last_words is not None:
        _last_words(line.split(": ", 1)[-1])


def on_abort(last_words: Callable[[str], None] | None) -> None:
    """Set the function that gets the reason when llama.cpp ends the process."""
    global _last_words
    _last_words = last_words


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _pool_buffers() -> None:
    """Every context switch allocates and frees blocks of megabytes. By default each block gets new pages from Linux,
    whose page faults cost more than the copying; with these settings freed pages are used again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def start(verbose: bool = False) -> None:
    """Initialise llama.cpp in this process. Its log is kept, not shown, unless `verbose`."""
    global _verbose
    _verbose = verbose
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else it starts gdb on this process; faulthandler shows more, faster
    _set_abort(_abort)
    C.llama_log_set(_log, ctypes.c_void_p(0))
    C.llama_backend_init()
    _pool_buffers()


def take_errors() -> list[str]:
    """llama.cpp's error messages since the last call, oldest first."""
    errors = list(_last_errors)
    _last_errors.clear()
    return errors


def version() -> str:
    return str(C.llama_version().decode()) if hasattr(C, "llama_version") else ""


@functools.cache
def build() -> str:
    """A fingerprint of the library files. States are bound to it: two builds that both call themselves `0.5.0-dev`, or
    name the same commit with changes of their own, may lay them out or compute them differently."""
    digest = hashlib.sha256()
    for path in sorted(Path(C._lib._name).parent.glob("lib*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def supports_gpu() -> bool:
    return bool(C.llama_supports_gpu_offload())
