"""A Python agent behaves like `python FILE.py`: each script here is run in both ways, with the same result."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from libaios import agents
from tests.conftest import System, eventually

SCRIPTS = {
    "prints": "print('a'); import sys; print('b', file=sys.stderr); print('c', end='')",
    "arguments": "import sys; print(sys.argv)",
    "name and file": "print(__name__, __file__, __spec__, __doc__, __package__)",
    "docstring": "'''Words.'''\nprint(__doc__)",
    "path": "import sys, os; print(sys.path[0] == os.path.dirname(os.path.realpath(__file__)))",
    "imports its neighbour": "import neighbour; print(neighbour.WORD)",
    "exit nothing": "import sys; sys.exit()",
    "exit number": "import sys; sys.exit(3)",
    "exit large": "import sys; sys.exit(256 + 7)",
    "exit negative": "import sys; sys.exit(-1)",
    "exit words": "import sys; sys.exit('went wrong')",
    "exit at once": "import os; print('x', flush=True); os._exit(9)",
    "raises": "def f():\n    raise ValueError('no')\nf()",
    "raises from": "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('r') from e",
    "syntax error": "print('never')\nif",
    "interrupts itself": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "is terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "atexit": "import atexit\natexit.register(print, 'first, runs last')\natexit.register(print, 'last')\n1/0",
    "thread": "import threading\ngo = threading.Event()\n"
    "threading.Thread(target=lambda: (go.wait(), print('thread'))).start()\nprint('main')\ngo.set()",
    "stdin": "import sys; print(sys.stdin.read().upper()); print(input.__name__)",
    "input": "print(input('? '))",
    "encoding": "import sys; print(sys.stdin.encoding, sys.stdout.encoding, 'ü→', sys.stdout.line_buffering)",
    "children": "import subprocess; subprocess.run(['sh', '-c', 'echo child; exit 4']); print('parent')",
    "fork": "import os\nif os.fork() == 0:\n    print('child', flush=True); os._exit(0)\nos.wait(); print('parent')",
    "multiprocessing": "import multiprocessing as m\ndef f(x): return x * x\n"
    "if __name__ == '__main__':\n    with m.Pool(2) as p: print(p.map(f, [1, 2, 3]))",
    "pickles its own class": "import pickle\nclass A: x = 1\nprint(pickle.loads(pickle.dumps(A())).x, A.__module__)",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0); return 5\nprint(asyncio.run(f()))",
    "garbage": "import gc; print(gc.isenabled())",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))",
    "logging": "import logging; logging.warning('careful')",
    "signals": "import signal; print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT).__name__, "
    "signal.getsignal(signal.SIGPIPE).name, signal.pthread_sigmask(0, []))",
    "umask and folder": "import os; print(oct(os.umask(0)), os.getcwd())",
    "environment": "import os; print(os.environ['COLOUR'], os.environb[b'COLOUR'])",
    "environment of children": "import os, subprocess\nos.environ['NEW'] = 'x'; del os.environ['COLOUR']\n"
    "subprocess.run('echo $NEW $COLOUR $LANG $HOME', shell=True); os.putenv('NEW', 'y'); os.system('echo $NEW')",
    "fork beside a thread": "import os, threading\ngo = threading.Event()\n"
    "t = threading.Thread(target=go.wait); t.start()\n"
    "if os.fork() == 0:\n    print(threading.active_count(), t.is_alive(), threading.main_thread().ident == "
    "threading.get_ident(), flush=True)\n    os._exit(0)\n"
    "os.wait(); go.set(); t.join(); print(threading.active_count(), threading.main_thread().is_alive())",
    "descriptors": "import os; print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3])",
    "resource warning": "import warnings; warnings.warn('old', DeprecationWarning)",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "inspect": "import inspect\ndef f(): pass\nprint(inspect.getsource(f))",
    "generator at exit": "def g():\n    try: yield\n    finally: print('closed')\nx = g(); next(x)\ndel x",
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_as_with_python(aiosd: System, tmp_path: Path, case: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[case])
    (tmp_path / "neighbour.py").write_text("WORD = 'hello'\n")
    how = {"cwd": tmp_path, "input": "some text\n", "env": {"COLOUR": "green"}}
    here = subprocess.run(
        [sys.executable, "script.py", "one", "two words"],
        capture_output=True,
        encoding="utf-8",
        **{**how, "env": {**aiosd.env, "COLOUR": "green"}},
    )
    there = aiosd.run("aios-run", "script.py", "one", "two words", **how)
    code = here.returncode if here.returncode >= 0 else 128 - here.returncode
    assert (there.returncode, there.stdout, there.stderr) == (code, here.stdout, here.stderr)


def test_a_module_is_run_as_with_python_m(aiosd: System, tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys\nfrom . import part\nprint(part.X, sys.argv, __spec__.name)")
    (package / "part.py").write_text("X = 5\nif __name__ == '__main__': print(__package__, __file__)")
    for module in ("pack", "pack.part"):
        here = subprocess.run(
            [sys.executable, "-m", module, "-x"], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
        )
        there = aiosd.run("aios-run", "-m", module, "-x", cwd=tmp_path)
        assert (there.returncode, there.stdout) == (0, here.stdout)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["nonesuch.py"], 127, "not found"),
        (["-m", "nonesuch"], 127, "No module named nonesuch"),
        (["--", "nonesuch"], 127, "not found"),
        (["--", "./notes.txt"], 126, "permission denied"),
        (["--", "./broken"], 126, "Exec format error"),
        (["--", "./bad"], 127, "its interpreter /no/such was not found"),
        (["bad"], 127, "its interpreter /no/such was not found"),
        (["notes.sh"], 126, "is no Python script, and not executable"),
        (["."], 126, "is a directory"),
    ],
)
def test_what_cannot_be_run(aiosd: System, tmp_path: Path, argv: list[str], code: int, words: str) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "broken").write_text("\x7fnot a program")
    (tmp_path / "broken").chmod(0o755)
    (tmp_path / "bad").write_text("#!/no/such -x\n")
    (tmp_path / "bad").chmod(0o755)
    (tmp_path / "notes.sh").write_text("#!/bin/sh\n")
    done = aiosd.run("aios-run", *argv, cwd=tmp_path)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert words.lower() in done.stderr.lower()


def test_a_script_of_another_language_and_a_program_are_run(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text('#!/bin/sh\necho "$1" from sh; exit 3')
    (tmp_path / "script.sh").chmod(0o755)
    (tmp_path / "agent").write_text("#!/usr/bin/env python3\nimport sys; print(sys.argv, sys.meta_path[0].__module__)")
    done = aiosd.run("aios-run", "script.sh", "hello", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "hello from sh\n", "")
    assert aiosd.run("aios-run", "/bin/echo", "hello", check=True).stdout == "hello\n"
    assert aiosd.run("aios-run", "agent", cwd=tmp_path, check=True).stdout == "['agent'] aiosd.birth.modules\n"


def test_an_agent_has_no_descriptors_but_its_own(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, libaios\nprint(len(os.listdir('/proc/self/fd')) - 1)")
    assert aiosd.run("aios-run", script, check=True).stdout == "5\n"  # stdio, memfd, doorbell


def test_python_path_of_the_caller_counts(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "extra.py").write_text("WORD = 'extra'")
    (tmp_path / "script.py").write_text("import extra; print(extra.WORD)")
    done = aiosd.run("aios-run", tmp_path / "script.py", env={"PYTHONPATH": str(tmp_path / "lib")}, check=True)
    assert done.stdout == "extra\n"


def test_two_agents_draw_different_random_numbers(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import random, uuid; print(random.random(), uuid.uuid4())")
    assert aiosd.run("aios-run", script).stdout != aiosd.run("aios-run", script).stdout


TO_BEGIN_WITH = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/agents.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("text", TO_BEGIN_WITH, ids=range(len(TO_BEGIN_WITH)))
def test_the_agents_of_the_documentation_run(aiosd: System, tmp_path: Path, text: str) -> None:
    (tmp_path / "agent.py").write_text(text)
    done = aiosd.run("aios-run", "agent.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, ""),
        (click.UsageError("no question"), 2, "Error: no question"),
        (SystemExit(1), 1, ""),
        (None, 0, ""),
    ],
)
def test_the_ready_agents_exit_as_a_shell_has_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException | None,
    code: int,
    shown: str,
) -> None:
    @click.command()
    def command() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(sys, "argv", ["agent"])
    with pytest.raises(SystemExit) as left:
        agents.run(command)
    assert (left.value.code or 0) == code
    assert shown in capsys.readouterr().err


def test_ctrl_c_ends_a_ready_agent_that_waits_for_its_question(aiosd: System) -> None:
    job = aiosd.popen("aios-run", "--name", "asked", "-m", "libaios.agents.react")
    assert eventually(lambda: aiosd.run("aios-ps", "-C", "asked", "-o", "stat=").stdout.strip() == "S")
    job.send_signal(signal.SIGINT)
    assert job.wait(30) == 130
    assert "Abort" not in job.stderr.read()  # type: ignore[union-attr]
