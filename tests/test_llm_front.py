"""Work on text in a process of its own: it has the same results as in the core, and the core survives its faults."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiosd.ipc import link
from aiosd.llm import front as fronts
from aiosd.llm import llama
from aiosd.llm.chat import ChatTemplate
from aiosd.llm.document import Later
from aiosd.llm.front import CONVERSATION, PREPARE, TEXTS, TOKENIZE, Front
from aiosd.llm.request import Prepared, Requests
from libaios import wire
from libaios.wire import CloseContext, Embed, Generate, Sampling, SaveContext, Sys, Tokenize
from tests import tinymodels
from tests.pace import cheap
from tests.test_llm_core import Kernel, ask, kernel, path  # noqa: F401 (fixtures)

HANGS = [sys.executable, "-c", "import time; time.sleep(1000)"]
USER = {"role": "user", "content": "hello " * 9000}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string", "pattern": "^a+$"}}}}
#: A schema that takes the converter long.
LARGE = {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": i} for i in range(40)}}] * 60}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write_family(tmp_path_factory.mktemp("gguf") / "qwen.gguf", "qwen3")


@pytest.fixture
def front(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """The folder in which aiosd is started has a module with the name of one of the standard library."""
    (tmp_path / "json.py").write_text("raise SystemExit('another json')")
    monkeypatch.chdir(tmp_path)
    front = Front(str(gguf), 1 << 17)
    yield front
    front.close()


class Answers:
    """The results of the jobs, in order."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.all: list[tuple[Any, Any]] = []

    def ask(self, key: int, kind: str, request: Any) -> None:
        self.front.ask(
            (key, 1),
            kind,
            wire.encode(request),
            lambda result: self.all.append((key, result)),
            lambda error: self.all.append((key, error)),
        )

    def wait(self, count: int) -> list[tuple[Any, Any]]:
        deadline = time.monotonic() + 60
        while len(self.all) < count:
            assert time.monotonic() < deadline
            self.front.poll(0.5)
        return self.all


REQUESTS = [
    Generate(messages=[USER]),
    Generate(messages=[USER], tools=[TOOL], tool_choice="required", parallel_tool_calls=False),
    Generate(messages=[USER], schema=LARGE, template_args={"enable_thinking": True}),
    Generate(prompt="a text"),
    Generate(messages=[USER], sampling=Sampling(stop=["x"])),
]


def test_a_request_is_prepared_as_the_core_would(front: Front, gguf: Path) -> None:
    model = llama.Model(str(gguf), 0, lambda fraction: None)
    requests = Requests(model, 1 << 17)
    answers = Answers(front)
    for i, request in enumerate(REQUESTS):
        answers.ask(i, PREPARE, request)
    for i, (key, result) in enumerate(answers.wait(len(REQUESTS))):
        assert key == i
        assert msgspec.msgpack.decode(result, type=Prepared) == requests.prepare(REQUESTS[i])
    model.close()


def test_the_core_gives_long_work_to_the_front_process(gguf: Path) -> None:
    model = llama.Model(str(gguf), 0, lambda fraction: None)
    requests = Requests(model, 1 << 17)
    short = [{"role": "user", "content": "hello"}]
    requests.prepare(Generate(messages=short, tools=[TOOL]), quick=True)
    for request in (Generate(messages=[USER]), Generate(messages=short, schema=LARGE)):
        with pytest.raises(Later):
            requests.prepare(request, quick=True)
    model.close()


def test_a_refusal_comes_back_as_one(front: Front) -> None:
    answers = Answers(front)
    answers.ask(1, PREPARE, Generate(messages=[{"role": "user", "content": 5}]))
    answers.ask(2, TOKENIZE, Tokenize("hello"))
    (_, refused), (_, tokens) = answers.wait(2)
    assert refused.errno == errno.EINVAL
    assert "messages[0].content" in refused.strerror
    assert msgspec.msgpack.decode(tokens)


def test_a_text_begins_with_the_start_token_on_request(tmp_path: Path) -> None:
    file = tinymodels.write(tmp_path / "bos.gguf", d=8, layers=1, heads=1, kv_heads=1, ff=8, add_bos=True)
    model = llama.Model(str(file), 0, lambda fraction: None)
    front = Front(str(file), 1 << 17)
    answers = Answers(front)
    for number, bos in enumerate((False, True)):
        answers.ask(number, TOKENIZE, Tokenize("ab", bos=bos))
    plain, begun = (msgspec.msgpack.decode(tokens) for _, tokens in answers.wait(2))
    assert begun == [model.bos, *plain]
    front.close()
    model.close()


def test_one_that_hangs_is_killed_and_the_next_job_is_done(gguf: Path) -> None:
    now = [0.0]
    front = Front(str(gguf), 4096, clock=lambda: now[0], command=HANGS)
    answers = Answers(front)
    answers.ask(1, PREPARE, REQUESTS[3])
    answers.ask(2, PREPARE, REQUESTS[3])
    front.poll()
    assert not answers.all
    hung = front.pid
    front._command = Front(str(gguf), 4096)._command
    now[0] += fronts.MAX_SECONDS + 1
    (_, failed), (_, result) = answers.wait(2)
    assert failed.errno == errno.EIO
    assert "more than 60 s" in failed.strerror
    assert isinstance(result, bytes)
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    front.close()


#: Loops whose bodies call no function, and steps that take long.
LOOPS = {
    "nested": "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}",
    "filtered": "{% for m in messages %}{% for n in messages if n is none %}{% endfor %}{% endfor %}",
    "letters": "{% for m in messages %}{% for c in m.content * 99 %}{% endfor %}{% endfor %}",
    "searching": "{% for m in messages %}{% if {'a': 1} in messages %}{% endif %}{% endfor %}",
}
MANY = [{"role": "user", "content": "hello"}] * 20_000


@pytest.mark.parametrize("loop", LOOPS)
def test_no_loop_of_a_template_blocks_the_core(loop: str) -> None:
    template = ChatTemplate(LOOPS[loop] + "ok", "", "")
    template.quick = True

    def leave() -> None:
        with pytest.raises(Later):
            template.render(MANY, [])

    cheap(5, leave)  # without a limit it would run for minutes
    template.quick = False
    assert template.render(MANY[:10], []) == "ok"


def test_loop_variables_are_right() -> None:
    shown = "{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }} "
    text = "{% for m in messages %}" + shown + "{% endfor %}"
    assert ChatTemplate(text, "", "").render(MANY[:2], []) == "1/2FalseFalse 2/2TrueTrue "


def test_one_that_is_stuck_in_a_template_is_killed_and_costs_one_call(gguf: Path) -> None:
    now = [0.0]
    stuck = "{% if messages | length > 1 %}" + LOOPS["searching"] * 99 + "{% endif %}ok"
    front = Front(str(gguf), 4096, stuck, clock=lambda: now[0])
    answers = Answers(front)
    answers.ask(1, PREPARE, Generate(messages=MANY))
    answers.ask(2, PREPARE, Generate(messages=MANY[:1]))
    front.poll(0.5)
    assert not answers.all
    hung = front.pid
    now[0] += fronts.MAX_SECONDS + 1
    (_, failed), (_, result) = answers.wait(2)
    assert failed.errno == errno.EIO
    assert "more than 60 s" in failed.strerror
    assert isinstance(result, bytes)
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    front.close()


def test_one_that_dies_costs_one_call(front: Front) -> None:
    answers = Answers(front)
    answers.ask(1, PREPARE, REQUESTS[0])
    os.kill(front.pid, signal.SIGKILL)
    answers.ask(2, PREPARE, REQUESTS[3])
    (_, failed), (_, result) = answers.wait(2)
    assert failed.errno == errno.EIO
    assert "died" in failed.strerror
    assert isinstance(result, bytes)


def test_a_cancelled_job_is_not_waited_for(gguf: Path) -> None:
    now = [0.0]
    front = Front(str(gguf), 4096, clock=lambda: now[0], command=HANGS)
    answers = Answers(front)
    for key in (1, 2, 3):
        answers.ask(key, PREPARE, REQUESTS[3])
    front.cancel(lambda key: key[0] in (1, 2))
    front._command = Front(str(gguf), 4096)._command
    now[0] += fronts.CANCELLED_SECONDS + 1
    assert [key for key, _ in answers.wait(1)] == [3]
    front.close()


def test_generations_go_on_while_a_long_text_is_worked_on(kernel: Kernel) -> None:  # noqa: F811
    """The stream goes on while the text is being tokenized, with the right result."""
    kernel.of(link.Loaded)
    text = "hello there " * 100_000
    options = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
    kernel.send(link.Submit((1, 1), Generate(prompt="hello", sampling=options, stream=True)))
    kernel.send(ask(2, Sys.TOKENIZE, Tokenize(text)))
    kernel.send(link.Submit((1, 3), Generate(prompt="hello", schema=LARGE, sampling=Sampling(max_tokens=5))))
    finished = kernel.until(lambda message: isinstance(message, link.GenerationDone) and message.key == (1, 1))
    assert len(finished.tokens) or finished.offset
    assert not any(isinstance(message, link.Answered) for message in kernel.seen), "the front has just been started"
    answered = kernel.of(link.Answered)
    assert len(msgspec.msgpack.decode(answered.body)) > 100_000
    assert kernel.until(lambda message: isinstance(message, link.GenerationDone)).key == (1, 3)
    assert kernel.close() == 0
    assert kernel.errors == ""


def test_long_texts_of_contexts_and_embeddings_block_nothing(path: Path) -> None:  # noqa: F811
    """Their template and their tokens are made by the front process, too: the stream ends before it has started."""
    outside = Kernel(path, ctx=4096)
    outside.of(link.Loaded)
    long = [{"role": "user", "content": "hello there " * 20_000}]
    options = Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
    outside.send(link.Submit((1, 1), Generate(prompt="hello", sampling=options, stream=True)))
    outside.send(ask(2, Sys.EMBED, Embed(["a", "hello there " * 20_000])))
    outside.send(ask(3, Sys.CTX_CLOSE, CloseContext(long)))
    outside.send(ask(4, Sys.CTX_SAVE, SaveContext("x", long)))
    outside.until(lambda message: isinstance(message, link.GenerationDone) and message.key == (1, 1))
    assert not [message for message in outside.seen if isinstance(message, link.Answered | link.Failed)]
    failed = outside.until(lambda message: isinstance(message, link.Failed) and message.key == (1, 2))
    assert (failed.errno, failed.message.split(":")[0]) == (errno.EMSGSIZE, "texts[1]")
    assert outside.of(link.Answered).key == (1, 3)
    assert outside.of(link.Failed).errno == errno.ENOSYS, "this core has no folder for contexts"
    assert outside.close() == 0


def test_long_texts_become_what_short_ones_do(front: Front, gguf: Path) -> None:
    model = llama.Model(str(gguf), 0, lambda fraction: None)
    requests = Requests(model, 1 << 17)
    answers = Answers(front)
    answers.ask(1, TEXTS, ["hello", "hello there"])
    answers.ask(2, CONVERSATION, ([USER], [TOOL]))
    (_, texts), (_, tokens) = answers.wait(2)
    assert msgspec.msgpack.decode(texts) == [
        model.tokenize(text, bos=True, special=False) for text in ("hello", "hello there")
    ]
    assert msgspec.msgpack.decode(tokens) == requests.conversation([USER], [TOOL])
    with pytest.raises(Later):
        Requests(model, 1 << 17).conversation([USER], None, quick=True)
    model.close()
