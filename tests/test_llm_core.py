"""The core as a process: it receives the kernel's messages and sends the engine's, over a real channel."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import Raw

from aiosd.ipc import link
from aiosd.llm import llama, loading, threads
from aiosd.llm.line import Line
from aiosd.llm.local import Local
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.channel import Channel, Side, make_channel
from libaios.wire import Detokenize, Embed, Generate, Sampling, Sys, Tokenize
from tests import tinymodels

MAIN = """
import sys
from aiosd.ipc.heartbeat import Rounds
from aiosd.llm.core import main
from aiosd.llm.spec import ModelSpec
from libaios.channel import Channel, Side
memfd, bell, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
spec = ModelSpec("m", path, slots=4, ctx=int(sys.argv[4]), threads=1)
sys.exit(main(Channel(memfd, bell, Side.KERNEL), spec, Rounds()))
"""


class Kernel:
    """The other end of a core's channel."""

    def __init__(self, path: Path, ctx: int = 512) -> None:
        memfd, core_bell, kernel_bell = make_channel(1 << 16, 1 << 16)
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(memfd), str(core_bell), str(path), str(ctx)],
            pass_fds=(memfd, core_bell),
            stderr=subprocess.PIPE,
        )
        os.close(core_bell)
        self.channel = Channel(memfd, kernel_bell, Side.AGENT)
        self.seen: list[Any] = []
        self.closed = False

    def send(self, message: link.ToService) -> None:
        self.channel.send(link.encode(message))

    def until(self, wanted: Callable[[Any], bool]) -> Any:
        """Wait for a message that fits; all are recorded in `seen`."""
        deadline = time.monotonic() + 30
        while True:
            for payload in self.channel.receive():
                self.seen.append(link.decode_from_service(payload))
            found = next((message for message in self.seen if wanted(message)), None)
            if found is not None:
                self.seen.remove(found)
                return found
            assert not self.channel.hung_up, f"the core is gone; seen: {self.seen[-3:]}"
            assert self.channel.wait(1) or time.monotonic() < deadline, "no word from the core"
            self.channel.pump()

    def of(self, kind: type) -> Any:
        return self.until(lambda message: isinstance(message, kind))

    def close(self) -> int:
        """Close the channel; returns the exit code."""
        self.closed = True
        self.channel.close()
        code = self.process.wait(30)
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read().decode()
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def kernel(path: Path) -> Iterator[Kernel]:
    kernel = Kernel(path)
    yield kernel
    if not kernel.closed:
        assert kernel.close() == 0
        assert kernel.errors == ""


def ask(number: int, sys: int, args: Any) -> link.Ask:
    return link.Ask((1, number), link.Caller(1, 0, "x", False, ""), sys, Raw(msgspec.msgpack.encode(args)))


def test_threads_of_llama_cpp_do_not_spin_beside_agents(path: Path) -> None:
    """OpenMP and OpenBLAS read the variable when they are loaded, so it must be set before. A user's value is kept."""
    code = """
import os, sys
from aiosd.ipc.heartbeat import Rounds
from aiosd.llm import core
from aiosd.llm.spec import ModelSpec
class Deaf:
    outbox_bytes, hung_up = 0, True
    def send(self, payload): assert "llama_cpp" in sys.modules
assert "llama_cpp" not in sys.modules
assert core.main(Deaf(), ModelSpec("m", "/nowhere"), Rounds()) == 1
print(os.environ["GOMP_SPINCOUNT"], os.environ["OPENBLAS_NUM_THREADS"], len(os.listdir("/proc/self/task")))
"""
    names = ("GOMP_SPINCOUNT", "OPENBLAS_NUM_THREADS")
    for given, expected in (({}, "1000 1 1"), ({"GOMP_SPINCOUNT": "7"}, "7 1 1")):
        env = {name: value for name, value in os.environ.items() if name not in names} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_threads_are_measured_again_when_the_neighbours_are_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured on empty slots, while no call runs."""
    load: list[float] = [3.0]
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0, 0))
    monkeypatch.setattr(threads, "busy_for_others", lambda: load[0] * time.monotonic())
    monkeypatch.setattr(threads, "LONG_STEP", 1000.0)
    memfd, core_bell, kernel_bell = make_channel(1 << 16, 1 << 16)
    os.close(kernel_bell)
    spec = ModelSpec("m", str(path), slots=4, ctx=512)
    loaded = loading.load(spec, lambda what, fraction: None)
    channel = Channel(memfd, core_bell, Side.KERNEL)
    core = Local(spec, Line(channel, "m"), loaded)
    assert loaded.threads.again
    assert "while others used" in core.stats()["threads_why"]
    core.measure_again()
    assert loaded.threads.again, "they are still there"
    load[0] = 0.0
    core.measure_again()
    assert not loaded.threads.again
    assert "on a quiet machine" in core.stats()["threads_why"]
    core.close()
    loaded.close()
    channel.close()


def generate(kernel: Kernel, key: link.CallKey, **sampling: Any) -> None:
    options = Sampling(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling})
    kernel.send(link.Submit(key, Generate(prompt="hello", sampling=options)))


def test_tokens_begin_with_the_start_token_on_request(tmp_path: Path) -> None:
    kernel = Kernel(tinymodels.write(tmp_path / "bos.gguf", d=8, layers=1, heads=1, kv_heads=1, ff=8, add_bos=True))
    kernel.of(link.Loaded)
    found = []
    for number, bos in enumerate((False, True)):
        kernel.send(ask(number, Sys.TOKENIZE, Tokenize("ab", bos=bos)))
        found.append(msgspec.msgpack.decode(kernel.of(link.Answered).body))
    assert found[1][1:] == found[0] != found[1]
    assert kernel.close() == 0


def test_life_of_a_core(kernel: Kernel) -> None:
    loaded = kernel.of(link.Loaded)
    assert any(isinstance(message, link.LoadProgress) for message in kernel.seen)
    wire.ModelInfo(name="m", default=True, **loaded.info)
    generate(kernel, (1, 1))
    finished = kernel.of(link.GenerationDone)
    assert finished.key == (1, 1)
    assert finished.usage.completion_tokens == 8
    kernel.send(ask(2, Sys.TOKENIZE, Tokenize("hi<|im_end|>", special=True)))
    tokens = msgspec.msgpack.decode(kernel.of(link.Answered).body)
    kernel.send(ask(3, Sys.DETOKENIZE, Detokenize(tokens)))
    assert msgspec.msgpack.decode(kernel.of(link.Answered).body) == "hi<|im_end|>"
    kernel.send(ask(4, Sys.EMBED, Embed(["a", "b"])))
    answer = kernel.of(link.Answered)
    body = msgspec.msgpack.decode(answer.body, type=wire.Embedded)
    vectors = np.frombuffer(body.data, "<f4").reshape(body.n, body.d)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert answer.prompt_tokens == 2
    kernel.send(link.GetStats(7))
    stats = kernel.of(link.Stats)
    assert stats.req == 7
    assert stats.stats["calls_finished"] == 1
    assert stats.stats["device"] == "CPU"
    kernel.send(link.Quit())
    assert kernel.process.wait(30) == 0


def test_vectors_of_one_agent_do_not_wait_for_all_those_of_another(kernel: Kernel) -> None:
    kernel.send(link.Schedule("fair", 64, 10.0, {}))
    kernel.send(ask(1, Sys.EMBED, Embed(["many words " * 20] * 60)))
    small = link.Caller(2, 0, "y", False, "")
    kernel.send(link.Ask((2, 1), small, Sys.EMBED, Raw(msgspec.msgpack.encode(Embed(["few"])))))
    assert kernel.of(link.Answered).key == (2, 1)
    kernel.send(link.Park(1, True, 7))
    assert kernel.of(link.Parked).number == 7
    kernel.send(link.Park(1, False))
    assert kernel.of(link.Answered).key == (1, 1)


def test_errors_have_errno_and_sentence(kernel: Kernel) -> None:
    kernel.send(ask(1, Sys.DETOKENIZE, Detokenize([1 << 30])))
    failed = kernel.of(link.Failed)
    assert failed.errno == errno.EINVAL
    assert "vocabulary" in failed.message
    kernel.send(ask(2, Sys.EMBED, Embed([""])))
    assert "texts[0]" in kernel.of(link.Failed).message


def test_hang_up_ends_a_busy_core(kernel: Kernel) -> None:
    generate(kernel, (1, 1), max_tokens=None)
    kernel.of(link.Step)
    assert kernel.close() == 0


def test_a_core_ignores_an_interrupt_from_the_terminal(kernel: Kernel) -> None:
    kernel.of(link.Loaded)
    kernel.process.send_signal(signal.SIGINT)
    generate(kernel, (1, 1))
    assert kernel.of(link.GenerationDone)


def test_more_output_than_the_ring_holds_arrives_whole(kernel: Kernel) -> None:
    """The kernel does not read for a while: the core goes on, and no message is lost or out of order."""
    kernel.of(link.Loaded)
    keys = [(1, i) for i in range(200)]
    for key in keys:
        kernel.send(link.Submit(key, Generate(prompt="hello", stream=True, sampling=Sampling(max_tokens=40, seed=1))))
    ends = {}
    while len(ends) < len(keys):
        finished = kernel.of(link.GenerationDone)
        ends[finished.key] = finished.offset + len(finished.tokens)
    assert list(ends) == keys or set(ends) == set(keys)


def test_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path / "missing.gguf")
    message = kernel.of(link.LoadFailed).message
    assert message == f"m: {tmp_path / 'missing.gguf'}: no such file (aiosd models lists what is on this machine)"
    assert kernel.close() == 1


def test_twice_the_same_token_is_an_assertion_of_llama_cpp(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes().replace(b"</tool_call>", b"<|im_start|>", 1))
    kernel = Kernel(damaged)
    assert "damaged: GGML_ASSERT" in kernel.of(link.LoadFailed).message
    assert kernel.close() == 1
    assert len(kernel.errors.splitlines()) == 1


def test_killed_core_leaves_its_trace(kernel: Kernel) -> None:
    kernel.of(link.Loaded)
    kernel.process.send_signal(signal.SIGABRT)
    assert kernel.close() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in kernel.errors
