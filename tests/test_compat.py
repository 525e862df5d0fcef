"""Ordinary programs work in a sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aiosd.sandbox.box import LEVELS
from tests.conftest import System

#: Shell commands, run in the workspace. One is skipped if its program is not installed.
SHELL = {
    "cat": "echo text > a && cat a",
    "bash": "bash -c 'cat <(echo x) && for i in 1 2; do echo $i; done'",
    "tar": "mkdir d && echo x > d/f && tar czf d.tgz d && rm -r d && tar xzf d.tgz && cat d/f",
    "zip": "echo x > zipped && zip -q z.zip zipped",
    "gzip": "echo x > g && gzip g && gunzip g.gz && cat g",
    "git": "git init -q r && cd r && git config user.email a@b && git config user.name a && echo x > f && git add f"
    " && git commit -qm x && git clone -q . ../r2 && git -C ../r2 log --oneline | grep x",
    "gcc": "printf '#include <stdio.h>\\nint main(){puts(\"hi\");}' > a.c && gcc a.c -o a.out && ./a.out",
    "make": "printf 'all:\\n\\techo made\\n' > Makefile && make -s",
    "perl": "perl -e 'print 6*7'",
    "awk": "echo 1 2 | awk '{print $2}'",
    "sed": "echo a > s && sed -i s/a/b/ s && grep b s",
    "find": "mkdir -p x/y && touch x/y/z && find x -name z | xargs ls -l",
    "sort": "seq 1000 | sort -rn | head -1",
    "sqlite3": "sqlite3 b.db 'create table t(x); insert into t values (7); select x from t' | grep 7",
    "node": 'node -e \'require("fs").writeFileSync("n", String(6*7)); console.log(process.cwd())\'',
    "npm": "npm --version",
    "ssh-keygen": "ssh-keygen -q -t ed25519 -N '' -f key && ls key.pub",
    "openssl": "openssl rand -hex 4",
    "diff": "echo a > p; echo b > q; diff p q > d || patch --version",
    "cp": "echo x > c1 && cp -a c1 c2 && chmod +x c2 && touch -d yesterday c2 && install -m 600 c1 c3",
    "mkfifo": "mkfifo p1 && (echo x > p1 & cat p1)",
    "mktemp": "echo x > $(mktemp) && mktemp -d",
    "sleep": "timeout 5 sleep 0.01 && nice -n 1 true",
    "ps": "ps -o pid= -p $$",
    "id": "id && whoami && hostname && date && uname -a && nproc && df . && free",
    "ls": "ls -l /usr/bin/env /etc/passwd ~",
    "python3": "python3 -c 'import ssl, ctypes, curses, dbm, lzma; print(1)'",
    "ldd": "ldd /bin/ls",
    "locale": "locale",
}

PYTHON = {
    "tempfile": "import tempfile; tempfile.NamedTemporaryFile().close(); tempfile.mkdtemp()",
    "sqlite3": "import sqlite3; c = sqlite3.connect('a.db'); c.execute('create table t(x)'); c.commit()",
    "numpy": "import numpy; (numpy.ones((99, 99)) @ numpy.ones((99, 99))).sum()",
    "ssl": "import ssl; ssl.create_default_context()",
    "subprocess": "import subprocess; subprocess.run(['sh', '-c', 'exit 0'], check=True)",
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "asyncio": "import asyncio\nasync def main():\n"
    "    p = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1); print(await p.communicate(b'x'))\n"
    "asyncio.run(main())",
    "pipes between processes": "import multiprocessing as m\na, b = m.Pipe(); p = m.Process(target=b.send, args=(1,))\n"
    "p.start(); assert a.recv() == 1; p.join()",
    "concurrent": "from concurrent.futures import ThreadPoolExecutor as E\nwith E(2) as e: list(e.map(abs, [1, -1]))",
    "shutil": "import shutil; open('s', 'w').close(); shutil.copy2('s', 't'); shutil.make_archive('u', 'zip')",
    "pathlib": "from pathlib import Path; p = Path.home() / 'd'; p.mkdir(); (p / 'f').write_text('x'); p.rename('e')",
    "random": "import random, secrets, uuid; random.random(), secrets.token_hex(), uuid.uuid4(), uuid.uuid1()",
    "time": "import time, zoneinfo; time.sleep(0.001); zoneinfo.ZoneInfo('UTC')",
    "signals": "import os, signal; signal.alarm(5); signal.alarm(0); os.kill(os.getpid(), 0)",
    "mmap": "import mmap; f = open('m', 'w+b'); f.write(b'x' * 9); f.flush(); mmap.mmap(f.fileno(), 9)[0]",
    "logging": "import logging.handlers as h, logging; h.RotatingFileHandler('l').emit(logging.makeLogRecord({}))",
    "locks": "import fcntl; fcntl.flock(open('lock', 'w'), fcntl.LOCK_EX)",
    "select": "import select, os; r, w = os.pipe(); p = select.epoll(); p.register(r); p.poll(0)",
    "names": "import pwd, os, getpass, platform; pwd.getpwuid(os.getuid()); getpass.getuser(); platform.platform()",
    "psutil": "import psutil; psutil.Process().memory_info(), psutil.cpu_count(), psutil.virtual_memory()",
    "click": "import click, msgspec, jinja2; jinja2.Template('{{x}}').render(x=1)",
    "pip": "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', '--version'], check=True)",
    "venv": "import venv; venv.create('v'); import subprocess; subprocess.run(['v/bin/python', '-c', '1'], check=True)",
    "compileall": "import compileall; open('c.py', 'w').write('1'); compileall.compile_file('c.py', quiet=1)",
    "unittest": "import unittest; unittest.main(argv=['x'], exit=False)",
    "dns": "import socket\ntry: socket.getaddrinfo('localhost', 80)\nexcept socket.gaierror: pass",
}

#: Commands that need /tmp, /dev/shm or terminals, of which an agent has its own only in the cage.
IN_CAGE = {
    "pty": "import pty, os; pid, fd = pty.fork()\nif not pid: os.execlp('tty', 'tty')\n"
    "assert os.read(fd, 99).startswith(b'/dev/pts/'); os.wait()",
    "shared memory": "import multiprocessing.shared_memory as m; m.SharedMemory(create=True, size=9).unlink()",
    "locks of processes": "import multiprocessing as m; m.Lock(); m.Queue().put(1)",
    "pool": "import multiprocessing as m\nwith m.Pool(2) as p: assert p.map(abs, [-1, 2]) == [1, 2]",
    "/tmp": "import tempfile; open('/tmp/x', 'w').write('x'); tempfile.mkdtemp(dir='/tmp')",
    "script": "import subprocess; subprocess.run(['script', '-qc', 'echo x', '/dev/null'], check=True)",
}

RUNNER = """
import json, os, subprocess, sys
what, failed = json.load(sys.stdin), {}
for number, (kind, name, code) in enumerate(what):
    folder = os.path.expanduser(f"~/{number}")
    os.makedirs(folder)
    argv = ["sh", "-ec", code] if kind == "shell" else [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode: failed[name] = (done.returncode, done.stdout[-300:] + done.stderr[-600:])
print(json.dumps(failed))
"""


def missing(name: str) -> bool:
    return shutil.which(name) is None


@pytest.mark.parametrize("level", LEVELS[1:])
def test_ordinary_programs_work(aiosd: System, level: str, tmp_path: Path) -> None:
    found = aiosd.status()["sandbox"]
    if LEVELS.index(found["possible"]) < LEVELS.index(level):
        pytest.skip(found["why_no_more"])
    what = [("shell", name, code) for name, code in SHELL.items() if not missing(name)]
    what += [("python", f"python {name}", code) for name, code in PYTHON.items()]
    if level == "cage":
        what += [("python", f"python {name}", code) for name, code in IN_CAGE.items()]
    assert len(what) >= 40
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "runner.py").write_text(RUNNER)
    done = aiosd.run(
        "aios-run",
        "--sandbox",
        level,
        "project/runner.py",
        cwd=tmp_path,
        input=json.dumps(what),
        timeout=100,
        check=True,
    )
    assert json.loads(done.stdout) == {}
