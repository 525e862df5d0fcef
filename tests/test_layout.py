"""The code that an agent runs is moved to one place (`birth/layout.py`), and works as before.

In a process of its own, because the places of this one's code are none of its business."""

import subprocess
import sys

SCRIPT = """
import types
from aiosd.birth import layout

# Fifty functions, each with nine of the same size behind it that are not run.
def text(name, n):
    return f"def {name}(x, y={n}):\\n    return [x + y * {n}, (lambda: x)()] + list(z for z in (y,))\\n"

source = "".join(text(f"f{n}", n) + "".join(text(f"idle{n}_{i}", n) for i in range(9)) for n in range(50))
made = {}
exec(compile(source, "made", "exec"), made)
hot = [made[f"f{n}"] for n in range(50)]

class Thing:
    def __init__(self, value):
        self.value = value
    @property
    def twice(self):
        return self.value * 2
    @staticmethod
    def of(value):
        return Thing(value)

def play():
    return [f(1) for f in hot], Thing.of(3).twice

def pages():
    return len({id(f.__code__) // 4096 for f in hot})

before, scattered, idle = play(), pages(), made["idle1_1"].__code__
old = [f.__code__ for f in hot]
moved = layout.gather(play)
layout.forget_attributes()
assert play() == before
assert all(f.__code__ is not code and f.__code__ == code for f, code in zip(hot, old))
assert made["idle1_1"].__code__ is idle
print(moved, scattered, pages(), Thing.__init__.__code__ in old)
"""


def test_what_is_run_lies_side_by_side_and_works_as_before() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    moved, scattered, together = map(int, done.stdout.split()[:3])
    assert moved >= 53  # including those of the class
    assert scattered >= 20, "they lay together already: the test tests nothing"
    assert together <= scattered // 2
