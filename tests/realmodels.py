"""Real models that `make models` has fetched. A test that needs a missing one is skipped.

def test_something(smollm2: Path) -> None:      a chat model of 135 M parameters, Q4_1, ChatML, 2,048 tokens
def test_something(gemma3: Path) -> None:       a base model of 270 M, Q4_K_M, sliding windows, no template
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.models import MODELS


def needed(name: str) -> Path:
    path = MODELS[name].path
    if not path.exists():
        pytest.skip(f"{path} is not there: `make models ARGS={name}` fetches it")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return needed("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return needed("gemma3")
