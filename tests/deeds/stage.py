"""The targets of deeds: hidden files, a process of the user with a secret, servers. All end with the stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "deeds" / "run.py"


class Stage:
    """`folder` must not be readable in the sandbox; `data` is aiosd's, `supervisor` its Linux pid."""

    def __init__(self, folder: Path, data: Path, supervisor: int) -> None:
        self.folder = folder
        self.path = folder / "stage" / "stage.json"  # outside of what the agent may read
        self._sockets: list[socket.socket] = []
        self._fds: list[int] = []
        self._victim: subprocess.Popen[bytes] | None = None
        self._places: dict[str, Any] = {"data": str(data), "supervisor": supervisor}

    def __enter__(self) -> Stage:
        self._make_files()
        self._make_servers()
        self._start_victim()
        self.reset()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._victim is not None:
            self._victim.kill()
            self._victim.wait()
        for sock in self._sockets:
            sock.close()
        for fd in self._fds:
            os.close(fd)

    @staticmethod
    def survivor(found: dict[str, str], folder: Path, patience_s: float = 5.0) -> dict[str, str]:
        """The outcome of `survive_end`, after the process that started it has ended. `folder` was its folder."""
        path = folder / "survivor"
        if not path.exists():
            return found
        pid = int(path.read_text())
        path.unlink()
        end = time.monotonic() + patience_s
        try:
            while time.monotonic() < end:
                os.kill(pid, 0)
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return found | {"survive_end": "killed with its agent"}
        return found | {"survive_end": "done"}

    def reset(self) -> None:
        """Restore the stage for the next run of all deeds."""
        if self._victim is not None:
            self._victim.send_signal(signal.SIGCONT)
        hidden = self.folder / "hidden"
        for name in ("secret.txt", "victim.txt", "removable.txt", "movable.txt"):
            (hidden / name).unlink(missing_ok=True)  # a deed may have given it to another user
            (hidden / name).write_text("a secret")
        for name in ("new", "fifo", "link", "mine"):
            (hidden / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (hidden / "folder").rmdir()
        (self.folder / "stage" / "readable.txt").write_text("for all")

    def _make_files(self) -> None:
        for name in ("hidden", "stage", "mount", "another"):
            (self.folder / name).mkdir()
        program = self.folder / "hidden" / "program"
        program.write_text("#!/bin/sh\nexit 0\n")
        program.chmod(0o755)
        (self.folder / "another" / "notes.txt").write_text("of another agent")
        master, slave = os.openpty()
        self._fds += [master, slave]
        hidden = self.folder / "hidden"
        self._places |= {
            "tag": f"aios-deeds-{os.getpid()}", "home": os.path.expanduser("~"), "hidden": str(hidden),
            "secret": str(hidden / "secret.txt"), "victim_file": str(hidden / "victim.txt"),
            "removable": str(hidden / "removable.txt"), "movable": str(hidden / "movable.txt"),
            "program": str(program), "mount_point": str(self.folder / "mount"), "terminal": os.ttyname(slave),
            "readable": str(self.folder / "stage" / "readable.txt"),
            "workspace_of_another": str(self.folder / "another" / "notes.txt"),
        }  # fmt: skip

    def _make_servers(self) -> None:
        hidden = self.folder / "hidden"
        folder = os.open(hidden, os.O_PATH)
        self._fds.append(folder)
        stream = self._serve(socket.AF_UNIX, socket.SOCK_STREAM, f"/proc/self/fd/{folder}/s")
        self._serve(socket.AF_UNIX, socket.SOCK_DGRAM, f"/proc/self/fd/{folder}/d")
        abstract = self._serve(socket.AF_UNIX, socket.SOCK_STREAM, f"\0aios-deeds-{os.getpid()}")
        tcp = self._serve(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = self._serve(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        assert stream is not abstract
        self._places |= {
            "unix": f"/proc/{os.getpid()}/fd/{folder}/s", "unix_datagram": f"/proc/{os.getpid()}/fd/{folder}/d",
            "abstract": f"aios-deeds-{os.getpid()}", "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1],
        }  # fmt: skip

    def _serve(self, family: int, kind: int, address: Any) -> socket.socket:
        sock = socket.socket(family, kind)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        self._sockets.append(sock)
        return sock

    def _start_victim(self) -> None:
        self._victim = subprocess.Popen(
            [sys.executable, "-c", "import time\nwhile True: time.sleep(60)"],
            env={**os.environ, "API_KEY": "a secret"}, cwd=self.folder / "hidden", stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._places["victim"] = self._victim.pid

    def write(self, **more: Any) -> None:
        """Write the file that `run.py` reads."""
        self.path.write_text(json.dumps({**self._places, **more}))

    def outside(self) -> dict[str, str]:
        """Run the deeds without a sandbox; returns the outcome of each."""
        self.reset()
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        secret = os.open(self.folder / "hidden" / "secret.txt", os.O_RDONLY)
        master, slave = os.openpty()
        self.write(beside=str(scratch / "beside"), inherited=secret, own_terminal=slave)
        try:
            done = subprocess.run(
                [sys.executable, RUN, self.path], cwd=scratch, capture_output=True, text=True, timeout=120,
                pass_fds=[secret, slave], check=True,
            )  # fmt: skip
        finally:
            for fd in (secret, master, slave):
                os.close(fd)
        return self.survivor(dict(json.loads(done.stdout)), scratch, patience_s=0)

    @contextlib.contextmanager
    def for_inside(self) -> Iterator[int]:
        """Write the stage for an agent; returns a descriptor that the process that starts it must have open."""
        self.reset()
        secret = os.open(self.folder / "hidden" / "secret.txt", os.O_RDONLY)
        try:
            self.write(inherited=secret)
            yield secret
        finally:
            os.close(secret)
