"""A real base model with sliding windows, heads of 256 values and 262,144 words, through the whole system."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import System

AGENT = """
import json
import libaios as aios
r = aios.llm.complete("The capital of France is", max_tokens=6, temperature=0.0)
long = "The quick brown fox jumps over the lazy dog. " * 70  # more than the window of 512 tokens
again = [aios.llm.complete(long, max_tokens=8, temperature=0.0) for _ in range(2)]
turns = [("What is the capital of France?", "Paris."), ("And of Italy?", "Rome."), ("And of Spain?", "")]
roles = ("user", "assistant")
messages = [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair) if text]
chat = aios.llm.chat(messages, temperature=0.0, max_tokens=48)
print(json.dumps([chat.text, chat.finish_reason]))
print(json.dumps([r.text, r.usage.prompt_tokens, [one.text for one in again], again[0].usage.prompt_tokens]))
"""


def test_a_base_model_goes_on_with_a_text(gemma3: Path, fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd("--model", f"gemma={gemma3}", "--slots", "2", "--ctx", "1024", "--threads", "1")
    (tmp_path / "agent.py").write_text(AGENT)
    done = system.run("aios-run", tmp_path / "agent.py", timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    answer, rest = map(json.loads, done.stdout.splitlines())
    assert answer == ["Madrid.", "stop"], "without a chat template: its turn ends all the same"
    text, tokens, (first, second), long = rest
    assert "capital" in text  # without the token that begins a text it answers in circles of two tokens
    assert tokens == 6  # with the token that begins a text
    assert long > 600
    assert "fox" in first + second
    (model,) = system.status()["models"]
    assert model["info"]["n_vocab"] == 262_144
    assert system.unrest() == []
