"""A Python agent ends like `python FILE.py`: no output is lost, and the exit code is the same.

Each script is run both ways, in a folder of its own; exit code, stdout, stderr and all files that it has left are
compared.
"""

# ruff: noqa: E501 (a table of scripts)

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import System

FILES = {
    "text": "f = open('out', 'w')\nf.write('hello\\n')",
    "bytes": "f = open('out', 'wb')\nf.write(b'hello')",
    "random": "f = open('out', 'w+b')\nf.write(b'hello')",
    "fdopen": "import os\nf = os.fdopen(os.open('out', os.O_WRONLY | os.O_CREAT), 'w')\nf.write('x' * 100)",
    "csv": "import csv\nw = csv.writer(open('out', 'w', newline=''))\nw.writerow(['a', 1])",
    "gzip": "import gzip\nf = gzip.GzipFile('out', 'wb', mtime=0)\nf.write(b'hello' * 100)",
    "zip": "import zipfile\nz = zipfile.ZipFile('out', 'w')\nz.writestr(zipfile.ZipInfo('a'), 'hello')",
    "bz2": "import bz2\nf = bz2.open('out', 'wt')\nf.write('hello')",
    "in a list": "keep = [open('out', 'w')]\nkeep[0].write('hello')",
    "in a cycle": "class A: pass\na = A(); a.a = a; a.f = open('out', 'w'); a.f.write('hello')",
    "in a class": "class A:\n    f = open('out', 'w')\nA.f.write('hello')",
    "in a function's default": "def g(f=open('out', 'w')): f.write('hello')\ng()",
    "in a closure": "def g():\n    f = open('out', 'w')\n    return lambda: f.write('hello')\nh = g(); h()",
    "in a frame of an exception": "def g():\n    f = open('out', 'w'); f.write('hello'); 1/0\ng()",
    "in a generator": "def g():\n    f = open('out', 'w')\n    while True: f.write((yield))\nx = g(); next(x); x.send('hello')",
    "in a module of its own": "import neighbour\nneighbour.f = open('out', 'w')\nneighbour.f.write('hello')",
    "in a module of the library": "import json\njson.f = open('out', 'w')\njson.f.write('hello')",
    "in builtins": "import builtins\nbuiltins.f = open('out', 'w')\nbuiltins.f.write('hello')",
    "with sys.exit": "import sys\nf = open('out', 'w')\nf.write('hello')\nsys.exit(3)",
    "and os._exit": "import os\nf = open('out', 'w')\nf.write('hello')\nos._exit(4)",
    "logging": "import logging\nlogging.basicConfig(filename='out', format='%(message)s')\nlogging.warning('hello')",
    "memory handler": "import logging.handlers as h, logging\n"
    "m = h.MemoryHandler(100, target=logging.FileHandler('out'))\nlogging.getLogger().addHandler(m)\nlogging.warning('hello')",
    "temporary folder": "import tempfile, os\nt = tempfile.TemporaryDirectory(dir='.')\nprint(os.path.isdir(t.name))",
    "temporary file": "import tempfile\nf = tempfile.NamedTemporaryFile('w', dir='.')\nf.write('x')",
    "stdout into a file": "import sys\nsys.stdout = open('out', 'w')\nprint('hello')",
    "stdout redirected": "import contextlib\nf = open('out', 'w')\nc = contextlib.redirect_stdout(f)\nc.__enter__()\nprint('hello')",
    "written in atexit": "import atexit\nf = open('out', 'w')\natexit.register(lambda: f.write('late'))",
    "opened in atexit": "import atexit\n@atexit.register\ndef g():\n    global f\n    f = open('out', 'w'); f.write('late')",
    "written in __del__": "class A:\n    def __del__(self): f.write('late')\na = A(); f = open('out', 'w')",
    "opened in __del__": "class A:\n    def __del__(self, open=open):\n        with open('out', 'w') as f: f.write('late')\na = A(); a.a = a",
    "shelve": "import shelve\ns = shelve.open('out')\ns['a'] = 1",
    "sqlite": "import sqlite3\nc = sqlite3.connect('out')\nc.execute('create table t (a)')\nc.commit()",
    "mmap": "import mmap\nf = open('out', 'w+b'); f.truncate(10)\nm = mmap.mmap(f.fileno(), 10); m[:5] = b'hello'",
    "printf of C": "import ctypes\nctypes.CDLL(None).printf(b'hello of C\\n')",
}

ENDS = {
    "exit None": "import sys; sys.exit(None)",
    "exit True": "import sys; sys.exit(True)",
    "exit 255": "import sys; sys.exit(255)",
    "exit 256": "import sys; sys.exit(256)",
    "exit 2**40 + 3": "import sys; sys.exit(2**40 + 3)",
    "exit 2**70": "import sys; sys.exit(2**70)",
    "exit -5": "import sys; sys.exit(-5)",
    "exit empty": "import sys; sys.exit('')",
    "exit tuple": "import sys; sys.exit((1, 2))",
    "exit float": "import sys; sys.exit(1.5)",
    "exit object": "import sys\nclass A:\n    def __str__(self): return 'an A'\nsys.exit(A())",
    "exit object that cannot be shown": "import sys\nclass A:\n    def __str__(self): 1/0\nsys.exit(A())",
    "exit surrogate": "import sys; sys.exit('\\udcff')",
    "exit builtin": "exit(4)",
    "SystemExit subclass": "class E(SystemExit): pass\nraise E(6)",
    "exit in a thread": "import sys, threading\nt = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()",
    "raise in a thread": "import threading\ndef f(): raise ValueError('no')\nt = threading.Thread(target=f, name='T'); t.start(); t.join()",
    "thread goes on": "import threading\ngo = threading.Event()\ndef f():\n    go.wait(); print('late'); open('out', 'w').write('late')\n"
    "threading.Thread(target=f).start()\nthreading.Timer(0.05, go.set).start()",
    "daemon thread": "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    "f = open('in', 'r'); print(f.read())",
    "busy daemon thread": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f, daemon=True).start()\nprint('x')",
    "executor": "from concurrent.futures import ThreadPoolExecutor as P\np = P(2)\np.submit(lambda: print('done'))",
    "raise subclass": "class E(Exception): pass\nraise E('no')",
    "raise with notes": "e = ValueError('no'); e.add_note('a note'); raise e",
    "raise group": "raise ExceptionGroup('many', [ValueError(1), TypeError(2)])",
    "raise in a function of a neighbour": "import neighbour\nneighbour.fail()",
    "raise under with": "import contextlib\nwith contextlib.ExitStack() as s:\n    s.callback(print, 'undone')\n    raise KeyError('a')",
    "no name": "print(undefined)",
    "no module": "import nonesuch",
    "no import": "from neighbour import nonesuch",
    "syntax": "print('never')\nx = = 1",
    "indentation": "if True:\nx = 1",
    "encoding": "# coding: latin-1\nprint(ascii('\xe4'))",
    "recursion": "def f(): f()\nf()",
    "recursion depth": "def f(n): return n and f(n - 1)\nprint(f(980))",
    "interrupt": "raise KeyboardInterrupt",
    "interrupt with an excepthook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\nraise KeyboardInterrupt",
    "interrupt subclass": "class K(KeyboardInterrupt): pass\nraise K",
    "generator exit": "raise GeneratorExit",
    "excepthook": "import sys\nsys.excepthook = lambda kind, err, trace: print('hook', err, trace.tb_lineno)\n1/0",
    "excepthook raises": "import sys\ndef hook(*args): raise ValueError('in hook')\nsys.excepthook = hook\n1/0",
    "excepthook exits": "import sys\nsys.excepthook = lambda *args: sys.exit(7)\n1/0",
    "last value": "import atexit, sys\natexit.register(lambda: print(repr(sys.last_value)))\n1/0",
    "atexit order": "import atexit\nfor n in range(3): atexit.register(print, n)",
    "atexit raises": "import atexit\ndef f(): raise ValueError('late')\natexit.register(print, 'still')\natexit.register(f)",
    "atexit exits": "import atexit, sys\natexit.register(sys.exit, 5)",
    "atexit registers": "import atexit\natexit.register(lambda: atexit.register(print, 'inner'))",
    "weakref finalizer": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'finalized')",
    "weakref callback": "import weakref\nclass A: pass\na = A(); r = weakref.ref(a, lambda _: print('gone'))",
    "__del__": "class A:\n    def __init__(self, n): self.n = n\n    def __del__(self): print('del', self.n)\na, b = A(1), A(2)",
    "__del__ in a cycle": "class A:\n    def __del__(self): print('del', x)\nx = 'still'\na = A(); a.a = a",
    "__del__ raises": "exec(\"class A:\\n    def __del__(self): raise ValueError('in del')\\na = A()\")",
    "__del__ of a private name": "class A:\n    def __del__(self): print('del', b)\n_a = A(); b = 1\ndef f(): return _a",
    "generator": "def g():\n    try: yield\n    finally: print('closed')\nx = g(); next(x)",
    "generator in a list": "def g():\n    try: yield\n    finally: print('closed')\nx = [g()]; next(x[0])",
    "coroutine never awaited": "async def f(): pass\nx = f()",
    "stdout closed": "import sys\nprint('hi')\nsys.stdout.close()",
    "stdout None": "import sys\nprint('hi')\nsys.stdout = None",
    "stdout deleted": "import sys\nprint('hi')\ndel sys.stdout",
    "stdout a list": "import sys\nprint('hi')\nsys.stdout = []",
    "stdout detached": "import sys\nprint('hi')\nsys.stdout.detach()",
    "stderr closed": "import sys\nsys.stderr.close()\n1/0",
    "stderr None": "import sys\nsys.stderr = None\n1/0",
    "stderr None and words": "import sys\nsys.stderr = None\nsys.exit('words')",
    "both closed": "import sys\nsys.stdout.close(); sys.stderr.close()",
    "descriptor 1 closed": "import os\nprint('lost')\nos.close(1)",
    "stdout is full": "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint('lost')",
    "stdout is full and exit 3": "import os, sys\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint('lost')\nsys.exit(3)",
    "stdout is full at once": "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint('lost', flush=True)",
    "reader gone": "import os\nr, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\nprint('lost')",
    "killed": "import os, signal\nf = open('out', 'w'); f.write('lost')\nos.kill(os.getpid(), signal.SIGKILL)",
    "abort": "import os, resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nos.abort()",
    "signal handler": "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(9))\nos.kill(os.getpid(), 15)",
    "fork without _exit": "import os\nf = open('out', 'a')\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n"
    "print('parent' if pid else 'child'); f.write('x')",
    "exec": "import os, sys\nos.execv('/bin/sh', ['sh', '-c', 'echo other; exit 6'])",
    "process": "import multiprocessing as m\ndef f(): print('child', flush=True); raise SystemExit(3)\n"
    "if __name__ == '__main__':\n    p = m.Process(target=f); p.start(); p.join(); print(p.exitcode)",
    "process by spawn": "import multiprocessing as m\ndef f(x): print('child', x, __name__, flush=True)\n"
    "if __name__ == '__main__':\n    c = m.get_context('spawn'); p = c.Process(target=f, args=(1,)); p.start(); p.join()",
    "process by forkserver": "import multiprocessing as m\ndef f(q): q.put(__name__)\n"
    "if __name__ == '__main__':\n    c = m.get_context('forkserver'); q = c.Queue(); p = c.Process(target=f, args=(q,))\n"
    "    p.start(); print(q.get()); p.join()",
    "pool left open": "import multiprocessing as m\nif __name__ == '__main__':\n    p = m.Pool(2); print(p.map(abs, [-1, 2]))",
    "process executor": "from concurrent.futures import ProcessPoolExecutor as P\n"
    "if __name__ == '__main__':\n    with P(2) as p: print(list(p.map(abs, [-1, 2])))",
    "asyncio": "import asyncio\nasync def f():\n    try: await asyncio.sleep(9)\n    finally: print('undone')\n"
    "async def main():\n    t = asyncio.create_task(f()); await asyncio.sleep(0)\nasyncio.run(main())",
    "subprocess left": "import subprocess\np = subprocess.Popen(['sh', '-c', 'echo child'], stdout=open('out', 'w'))\np.wait()",
    "breakpoint": "x = 5\nbreakpoint()\nprint('after')",
    "help": "import pydoc\nprint(len(pydoc.render_doc(str)) > 1000)",
}

LOOKS = {
    "main": "print(sorted(globals())); print(__loader__.__class__.__name__, __cached__, type(__builtins__).__name__)",
    "argv": "import sys; print(sys.argv, sys.orig_argv[1:], __name__)",
    "command line": "print(open('/proc/self/cmdline').read().split('\\0')[1:])",
    "streams": "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr): print(s.name, s.mode, s.fileno(), s)",
    "get_data": "print(len(__loader__.get_data(__file__)) > 10)",
    "pickle": "import pickle\nclass A:\n    def __reduce__(self): return (A, ())\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)",
    "source": "import inspect\nclass A:\n    def f(self): pass\nprint(inspect.getsource(A), inspect.getfile(A) == __file__)",
    "imported": "import sys; print([n for n in ('click', 'asyncio', 'logging', 'threading', 'token', 'uuid') if n in sys.modules])",
    "imported with asyncio": "import sys, asyncio\nprint([n for n in ('asyncio', 'asyncio.events', 'asyncio.base_events') if n not in sys.modules])",
    "found": "import importlib.util as u; print(u.find_spec('uuid').origin, u.find_spec('asyncio').submodule_search_locations)",
    "loaded anew": "import importlib.util as u\ns = u.find_spec('uuid'); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
    "import uuid; print(m.NAMESPACE_DNS, m is uuid, uuid.__spec__.origin)",
    "reloaded": "import importlib, uuid; print(importlib.reload(uuid) is uuid, uuid.NAMESPACE_DNS)",
    "type hints": "import typing, asyncio\nclass P(asyncio.Protocol):\n    x: 'int'\nprint(typing.get_type_hints(P))",
    "dataclass of strings": "from __future__ import annotations\nfrom dataclasses import dataclass, KW_ONLY\nimport typing as t\n"
    "@dataclass\nclass A:\n    x: t.ClassVar[int] = 1\n    _: KW_ONLY\n    y: int = 2\nprint(A())",
    "numbers in a module": "import signal, socket, enum\nprint(signal.SIGTERM, socket.AF_INET, enum.Enum.__module__)",
    "codecs": "print('\xe4'.encode('latin-1'), 'x'.encode('idna'), b'x'.decode('cp437'))",
    "warnings": "import warnings\nwarnings.warn('careful', stacklevel=1)\nwarnings.simplefilter('error')\n"
    "try: warnings.warn('x')\nexcept UserWarning as e: print('raised', e)",
    "time zone": "import time; print(time.tzname)",
}


def files(folder: Path) -> dict[str, bytes]:
    return {plain(str(path), folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


Outcome = tuple[int, str, str, dict[str, bytes]]


def both_ways(system: System, folder: Path, lay: dict[str, str], *argv: str, **own: str) -> tuple[Outcome, Outcome]:
    """The results of python and aios-run with the same files: exit code, stdout, stderr, files. aios-run's code for a
    signal is that of a shell."""
    env = {"PYTHONUNBUFFERED": "", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
    here, there = folder / "a" / "work", folder / "b" / "work"
    for work in (here, there):
        for name, text in lay.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="latin-1" if "coding: latin-1" in text else "utf-8")
    python = subprocess.run(
        [sys.executable, *argv], cwd=here, env=system.env | env | own, input="", capture_output=True, encoding="utf-8"
    )
    options = [word for name, value in own.items() for word in ("-e", f"{name}={value}")]  # not for aios-run itself
    agent = system.run("aios-run", *options, *argv, cwd=there, env=env, input="")
    code = python.returncode if python.returncode >= 0 else 128 - python.returncode
    one = (code, plain(python.stdout, here), plain(python.stderr, here), files(here))
    other = (agent.returncode, plain(agent.stdout, there), plain(agent.stderr, there), files(there))
    return one, other


def plain(text: str, folder: Path) -> str:
    """The text without parts that differ between processes."""
    text = re.sub(r"refcount : \d+", "refcount", re.sub("0x[0-9a-f]+", "0x…", text))
    text = re.sub(r"repeated \d+ more", "repeated", text)
    return re.sub("tmp[a-z0-9_]{8}", "tmp…", text.replace(str(folder), "…"))


SCRIPTS = {
    f"{kind} {name}": text
    for kind, table in (("file", FILES), ("end", ENDS), ("look", LOOKS))
    for name, text in table.items()
}
NEIGHBOUR = "f = None\ndef fail():\n    raise LookupError('here')\n"


@pytest.mark.parametrize("case", SCRIPTS)
def test_the_same_as_with_python(aiosd: System, tmp_path: Path, case: str) -> None:
    lay = {"script.py": SCRIPTS[case], "neighbour.py": NEIGHBOUR, "in": "text"}
    python, agent = both_ways(aiosd, tmp_path, lay, "script.py", "one")
    assert agent == python


# ── modules ───────────────────────────────────────────────────────────────────────────────────────────────

#: Of the library and of aiosd's packages; `os` is one that python3 itself has loaded, `math` is built in or loaded late.
NAMES = ("click", "uuid", "token", "logging", "asyncio", "enum", "random", "os", "math")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["{}.py", "{}/__init__.py"])
@pytest.mark.parametrize("how", ["beside", "path", "inserted"])
def test_a_module_of_the_scripts_own_wins_where_python_has_it_win(
    aiosd: System, tmp_path: Path, name: str, shape: str, how: str
) -> None:
    folder = "" if how == "beside" else "lib/"
    first = "import sys; sys.path.insert(0, 'lib'); " if how == "inserted" else ""
    lay = {
        f"{folder}{shape.format(name)}": "V = 'mine'",
        "script.py": f"{first}import {name}; print(getattr({name}, 'V', 'not mine'))",
        "empty/data": "",
    }
    env = {"PYTHONPATH": "lib"} if how == "path" else {}
    python, agent = both_ways(aiosd, tmp_path, lay, "script.py", **env)
    assert agent == python


@pytest.mark.parametrize("never", ["", "1"])
def test_compiled_modules_are_kept_as_the_environment_says(aiosd: System, tmp_path: Path, never: str) -> None:
    lay = {"script.py": "import neighbour", "neighbour.py": NEIGHBOUR}
    python, agent = both_ways(aiosd, tmp_path, lay, "script.py", PYTHONDONTWRITEBYTECODE=never)
    assert set(agent[3]) == set(python[3])
    assert any(name.endswith(".pyc") for name in agent[3]) == (not never)


def test_a_folder_of_data_does_not_hide_a_module(aiosd: System, tmp_path: Path) -> None:
    lay = {"uuid/notes": "", "script.py": "import uuid; print(uuid.NAMESPACE_DNS)"}
    python, agent = both_ways(aiosd, tmp_path, lay, "script.py")
    assert agent == python


def test_libaios_works_beside_modules_that_bear_the_names_of_those_it_uses(aiosd: System, tmp_path: Path) -> None:
    for name in ("threading", "logging", "select", "collections", "enum"):
        (tmp_path / f"{name}.py").write_text("V = 'mine'")
    (tmp_path / "a.py").write_text("import enum, libaios as aios; print(enum.V, aios.proc.getpid() > 0)")
    assert aiosd.run("aios-run", tmp_path / "a.py", check=True).stdout == "mine True\n"


def test_what_the_supervisor_has_loaded_is_not_loaded_again(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import libaios.aio, sys\nbefore = libaios.aio.asyncio\nassert 'asyncio' not in sys.modules\n"
        "import asyncio\nprint(asyncio is before)"
    )
    assert aiosd.run("aios-run", tmp_path / "a.py", check=True).stdout == "True\n"


# ── modules as programs, tracebacks ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    ["f = open('out', 'w'); f.write('hello')", "print(sorted(globals()), __spec__.name)", "1/0", "raise SystemExit(4)"],
)
def test_a_module_ends_as_with_python_m(aiosd: System, tmp_path: Path, text: str) -> None:
    python, agent = both_ways(aiosd, tmp_path, {"pack/__init__.py": "", "pack/mod.py": text}, "-m", "pack.mod")
    # python3 has frames of runpy on top
    assert [agent[0], agent[1], agent[3]] == [python[0], python[1], python[3]]
    assert agent[2].splitlines()[-1:] == python[2].splitlines()[-1:]
    assert "aiosd" not in agent[2]


def test_a_file_in_a_module_of_the_library_is_written_even_with_the_collector_off(
    aiosd: System, tmp_path: Path
) -> None:
    """python3 itself would lose it."""
    (tmp_path / "a.py").write_text("import gc; gc.disable()\nf = open('out', 'w')\nf.write('x')\nl = [f]; l.append(l)")
    aiosd.run("aios-run", "a.py", cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_text() == "x"


def test_an_interrupt_shows_the_scripts_lines_only(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import libaios as aios\nprint('up', flush=True)\naios.msg.recv()\n")
    run = aiosd.popen("aios-run", tmp_path / "a.py")
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGINT)
    _, words = run.communicate(timeout=30)
    assert run.returncode == -signal.SIGINT
    lines = words.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    (place,) = [line for line in lines if line.startswith("  File")]
    assert place in [f'  File "{tmp_path}/a.py", line {number}, in <module>' for number in (2, 3)]  # 2: during print
    assert lines[-1] == "KeyboardInterrupt"


def test_an_error_of_a_call_shows_the_scripts_lines_and_one_more(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import libaios as aios\ndef f(): aios.proc.wait(99999)\nf()\n")
    done = aiosd.run("aios-run", tmp_path / "a.py")
    frames = [line for line in done.stderr.splitlines() if line.startswith("  File")]
    assert ["a.py" in line for line in frames] == [True, True, False], done.stderr
    assert done.stderr.splitlines()[-1].startswith("ChildProcessError: ")


def test_a_full_disk_is_reported(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print('lost')")
    with open("/dev/full", "w") as full:
        done = aiosd.run("aios-run", tmp_path / "a.py", stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert done.returncode == 120
    assert done.stderr.splitlines()[0].startswith("Exception ignored in: <_io.TextIOWrapper name='<stdout>'")
    assert done.stderr.splitlines()[1] == "OSError: [Errno 28] No space left on device"
