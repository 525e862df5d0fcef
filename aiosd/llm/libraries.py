"""How the C libraries below a core wait and share out work: they read it from the environment when they are loaded."""

from __future__ import annotations

import os

#: How threads of llama.cpp wait for each other (OpenMP). A thread that waits checks 1,000 times, which takes some
#: microseconds, and then sleeps. By default it would check for milliseconds. If other processes need the processors
#: too, the thread that it waits for cannot run meanwhile: beside two busy processes a step took 10 to 150 times as
#: long.
_OPENMP = {"GOMP_SPINCOUNT": "1000"}

#: numpy multiplies no matrices here, and would start a thread for each processor to do it; these spin for a while.
_NUMPY = {"OPENBLAS_NUM_THREADS": "1"}


def prepare() -> None:
    """Called before numpy and llama.cpp are imported. Variables that the environment sets already are kept."""
    for name, value in (_OPENMP | _NUMPY).items():
        os.environ.setdefault(name, value)
