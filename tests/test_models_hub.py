"""Fetching models from a hub: a real huggingface_hub against an endpoint on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import tinymodels
from tests.conftest import System
from tests.test_models_found import put_in_ollama, split

REPO, COMMIT = "org/tiny-GGUF", "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by name, files by path. A test can make it break off, send wrong checksums, or refuse."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.break_off: int | None = None  # bytes of a file after which the connection ends; None: it does not
        self.broken = False
        self.wrong_bytes = False
        self.refuse = 0  # refuse with this status, if not 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[tuple[str, str]]:
        """Requested files, each with the range."""
        content = [request for request in self.requests if request[0] == "GET" and "/api" not in request[1]]
        return [(Path(path).name, ranged) for _, path, ranged in content]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        path = self.path.partition("?")[0]
        if self.server.refuse:
            self.send(self.server.refuse, b"", {})
        elif path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            self.about(repo, self.server.files.get(repo))
        else:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            self.content(self.server.files[repo][rest.partition("/")[2]], body)

    def about(self, repo: str, files: dict[str, bytes] | None) -> None:
        if files is None:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            names = [{"rfilename": name} for name in files]
            self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode(), {})

    def content(self, content: bytes, body: bool) -> None:
        digest = hashlib.sha256(content).hexdigest()
        about = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        about["ETag"] = f'"{digest}"'
        if not body or self.server.broken:
            self.send(503 if body else 200, content, about, body=False)
            return
        status, start = 200, 0
        if ranged := self.headers.get("Range"):
            status, start = 206, int(ranged.removeprefix("bytes=").partition("-")[0])
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.server.wrong_bytes:
            content = bytes(len(content))
        self.send(status, content[start:], about, most=self.server.break_off)
        self.server.broken = self.server.break_off is not None

    def send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:most])
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"d": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ff": 32}
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", **shape)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environ(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


@pytest.fixture
def aiosd_command(environ: dict[str, str]) -> Command:
    def run(*argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("aiosd")), *argv]
        env = {**os.environ, **environ, **more}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


def cached(tmp_path: Path, name: str) -> Path:
    return tmp_path / "hf/hub/models--org--tiny-GGUF/snapshots" / COMMIT / name


def test_the_default_is_fetched_and_listed(hub: Hub, aiosd_command: Command, tmp_path: Path, tiny: Path) -> None:
    hub.files[REPO] = {"README.md": b"hello", "t-Q4_K_M.gguf": tiny.read_bytes(), "t-Q8_0.gguf": b"GGUF" * 9}
    done = aiosd_command("pull", REPO)
    assert (done.returncode, done.stdout) == (0, f"hf:{REPO}:Q4_K_M\n"), done.stderr
    assert f"fetching {REPO}/t-Q4_K_M.gguf" in done.stderr
    assert cached(tmp_path, "t-Q4_K_M.gguf").read_bytes() == tiny.read_bytes()
    assert hub.fetched() == [("t-Q4_K_M.gguf", "")]
    (_, row) = json.loads(aiosd_command("models", "--json").stdout)
    assert (row["name"], row["source"], row["fits"]) == (f"hf:{REPO}:Q4_K_M", "hub", True)
    lines = aiosd_command("models").stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "CTX", "FAMILY", "QUANT", "FITS"]
    assert lines[2].startswith(f"hf:{REPO}:Q4_K_M ")


def test_an_existing_file_is_not_fetched_again(hub: Hub, aiosd_command: Command, tiny: Path) -> None:
    hub.files[REPO] = {"t-Q4_K_M.gguf": tiny.read_bytes()}
    for _ in range(2):
        assert aiosd_command("pull", f"hf:{REPO}:Q4_K_M").returncode == 0
    assert len(hub.fetched()) == 1


def test_without_the_default_the_nearest_is_fetched_and_named(hub: Hub, aiosd_command: Command, tiny: Path) -> None:
    hub.files[REPO] = {"t-Q2_K.gguf": b"x", "t-Q5_K_M.gguf": tiny.read_bytes()}
    done = aiosd_command("pull", REPO)
    assert done.stdout == f"hf:{REPO}:Q5_K_M\n"
    assert "has no Q4_K_M; Q5_K_M is nearest" in done.stderr


def test_all_parts_are_fetched(hub: Hub, aiosd_command: Command, tmp_path: Path, tiny: Path) -> None:
    parts = split(tiny, tmp_path / "parts")
    hub.files[REPO] = {f"BF16/t-BF16{part.name.removeprefix('tiny')}": part.read_bytes() for part in parts}
    done = aiosd_command("pull", f"{REPO}:bf16")
    assert (done.returncode, done.stdout) == (0, f"hf:{REPO}:BF16\n"), done.stderr
    assert len(hub.fetched()) == len(parts) > 1
    (_, row) = json.loads(aiosd_command("models", "--json").stdout)
    assert row["size"] == sum(part.stat().st_size for part in parts)


def test_an_interrupted_download_goes_on(hub: Hub, aiosd_command: Command, tmp_path: Path) -> None:
    content = bytes(range(256)) * (80 << 10)  # 20 MB; the library writes pieces of 10
    hub.files[REPO] = {"t-Q4_K_M.gguf": content}
    hub.break_off = 15_000_000
    done = aiosd_command("pull", REPO)
    assert done.returncode == 1
    assert "what has arrived is kept, try again" in done.stderr.splitlines()[-1]
    assert not cached(tmp_path, "t-Q4_K_M.gguf").exists()
    hub.break_off, hub.broken = None, False
    hub.requests.clear()
    done = aiosd_command("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert "10.0M of it are here" in done.stderr
    assert hub.fetched() == [("t-Q4_K_M.gguf", "bytes=10485760-")]
    assert cached(tmp_path, "t-Q4_K_M.gguf").read_bytes() == content
    assert list((tmp_path / "hf/hub").rglob("*.aiosd")) == []


def test_a_file_that_was_damaged_on_its_way_is_refused(
    hub: Hub, aiosd_command: Command, tmp_path: Path, tiny: Path
) -> None:
    hub.files[REPO] = {"t-Q4_K_M.gguf": tiny.read_bytes()}
    hub.wrong_bytes = True
    done = aiosd_command("pull", REPO)
    assert done.returncode == 1
    assert "damaged on its way" in done.stderr
    assert not cached(tmp_path, "t-Q4_K_M.gguf").exists()
    hub.wrong_bytes = False
    assert aiosd_command("pull", REPO).returncode == 0
    assert hub.fetched()[-1] == ("t-Q4_K_M.gguf", "")  # from its beginning


def test_offline_the_cache_serves(hub: Hub, aiosd_command: Command, tiny: Path) -> None:
    hub.files[REPO] = {"t-Q4_K_M.gguf": tiny.read_bytes()}
    done = aiosd_command("pull", REPO, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "not on this machine, and offline mode (HF_HUB_OFFLINE) is on" in done.stderr
    assert aiosd_command("pull", REPO).returncode == 0
    asked = len(hub.requests)
    done = aiosd_command("pull", REPO, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, f"hf:{REPO}:Q4_K_M\n")
    assert len(hub.requests) == asked


def test_a_hub_that_cannot_be_reached(hub: Hub, aiosd_command: Command, tiny: Path) -> None:
    hub.files[REPO] = {"t-Q4_K_M.gguf": tiny.read_bytes()}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port of `discard`, on which no process listens
    done = aiosd_command("pull", REPO, **nowhere)
    assert done.returncode == 1
    assert done.stderr == f"aiosd: {REPO}: the hub cannot be reached: Connection refused\n"
    assert aiosd_command("pull", REPO).returncode == 0
    done = aiosd_command("pull", REPO, **nowhere)
    assert (done.returncode, done.stdout) == (0, f"hf:{REPO}:Q4_K_M\n")
    assert "cannot be reached" in done.stderr


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("org/none", "org/none: no such repository, or a private one (HF_TOKEN)"),
        (f"{REPO}:Q3_K_S", f"{REPO}: has no Q3_K_S; there are Q4_K_M"),
        ("name", "'name' names no model of a hub (such as hf:ORG/NAME or hf:ORG/NAME:Q4_K_M)"),
    ],
)
def test_a_file_that_cannot_be_fetched_is_one_line(
    hub: Hub, aiosd_command: Command, tiny: Path, word: str, words: str
) -> None:
    hub.files[REPO] = {"t-Q4_K_M.gguf": tiny.read_bytes()}
    done = aiosd_command("pull", word)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"aiosd: {words}\n")


def test_a_hub_in_trouble_is_one_line(hub: Hub, aiosd_command: Command) -> None:
    hub.refuse = 500
    done = aiosd_command("pull", REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def test_without_the_extra_the_error_names_it(aiosd_command: Command, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub/__init__.py").write_text("raise ImportError('not installed')")
    for argv in (["pull", REPO], ["--model", f"hf:{REPO}"]):
        done = aiosd_command(*argv, PYTHONPATH=str(tmp_path))
        assert done.returncode == 1
        assert done.stderr == "aiosd: fetching models needs huggingface_hub: pip install 'aiosd[hub]'\n"


def test_a_system_boots_on_a_model_of_a_hub(
    hub: Hub, fresh_aiosd: Callable[..., System], environ: dict[str, str], tmp_path: Path, tiny: Path
) -> None:
    parts = split(tiny, tmp_path / "parts")
    hub.files[REPO] = {f"t-Q4_0{part.name.removeprefix('tiny')}": part.read_bytes() for part in parts}
    options = ["--threads", "1", "--slots", "2", "--ctx", "256"]
    system = fresh_aiosd("--model", f"web=hf:{REPO}:Q4_0", *options, env=environ)
    (model,) = system.status()["models"]
    assert (model["name"], Path(model["path"]).name) == ("web", f"t-Q4_0-00001-of-0000{len(parts)}.gguf")
    script = tmp_path / "agent.py"
    call = "aios.llm.complete('abc', max_tokens=5, ignore_eos=True)"
    script.write_text(f"import libaios as aios\nprint(len({call}.tokens))")
    assert system.run("aios-run", script, check=True).stdout == "5\n"
    assert system.stop() == 0
    hub.refuse = 500  # from now on it refuses, which must not matter
    (system.home / "aiosd.toml").write_text(f'[[model]]\npath = "hf:{REPO}"\n')
    system.options = tuple(options)
    system.start()
    assert system.status()["models"][0]["name"] == "t-Q4_0"


def test_a_system_boots_on_a_model_of_ollama(
    fresh_aiosd: Callable[..., System], environ: dict[str, str], tmp_path: Path, tiny: Path
) -> None:
    blob = put_in_ollama(tiny, tmp_path / ".ollama/models", "registry.ollama.ai/library/tiny/latest")
    system = fresh_aiosd("--model", "tiny", "--threads", "1", "--slots", "2", "--ctx", "256", env=environ)
    (model,) = system.status()["models"]
    assert (model["name"], model["path"]) == ("tiny", str(blob))
