"""Real quantised models: our attention is used, windows do not prevent sharing, `--exact` holds or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiosd.errors import UsageError
from aiosd.llm import llama, loading
from aiosd.llm.blob import StateLayout
from aiosd.llm.spec import ModelSpec
from tests import tinymodels
from tests.test_llm_engine import load


@pytest.fixture(params=["smollm2", "gemma3"])
def path(request: pytest.FixtureRequest) -> Path:
    llama.start()
    return Path(request.getfixturevalue(request.param))


@pytest.mark.skipif(not tinymodels.OWN_ATTENTION, reason="not for this processor")
def test_a_real_model_is_served_with_our_attention(path: Path) -> None:
    loaded = load(path)
    assert loaded.attention == "aiosd"
    loaded.close()


def test_its_state_can_be_cut(path: Path) -> None:
    loaded = load(path)
    assert StateLayout.of(loaded.context.sample()) is not None
    loaded.close()


def exact(path: Path) -> str:
    try:
        loading.load(ModelSpec("m", str(path), ctx=256, slots=4, threads=1, exact=True), lambda *_: None).close()
    except UsageError as refused:
        return str(refused)
    return ""


def test_exact_is_kept_or_refused(smollm2: Path, gemma3: Path) -> None:
    llama.start()
    assert exact(smollm2) == ""
    refused = exact(gemma3)
    if "avx512_vnni" in Path("/proc/cpuinfo").read_text():
        assert "not with this file (gemma3 270M Q4_K - Medium)" in refused
