"""Contexts: chat, fork, save and restore by agents and across a restart; and the files in which they are saved."""

from __future__ import annotations

import errno
import select
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import Raw

from aiosd.ipc import link
from aiosd.llm.blob import StatePiece
from aiosd.llm.library import Library
from aiosd.llm.saved import MAGIC, Saved, file_sha256
from aiosd.llm.spec import ModelSpec
from libaios.wire import Sys
from tests.conftest import System, eventually

HEADER = """
import errno, sys, time
import libaios as aios
llm = aios.llm
LONG = [{"role": "system", "content": "You are a helpful agent. " * 30}]
GREEDY = {"max_tokens": 12, "temperature": 0.0}
"""


def agent(system: System, tmp_path: Path, code: str, **options: Any) -> str:
    path = tmp_path / "agent.py"
    path.write_text(HEADER + textwrap.dedent(code))
    done = system.run("aios-run", path, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def ask(aiosd: System, tmp_path: Path) -> Callable[[str], str]:
    return lambda code: agent(aiosd, tmp_path, code)


Ask = Callable[[str], str]


def test_a_context_gives_the_same_answers_as_chats_with_all_messages(ask: Ask) -> None:
    ask("""
        ctx = llm.context(LONG)
        first = ctx.chat("What is 12 * 3?", **GREEDY)
        second = ctx.chat([{"role": "user", "content": "hello"}], **GREEDY)
        assert [m["role"] for m in ctx.messages] == ["system", "user", "assistant", "user", "assistant"]
        assert ctx.messages[2]["content"] == first.text
        assert second.usage.cached_tokens > first.usage.prompt_tokens, (first.usage, second.usage, first.tokens)
        assert llm.chat(ctx.messages[:-1], **GREEDY).text == second.text
    """)


def test_forks_are_independent_and_share_their_beginning(ask: Ask) -> None:
    ask("""
        ctx = llm.context(LONG)
        ctx.chat("hello", **GREEDY)
        twins = [ctx.fork() for _ in range(5)]
        used = [twin.chat(f"What is {i} + 1?", max_tokens=40, temperature=0.0).usage for i, twin in enumerate(twins)]
        assert all(u.prompt_tokens - u.cached_tokens < 40 for u in used), used
        assert len(ctx) == 3 and {len(twin) for twin in twins} == {5}
        assert len({twin.messages[-1]["content"] for twin in twins}) > 1
    """)


def test_a_stream_is_kept_when_it_ends_and_a_failure_changes_nothing(ask: Ask) -> None:
    ask("""
        ctx = llm.context(LONG)
        text = "".join(piece.text for piece in ctx.chat("hello", stream=True, **GREEDY))
        assert ctx.messages[-1] == {"role": "assistant", "content": text}
        for piece in ctx.chat("again", stream=True, max_tokens=40, ignore_eos=True):
            break
        try:
            ctx.chat("x" * 100_000)
        except OSError as error:
            assert error.errno == errno.EMSGSIZE
        assert len(ctx) == 3
    """)


def test_a_closed_context_is_not_kept_and_can_be_used_again(ask: Ask) -> None:
    ask("""
        with llm.context([{"role": "system", "content": "Only this test says so. " * 30}]) as ctx:
            ctx.chat("hello", **GREEDY)
        assert ctx.chat("still here", **GREEDY).usage.cached_tokens < 20
    """)


def test_a_saved_context_outlives_aiosd_and_fits_another_number_of_slots(
    fresh_aiosd: Callable[..., System], tmp_path: Path
) -> None:
    system = fresh_aiosd("--threads", "1", "--slots", "4")
    agent(
        system,
        tmp_path,
        """
        ctx = llm.context(LONG)
        ctx.chat("hello", **GREEDY)
        saved = ctx.save("my-notes")
        assert saved.tokens > 100 and saved.bytes > 10_000
        assert [s.name for s in llm.saved()] == ["my-notes"]
    """,
    )
    assert system.stop() == 0
    system.options = ("--threads", "1", "--slots", "2")
    system.start()
    agent(
        system,
        tmp_path,
        """
        ctx = llm.restore("my-notes")
        assert [m["role"] for m in ctx.messages] == ["system", "user", "assistant"]
        usage = ctx.chat("again", **GREEDY).usage
        assert usage.cached_tokens > 100 and usage.prompt_tokens - usage.cached_tokens < 30, usage
        assert llm.forget("my-notes") and not llm.forget("my-notes")
        try:
            llm.restore("my-notes")
        except FileNotFoundError as error:
            assert "my-notes" in str(error)
        else:
            raise AssertionError("there is one still")
    """,
    )


def test_saved_contexts_belong_to_a_group(aiosd: System, tmp_path: Path) -> None:
    path = tmp_path / "save.py"
    path.write_text(HEADER + 'llm.context(LONG).save("ours")\nprint([s.name for s in llm.saved()])')
    other = tmp_path / "other.py"
    other.write_text(HEADER + 'print([s.name for s in llm.saved()])\nprint(llm.forget("ours"))')
    assert aiosd.run("aios-run", "-g", "red", path).stdout == "['ours']\n"
    assert aiosd.run("aios-run", "-g", "blue", other).stdout == "[]\nFalse\n"
    assert aiosd.run("aios-run", "-g", "red", other).stdout == "['ours']\nTrue\n"


def test_a_full_disk_is_an_error_and_the_old_file_stays(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", "--slots", "2", start=False)
    system.home.mkdir(exist_ok=True)
    where = system.home / "data" / "contexts"
    where.mkdir(parents=True)
    if system.run("mount", "-t", "tmpfs", "-o", "size=200k", "none", where).returncode:
        pytest.skip("may not mount here")
    try:
        system.start()
        agent(
            system,
            tmp_path,
            """
            small = llm.context([{"role": "user", "content": "hi"}])
            small.save("a")
            big = llm.context(LONG * 5)
            big.chat("hello", **GREEDY)
            try:
                big.save("a")
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
            else:
                raise AssertionError("there was room")
            assert len(llm.restore("a")) == 1
            assert [s.name for s in llm.saved()] == ["a"]
        """,
        )
        assert system.stop() == 0
    finally:
        system.run("umount", where)


def test_ps_shows_where_a_context_lies(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", "--slots", "1")
    path = tmp_path / "keep.py"
    path.write_text(
        HEADER + 'llm.chat([{"role": "user", "content": sys.argv[1] * 40}], max_tokens=2)\n'
        'print("said", flush=True)\naios.msg.recv()\n'
    )
    for word in ("one ", "two "):
        agent = system.popen("aios-run", "--name", word.strip(), path, word)
        assert agent.stdout is not None
        assert agent.stdout.readline() == "said\n"
    assert eventually(lambda: [p["ctx_place"] for p in system.agents()] == ["ram", "slot"])
    assert all(p["ctx_kept"] > 40 for p in system.agents())
    assert "/ram" in system.run("aios-ps").stdout


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────

MESSAGES = [{"role": "user", "content": "hi"}]
TOKENS = np.arange(10, dtype=np.int32)


def piece() -> StatePiece:
    return StatePiece(np.arange(80, dtype=np.uint8), 10)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files = Saved(str(tmp_path), {"model": "a"})
    written = files.write("g", "../x y", MESSAGES, TOKENS, piece())
    assert [path.parent.parent for path in tmp_path.rglob("*.ctx")] == [tmp_path], "a name stays in its folder"
    opened = files.read("g", "../x y")
    assert opened.messages == MESSAGES
    assert opened.tokens.tolist() == TOKENS.tolist()
    assert opened.piece is not None
    assert opened.piece.data.tolist() == piece().data.tolist()
    listed = files.list("g")
    assert listed == [written]
    assert (written.name, written.tokens) == ("../x y", 10)
    assert abs(written.created - time.time()) < 60
    assert files.list("h") == []


def test_a_file_that_a_dead_core_has_half_written_is_removed(tmp_path: Path) -> None:
    files = Saved(str(tmp_path), {})
    files.write("g", "n", MESSAGES, TOKENS, piece())
    half = files.path("g", "n").with_name(".n.ctx.999999999")  # Linux gives no such pid
    half.write_bytes(b"half")
    files.write("g", "m", MESSAGES, TOKENS, piece())
    assert sorted(path.name for path in half.parent.iterdir()) == ["m.ctx", "n.ctx"]


def test_the_signature_is_of_the_model_in_memory_not_of_a_file_that_replaced_it(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"the one that was loaded")
    library = a_library(model, tmp_path / "saved")
    model.write_bytes(b"another")
    assert library._files()._fits["model"] != file_sha256(str(model))
    library.close()


def test_the_signature_covers_every_part_of_a_split_model(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(part.name.encode())
    before = file_sha256(str(parts[0]))
    library = a_library(parts[0], tmp_path / "saved")
    parts[1].write_bytes(b"another")
    assert file_sha256(str(parts[0])) != before
    assert library._files()._fits["model"] not in (before, file_sha256(str(parts[0])))
    library.close()


def test_a_bug_in_one_call_fails_that_call_only(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    failed: list[OSError] = []
    library = a_library(tmp_path / "m.gguf", tmp_path, lambda _, error: failed.append(error))
    library._saved = object()  # type: ignore[assignment]
    library.handle(link.Ask((1, 1), link.Caller(1, 0, "x", False, "g"), Sys.CTX_LIST, Raw(b"\xc0")), None)
    assert select.select(library.fds(), [], [], 30)[0], "the core is woken when the thread is done"
    library.poll()
    assert [error.errno for error in failed] == [errno.EIO]
    assert library.fds() == []
    library.close()


def a_library(model: Path, folder: Path, fail: Any = None) -> Library:
    nothing: Any = None
    spec = ModelSpec("m", str(model), folder=str(folder))
    return Library(spec, SimpleNamespace(store=None), nothing, fail)  # type: ignore[arg-type]


def test_state_of_another_model_is_refused_and_the_messages_are_not(tmp_path: Path) -> None:
    Saved(str(tmp_path), {"model": "a"}).write("g", "n", MESSAGES, TOKENS, piece())
    opened = Saved(str(tmp_path), {"model": "b"}).read("g", "n")
    assert (opened.piece, opened.messages) == (None, MESSAGES)
    assert opened.refused == "it was saved under another model"


@pytest.mark.parametrize("place", [0, 3, 9, 14, 30, 200, -1, -60, -100])
def test_all_damage_is_detected(tmp_path: Path, place: int) -> None:
    files = Saved(str(tmp_path), {"model": "a"})
    files.write("g", "n", MESSAGES, TOKENS, piece())
    path = files.path("g", "n")
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)
    try:
        opened = files.read("g", "n")
    except OSError as error:
        said = str(error)
    else:
        said = f"[Errno 5] n: {opened.refused}"
        assert opened.messages == MESSAGES
        assert opened.piece is None
    assert said.startswith("[Errno 5] n: ")
    assert "damaged" in said or "another release" in said


def test_a_short_file_is_damaged_and_a_newer_format_is_another_release(tmp_path: Path) -> None:
    files = Saved(str(tmp_path), {})
    files.write("g", "n", MESSAGES, TOKENS, piece())
    path = files.path("g", "n")
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    assert files.read("g", "n").refused == "its state is damaged"
    path.write_bytes(data[:20])
    with pytest.raises(OSError, match="damaged"):
        files.read("g", "n")
    path.write_bytes(MAGIC[:-1] + b"9" + data[8:])
    with pytest.raises(OSError, match="another release"):
        files.read("g", "n")
    assert files.list("g") == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Saved(str(tmp_path), {})
    files.write("g", "n", MESSAGES, TOKENS, piece())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write("g", "n", [], TOKENS, None)
    assert files.read("g", "n").messages == MESSAGES
    assert len(list(tmp_path.rglob("*"))) == 2, "a folder and a file"
