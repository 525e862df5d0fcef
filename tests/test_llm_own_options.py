"""Options for RoPE, places of tensors and a chat template work as in llama.cpp, or are refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aiosd import config
from aiosd.commands.figures import label
from aiosd.config import keys
from aiosd.errors import AiosdError, UsageError
from aiosd.llm import llama, loading, placement, rope
from aiosd.llm.front import PREPARE, Front
from aiosd.llm.request import Prepared, Requests
from aiosd.llm.spec import Lora, ModelSpec
from libaios import wire
from libaios.home import Home
from tests import tinymodels
from tests.conftest import System

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "m.gguf", d=64, heads=2, ctx=512)


def load(path: Path, **options: Any) -> loading.LoadedModel:
    spec = ModelSpec("m", str(path), **{"threads": 1, "slots": 2, "ctx": 256, **options})
    return loading.load(spec, lambda what, fraction: None)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(AiosdError) as caught:
        load(path, **options).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── RoPE ──────────────────────────────────────────────────────────────────────────────────────────────────


def logits(path: Path, **options: Any) -> Any:
    """Logits of the last of some tokens with distant positions."""
    loaded = load(path, **options)
    batch = llama.BatchBuffer(24)
    batch.size = 24
    batch.tokens[:] = np.arange(24) * 11 + 5
    batch.positions[:] = np.arange(24)
    batch.wanted[-1] = 1
    assert loaded.context.decode(batch) == llama.OK
    found = loaded.context.logits(1)[0].copy()
    loaded.close()
    return found


def test_every_option_of_rope_changes_what_the_model_computes(path: Path) -> None:
    yarn: dict[str, Any] = {"rope_scaling": "yarn", "rope_freq_scale": 0.25}
    kinds: list[dict[str, Any]] = [
        {},
        {"rope_freq_base": 1e6},
        {"rope_scaling": "linear", "rope_freq_scale": 0.25},
        yarn,
        {**yarn, "yarn_orig_ctx": 128},
        {**yarn, "yarn_ext_factor": 0.5},
        {**yarn, "yarn_ext_factor": 0.0, "yarn_attn_factor": 2.0},
        {**yarn, "yarn_beta_fast": 2.0},
        {**yarn, "yarn_beta_slow": 0.5},
    ]
    found = [logits(path, **kind) for kind in kinds]
    same = [(i, j) for i in range(len(found)) for j in range(i) if np.allclose(found[i], found[j], atol=1e-4)]
    assert same == []
    assert np.array_equal(logits(path, rope_scaling="none"), found[0])


def test_options_of_rope_without_effect_are_refused(path: Path) -> None:
    assert "--yarn-beta-fast: only with --rope-scaling yarn, not with linear" in refusal(
        path, rope_scaling="linear", yarn_beta_fast=1.0
    )
    assert "--yarn-orig-ctx: only with --rope-scaling yarn, not with none" in refusal(path, yarn_orig_ctx=100)
    assert "--yarn-attn-factor: only with --yarn-ext-factor 0" in refusal(
        path, rope_scaling="yarn", yarn_attn_factor=2.0
    )
    assert "--rope-freq-scale: not together with --rope-scaling none" in refusal(
        path, rope_scaling="none", rope_freq_scale=0.5
    )


def test_a_stretched_model_has_longer_contexts(path: Path) -> None:
    assert "trained for 512 tokens" in refusal(path, ctx=1024)
    loaded = load(path, ctx=1024, rope_scaling="yarn", rope_freq_scale=0.5)
    assert loaded.ctx == 1024
    loaded.close()


def test_rope_is_described_as_it_was_set() -> None:
    assert rope.described(ModelSpec("m", "m")) == ""
    spec = ModelSpec("m", "m", rope_scaling="yarn", rope_freq_scale=0.25, yarn_orig_ctx=512)
    assert rope.described(spec) == "rope_scaling yarn, rope_freq_scale 0.25, yarn_orig_ctx 512"
    assert spec.rope == {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_orig_ctx": 512}


# ── where tensors lie ─────────────────────────────────────────────────────────────────────────────────────


def test_tensors_can_be_kept_in_main_memory(path: Path) -> None:
    usual = logits(path)
    placed = logits(path, override_tensor=((r"ffn_(up|down)", "CPU"),), cpu_moe=True, n_cpu_moe=1)
    assert np.allclose(usual, placed, atol=1e-4)


def test_overrides_that_cannot_be_are_refused(path: Path) -> None:
    assert "--override-tensor a=Moon: no such buffer; there are: CPU" in refusal(path, override_tensor=(("a", "Moon"),))
    assert "--override-tensor (a=CPU: missing )" in refusal(path, override_tensor=(("(a", "CPU"),))
    assert "zero-width assertion" in refusal(path, override_tensor=(("a(?P<x>b)", "CPU"),)), "Python alone has it"


def test_places_are_in_the_order_in_which_llama_cpp_looks() -> None:
    spec = ModelSpec("m", "m", override_tensor=(("x", "CPU"),), cpu_moe=True, n_cpu_moe=2)
    assert [pattern.partition("ffn")[0] for pattern, _ in placement.places(spec)] == [
        "x", r"\.", r"blk\.0\.", r"blk\.1\."
    ]  # fmt: skip


# ── chat template ─────────────────────────────────────────────────────────────────────────────────────────

OWN = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"


def template(tmp_path: Path, text: str) -> str:
    (tmp_path / "own.jinja").write_text(text)
    return str(tmp_path / "own.jinja")


def test_a_template_of_ones_own_is_used_also_for_long_texts(path: Path, tmp_path: Path) -> None:
    loaded = load(path, chat_template_file=template(tmp_path, OWN))
    model, request = loaded.model, wire.Generate(messages=HELLO)
    prepared = Requests(model, 256).prepare(request)
    assert model.text(prepared.prompt) == "[user|hello]"
    front = Front(str(path), 256, model.own_template)
    done: list[bytes] = []
    front.ask(1, PREPARE, wire.encode(request), done.append, lambda error: done.append(str(error).encode()))
    while front.busy:
        front.poll(0.1)
    front.close()
    loaded.close()
    assert msgspec.msgpack.decode(done[0], type=Prepared).prompt == prepared.prompt


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("one\n{% for m in messages %}\n{{ m.content }", "line 3: TemplateSyntaxError"),
        ("one\n\n{% nonsense %}", "line 3: TemplateSyntaxError: Encountered unknown tag 'nonsense'"),
        (" \n", "line 1: it is empty"),
    ],
)
def test_a_broken_template_is_refused_with_its_line(path: Path, tmp_path: Path, text: str, why: str) -> None:
    file = template(tmp_path, text)
    assert f"--chat-template-file {file}, {why}" in refusal(path, chat_template_file=file)


def test_a_template_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "No such file" in refusal(path, chat_template_file=str(tmp_path / "none"))
    assert "is not UTF-8" in refusal(path, chat_template_file=str(tmp_path / "binary"))


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_of_the_file_and_of_the_command_line(tmp_path: Path, path: Path) -> None:
    (tmp_path / "aiosd.toml").write_text(
        f"""[[model]]
        name = "one"
        path = "{path}"
        lora = ["sql=sql.gguf:0.5", "chat=/x/chat.gguf"]
        chat_template_file = "own.jinja"
        [[model]]
        name = "two"
        path = "{path}"
        rope_scaling = "yarn"
        override_tensor = ['exps=CPU']
        """
    )
    one, two = config.load({}, Home(tmp_path), tmp_path / "aiosd.toml", environ={}).models
    assert one.lora == (Lora("sql", f"{tmp_path}/sql.gguf", 0.5), Lora("chat", "/x/chat.gguf", 1.0))
    assert one.chat_template_file == f"{tmp_path}/own.jinja"
    assert (two.lora, two.rope_scaling, two.override_tensor) == ((), "yarn", (("exps", "CPU"),))
    flags = {"lora": (Lora("a", "x/a.gguf", 1.0),), "model": [f"m={path}"]}
    (model,) = config.load(flags, Home(tmp_path), environ={}, cwd="/here").models
    assert model.lora == (Lora("a", "/here/x/a.gguf", 1.0),)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("lora", "a", "not of the form NAME=PATH[:SCALE]"),
        ("lora", "a b=x", "'a b' is no name for an adapter"),
        ("lora", "a=x:0", "a scale of 0 is out of range"),
        ("lora", "a=x:1e9", "a scale of 1e9 is out of range"),
        ("lora", "a=x,a=y", "two adapters of one name"),
        ("override_tensor", "a", "not of the form PATTERN=BUFFER"),
        ("rope_scaling", "su", "'su' is none of none, linear, yarn, longrope"),
        ("rope_freq_scale", "0", "0 is out of range"),
        ("rope_freq_base", "nan", "'nan' is no number"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, name: str, value: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load({}, Home(tmp_path), environ={f"AIOSD_{name.upper()}": value})
    assert why in str(caught.value)


def test_a_path_may_have_a_colon() -> None:
    assert keys.BY_NAME["lora"].read("a=/x:y/z.gguf") == (Lora("a", "/x:y/z.gguf", 1.0),)
    assert keys.BY_NAME["lora"].read("a=/x:y/z.gguf:2") == (Lora("a", "/x:y/z.gguf", 2.0),)


def test_options_for_one_model_are_refused_with_several(tmp_path: Path, path: Path) -> None:
    for name, value in (("lora", (Lora("a", "a"),)), ("chat_template_file", "x")):
        with pytest.raises(UsageError, match="with 2 models, write it under"):
            config.load({name: value, "model": [f"a={path}", f"b={path}"]}, Home(tmp_path), environ={})


def test_status_shows_what_is_set_other_than_the_file_says(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    own = template(tmp_path, OWN)
    options = ["--chat-template-file", own, "--override-tensor", "ffn_up=CPU", "--override-tensor", "ffn_down=CPU"]
    options += ["--cpu-moe", "--rope-scaling", "yarn", "--rope-freq-scale", "0.5"]
    system = fresh_aiosd(*options, "--slots", "2")
    shown = system.run("aiosd", "status", "-v", check=True).stdout
    lines = dict(line.strip().split("  ", 1) for line in shown.splitlines() if "  " in line.strip())
    found = {name: lines[label(name)].strip() for name in ("chat_template", "rope", "tensors", "ctx_why", "runs")}
    assert found["chat_template"] == own
    assert found["rope"] == "rope_scaling yarn, rope_freq_scale 0.5"
    assert found["tensors"].startswith("ffn_up=CPU, ffn_down=CPU,")
    assert found["ctx_why"] == "all that the model was trained for"
    assert found["runs"].startswith("2 slots of 4096 tokens")
    assert os.path.isabs(found["chat_template"])
