"""The numbers of slots and of tokens per slot, where the user sets none: as many as model and memory permit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.errors import UsageError
from aiosd.llm import room
from aiosd.llm.modelfile import ModelFile
from aiosd.llm.room import AUTO_SLOTS, FEW, GOOD_CTX, MOST_CTX
from aiosd.llm.spec import ModelSpec

GIB = 1 << 30


def file(trained: int = 131_072, per_token: int = 23_040, size: int = 100 << 20) -> ModelFile:
    """A model with this many bytes of keys and values for each token."""
    meta = {"general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count_kv": 1,
            "llama.attention.key_length": per_token // 4, "llama.attention.value_length": per_token // 4,
            "llama.context_length": trained}  # fmt: skip
    return ModelFile("m.gguf", size, {key: value for key, value in meta.items() if value})


def choose(found: ModelFile, free: int, **options: Any) -> room.CacheSize:
    return room.choose(ModelSpec("m", "m.gguf", **options), found, free)


@pytest.mark.parametrize(
    ("found", "free", "ctx", "slots", "why"),
    [
        (file(trained=2048), 20 * GIB, 2048, 32, "all that the model was trained for"),
        (file(trained=8192), 20 * GIB, 8192, 28, "all that the model was trained for"),
        (file(trained=8192), 4 * GIB, 8192, 5, "all that the model was trained for"),
        (file(), 20 * GIB, 8192, 28, "32 slots of 16384 tokens need 11.2 GiB, more than the 5.0 GiB for slots"),
        (file(), 1024 * GIB, 16384, 32, "32 slots of 32768 tokens need 22.5 GiB, more than the 16.0 GiB for slots"),
        (file(per_token=8192), 1024 * GIB, MOST_CTX, 32, "the most without --ctx; trained for 131072"),
        (file(per_token=131_072, size=5 * GIB), 12 * GIB, 4096, 3, "2 slots of 8192 tokens need 2.0 GiB"),
        (file(per_token=131_072, size=5 * GIB), 6 * GIB, 2048, 1, "2 slots of 4096 tokens need 1.0 GiB"),
        (file(trained=1000), 20 * GIB, 1000, 32, "all that the model was trained for"),
        (file(trained=0), 20 * GIB, 8192, 28, "it is not known for how many the model was trained"),
    ],
)
def test_as_many_tokens_as_model_and_memory_allow(found: ModelFile, free: int, ctx: int, slots: int, why: str) -> None:
    chosen = choose(found, free)
    assert (chosen.ctx, chosen.slots) == (ctx, slots)
    assert chosen.why.startswith(why)


def test_what_is_given_is_kept() -> None:
    assert choose(file(), 20 * GIB, ctx=3000) == room.CacheSize(3000, 32, "asked for")
    assert choose(file(), 20 * GIB, slots=4).ctx == MOST_CTX, "fewer slots hold more each"
    assert choose(file(), 20 * GIB, slots=200).slots == 200
    assert choose(file(), 20 * GIB, kv_memory=400 << 20).ctx == GOOD_CTX
    assert choose(file(), 20 * GIB, kv_memory=400 << 20).slots == 2
    with pytest.raises(UsageError, match="--ctx 9000: the model was trained for 8192"):
        choose(file(trained=8192), 20 * GIB, ctx=9000)


def test_a_stretched_model_has_room_for_more() -> None:
    stretched = {"rope_scaling": "yarn", "rope_freq_scale": 0.25}
    assert choose(file(trained=2048), 200 * GIB, **stretched).ctx == 8192
    assert choose(file(trained=2048), 20 * GIB, ctx=8192, **stretched).ctx == 8192
    with pytest.raises(UsageError, match=r"trained for 2048 tokens, 8192 with --rope-freq-scale 0\.25"):
        choose(file(trained=2048), 20 * GIB, ctx=8193, **stretched)
    assert choose(file(trained=2048), 20 * GIB, ctx=9000, rope_freq_base=1e6).ctx == 9000, "the user knows"


@given(
    trained=st.integers(0, 300_000),
    per_token=st.sampled_from([1024, 23_040, 131_072, 1 << 20]),
    free=st.integers(0, 300 * GIB),
    slots=st.none() | st.integers(1, 256),
)
@settings(max_examples=300, deadline=None)
def test_memory_is_never_exceeded_for_more_than_the_least(
    trained: int, per_token: int, free: int, slots: int | None
) -> None:
    found = file(trained=trained, per_token=per_token)
    chosen = choose(found, free, slots=slots)
    budget = min(max(free - found.size, 0) // room.PART, room.MOST_BYTES)
    assert 0 < chosen.ctx <= min(trained or GOOD_CTX, MOST_CTX)
    taken = chosen.slots * found.kv_bytes_per_slot(chosen.ctx)
    assert taken <= budget or chosen.ctx <= 2048
    if trained >= GOOD_CTX and (slots or FEW) * found.kv_bytes_per_slot(GOOD_CTX) <= budget:
        assert chosen.ctx >= GOOD_CTX, "tokens that agents need"
    if chosen.ctx > GOOD_CTX:
        assert chosen.slots == (slots or AUTO_SLOTS), "more tokens than agents need, for fewer slots"
