"""A model that cannot be served is refused with one line, whatever is wrong with it; what is asked for is kept."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiosd.errors import AiosdError, UsageError
from aiosd.llm import llama, loading, modelfile
from aiosd.llm.attention import Attention, Unavailable
from aiosd.llm.blob import StateLayout
from aiosd.llm.embed import EmbeddingEngine
from aiosd.llm.spec import ModelSpec
from tests import tinymodels


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.start()
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", d=32, layers=1, heads=2, kv_heads=1, ff=32)


def spec(path: Path, **options: Any) -> ModelSpec:
    return ModelSpec("m", str(path), **{"threads": 1, "slots": 2, "ctx": 256, **options})


def load(path: Path, **options: Any) -> loading.LoadedModel:
    return loading.load(spec(path, **options), lambda what, fraction: None)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(AiosdError) as caught:
        load(path, **options).close()
    message = str(caught.value)
    assert "\n" not in message
    return message


def damaged(path: Path, tmp_path: Path, data: bytes) -> Path:
    other = tmp_path / "damaged.gguf"
    other.write_bytes(data)
    return other


def test_progress_reaches_one(path: Path) -> None:
    seen: list[tuple[str, float]] = []
    loaded = loading.load(spec(path, threads=None), lambda what, fraction: seen.append((what, fraction)))
    loaded.close()
    assert ("loading", 1.0) in seen
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert 1 <= loaded.threads.number <= len(os.sched_getaffinity(0))


def test_info_has_the_fields_of_the_contract(path: Path) -> None:
    from libaios.wire import ModelInfo

    loaded = load(path)
    info = ModelInfo(name="m", default=True, **loaded.info(chat=True, tools=True))
    loaded.close()
    assert (info.n_ctx, info.n_slots, info.gpu_layers) == (256, 2, 0)
    assert loaded.device == "CPU"


def test_gpu_layers_without_a_gpu_are_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama, "supports_gpu", lambda: False)
    loaded = load(path, gpu_layers=5)
    loaded.close()
    assert "--gpu-layers 5: this llama.cpp was built without a GPU" in caplog.text


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.gguf")


def test_folder_and_unreadable(tmp_path: Path) -> None:
    assert "directory" in refusal(tmp_path)


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    assert "not a GGUF model" in refusal(damaged(tmp_path, tmp_path, b"PK\x03\x04" + bytes(100)))
    assert "not a GGUF model" in refusal(damaged(tmp_path, tmp_path, b""))


def test_future_version(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 9)
    assert "version 9" in refusal(damaged(path, tmp_path, bytes(data)))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_cut_off_file(path: Path, tmp_path: Path, share: float) -> None:
    data = path.read_bytes()
    message = refusal(damaged(path, tmp_path, data[: int(len(data) * share)]))
    assert "cut off" in message or "corrupted or incomplete" in message or "not a GGUF" in message


def test_unknown_architecture(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes().replace(b"llama", b"lamma")
    assert "lamma" in refusal(damaged(path, tmp_path, data))


def test_larger_than_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)
    assert "too large for the memory" in refusal(path)


def test_kv_cache_larger_than_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: path.stat().st_size + 10_000)
    assert "use a smaller --ctx or --slots" in refusal(path)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ctx": 100_000}, "--ctx 100000: the model was trained for 4096"),
        ({"ctx": 3}, "--ctx 3"),
        ({"slots": 0}, "--slots 0"),
        ({"slots": 257}, "between 1 and 256"),
        ({"slots": 256, "exact": True}, "between 1 and 255"),
        ({"threads": 0}, "--threads 0"),
        ({"exact": True, "gpu_layers": -1}, "--exact"),
        ({"exact": True, "flash_attention": "on"}, "--flash-attention on"),
        ({"kv_memory": 1000}, "more than the 0 MiB allowed"),
        ({"kv_memory": 1000, "slots": None}, "one slot needs"),
    ],
)
def test_options_are_honoured_or_refused(path: Path, options: dict[str, Any], why: str) -> None:
    assert why in refusal(path, **options)


def unavailable(self: Attention, *args: object) -> None:
    raise Unavailable("for a test")


@pytest.mark.parametrize(
    ("heads", "options", "on"),
    [
        (1, {"slots": 8}, True),
        (1, {"slots": 9, "ctx": 1024}, False),
        (1, {"slots": 9, "ctx": 512}, True),
        (2, {"slots": 1}, False),
        (1, {"slots": 1, "exact": True}, False),
        (1, {"slots": 1, "flash_attention": "off"}, False),
        (2, {"slots": 9, "flash_attention": "on"}, True),
    ],
)
def test_a_few_slots_and_wide_heads_get_flash_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, options: dict[str, Any], on: bool
) -> None:
    monkeypatch.setattr(Attention, "__init__", unavailable)
    path = tinymodels.write(tmp_path / "wide.gguf", d=64, heads=heads, kv_heads=1)
    loaded = load(path, **options)
    loaded.close()
    assert loaded.flash_attention is on


#: Which code llama.cpp takes for K-quants depends on the processor; with AVX-512 it is known to change with the rows.
k_quants = pytest.mark.skipif("avx512_vnni" not in Path("/proc/cpuinfo").read_text(), reason="may be exact here")


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("Q4_0", True),
        ("Q4_1", True),
        ("Q8_0", True),
        pytest.param("Q4_K", False, marks=k_quants),
        pytest.param("Q6_K", False, marks=k_quants),
    ],
)
@pytest.mark.parametrize("slots", [1, 12])
def test_exact_is_refused_where_a_row_depends_on_the_others(tmp_path: Path, kind: str, fits: bool, slots: int) -> None:
    plain = tinymodels.write(tmp_path / "m.gguf", d=256, heads=4, kv_heads=2, ff=512, layers=4)
    path = tinymodels.quantise(plain, kind)
    if fits:
        load(path, exact=True, slots=slots).close()
    else:
        assert "--exact: not with this file" in refusal(path, exact=True, slots=slots)


def test_slots_follow_from_the_memory(path: Path) -> None:
    per_slot = modelfile.read(str(path)).kv_bytes_per_token() * 256
    loaded = load(path, slots=None, kv_memory=5 * per_slot + 1)
    loaded.close()
    assert loaded.slots == 5
    assert loaded.kv_bytes == 5 * per_slot


def test_kv_estimate_is_what_llama_cpp_takes(path: Path) -> None:
    file = modelfile.read(str(path))
    loaded = load(path)
    batch = llama.BatchBuffer(65)
    batch.size = 1
    batch.positions[:65] = np.arange(65)
    loaded.context.decode(batch)
    one = loaded.context.read(0).nbytes
    batch.size = 64
    batch.positions[:64] += 1
    loaded.context.decode(batch)
    taken = loaded.context.read(0).nbytes - one
    loaded.close()
    assert 0.9 < taken / (64 * file.kv_bytes_per_token()) < 1.3


def test_cgroup_limit_counts(tmp_path: Path) -> None:
    assert 0 < loading.available_memory() < 1 << 62


def test_a_head_that_claims_a_billion_layers(path: Path) -> None:
    file = modelfile.read(str(path))
    file.meta["llama.block_count"] = 3_000_000_000
    with pytest.raises(UsageError, match="3000000000 layers"):
        file.kv_bytes_per_slot(256)


@pytest.mark.parametrize("flash_attention", ["auto", "on"])
def test_keys_and_values_of_8_bits_take_half_the_memory(tmp_path: Path, flash_attention: str) -> None:
    path = tinymodels.write(tmp_path / "m.gguf", d=64, heads=2, kv_heads=2)
    plain, small = load(path), load(path, kv_type="q8_0", flash_attention=flash_attention)
    assert small.kv_bytes == pytest.approx(plain.kv_bytes * 17 / 32, abs=64)
    layouts = [StateLayout.of(loaded.context.sample()) for loaded in (plain, small)]
    assert all(layout is not None for layout in layouts)
    per_token = [layout.bytes_per_token for layout in layouts if layout is not None]
    assert per_token[1] / per_token[0] == pytest.approx(17 / 32)
    assert small.attention.startswith("llama.cpp (--")
    small.close()
    plain.close()


@pytest.mark.parametrize("more", [{"exact": True}, {"flash_attention": "off"}])
def test_8_bits_need_flash_attention(path: Path, more: dict[str, Any]) -> None:
    assert "--kv-type q8_0: not together with --" in refusal(path, kv_type="q8_0", **more)


def with_meta(path: Path, **changes: Any) -> modelfile.ModelFile:
    file = modelfile.read(str(path))
    file.meta.update({name.replace("__", "."): value for name, value in changes.items()})
    return file


def test_heads_may_be_counted_for_each_layer(tmp_path: Path) -> None:
    path = tinymodels.write(tmp_path / "m.gguf", layers=3)
    once = modelfile.read(str(path))
    layered = with_meta(path, llama__attention__head_count=[4] * 3, llama__attention__head_count_kv=[2] * 3)
    assert layered.key_width() == once.key_width() == 16
    assert layered.kv_bytes_per_slot(2048) == once.kv_bytes_per_slot(2048)
    some = with_meta(path, llama__attention__head_count=[4, 4, 8], llama__attention__head_count_kv=[2, 0, 4])
    assert some._kv_heads() == [2, 0, 4]
    queries = with_meta(path, llama__attention__head_count=[4, 2, 8])
    del queries.meta["llama.attention.head_count_kv"]
    assert queries._kv_heads() == [4, 2, 8], "each head has keys of its own where nothing else is said"


@pytest.mark.parametrize(
    "key",
    ["block_count", "attention.head_count", "attention.head_count_kv", "attention.key_length", "embedding_length"],
)
@pytest.mark.parametrize("value", ["twelve", [1, "two"], 2.5, -3, True])
def test_a_value_that_must_be_a_number_is_checked(path: Path, key: str, value: Any) -> None:
    file = modelfile.read(str(path))
    file.meta[f"llama.{key}"] = value
    with pytest.raises(UsageError, match=rf"damaged: llama.{key} is .*, not a number"):
        file.kv_bytes_per_slot(512)


def test_a_value_that_must_be_a_text_is_checked(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    name = b"general.architecture"
    at = data.index(name) + len(name)
    number = struct.pack("<II", 4, 7)  # of type u32, in the place of the string "llama"
    assert "general.architecture is '7', not a text" in refusal(
        damaged(path, tmp_path, data[:at] + number + data[at + 4 + 8 + 5 :])
    )
    file = with_meta(path, general__type=5)
    with pytest.raises(UsageError, match=r"general.type is '5', not a text"):
        file.text("general.type")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_head_never_break_the_reader(
    path: Path, tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(path.read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    other = tmp_path_factory.mktemp("flip") / "flipped.gguf"
    other.write_bytes(bytes(data))
    try:
        modelfile.read(str(other)).kv_bytes_per_token()
        message = "fine"
    except UsageError as refused:
        message = str(refused)
    assert message


# ── embeddings ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def embedder(path: Path) -> Iterator[EmbeddingEngine]:
    loaded = load(path)
    embedder = EmbeddingEngine(loaded.model, threads=1)
    yield embedder
    embedder.close()
    loaded.close()


def vectors(embedder: EmbeddingEngine, texts: list[str]) -> np.ndarray:
    embedded = embedder.embed(texts)
    return np.frombuffer(embedded.data, "<f4").reshape(embedded.n, embedded.d)


def test_vectors_have_unit_length_and_do_not_depend_on_other_texts(embedder: EmbeddingEngine) -> None:
    together = vectors(embedder, ["hello", "another text", "hello"])
    assert together.shape == (3, 32)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.array_equal(together[0], together[2])
    assert not np.allclose(together[0], together[1])
    np.testing.assert_allclose(vectors(embedder, ["hello"])[0], together[0], atol=1e-5)


def test_many_texts_of_all_lengths_are_as_each_alone(
    embedder: EmbeddingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take few batches; a text that is longer than a batch takes one of its own."""
    texts = [letter * length for letter, length in zip("abcdefghij" * 7, [1, 5, 300, 40, 3, 1500, 2] * 10, strict=True)]
    alone = np.concatenate([vectors(embedder, [text]) for text in texts[:10]])
    batches: list[int] = []
    decode = llama.LlamaContext.decode
    monkeypatch.setattr(
        llama.LlamaContext, "decode", lambda self, batch: batches.append(batch.size) or decode(self, batch)
    )
    together = vectors(embedder, texts)
    np.testing.assert_allclose(together[:10], alone, atol=1e-5)
    assert len(batches) < len(texts)
    assert sum(batches) == sum(map(len, texts))


def test_scores_are_as_many_as_the_model_has(tmp_path: Path) -> None:
    """A model that ranks gives a number for a text, not a vector."""
    path = tinymodels.write(tmp_path / "rank.gguf", d=32, layers=1, heads=2, kv_heads=1, ff=32, pooling=4)
    loaded = load(path)
    embedder = EmbeddingEngine(loaded.model, threads=1)
    with pytest.raises(OSError, match="scores pairs of texts"):
        embedder.embed(["hello"])
    context = embedder._opened(4)
    batch = llama.BatchBuffer(3)
    batch.size = 3
    batch.positions[:], batch.wanted[:] = (0, 1, 2), 1
    assert context.decode(batch) == llama.OK
    assert context.embedding(0).shape == (loaded.model.n_cls_out,) == (1,)
    embedder.close()
    loaded.close()


def test_no_texts_no_vectors(embedder: EmbeddingEngine) -> None:
    assert vectors(embedder, []).shape == (0, 32)


@pytest.mark.parametrize(("text", "why"), [("", "empty"), ("x" * 3000, "3000 tokens, at most 2048")])
def test_texts_that_cannot_be_embedded(embedder: EmbeddingEngine, text: str, why: str) -> None:
    with pytest.raises(OSError, match=why):
        embedder.embed(["fine", text])


@pytest.mark.parametrize(
    "text", ["x" * 300_000, " " * 300_000, "0" * 100_000, "x y " + "é" * 100_000 + " z", "\n" * 100_000]
)
def test_a_text_that_is_one_long_run_is_tokenised_and_not_the_end_of_the_core(nano: llama.Model, text: str) -> None:
    tokens = nano.tokenize(text, bos=False, special=True)
    assert nano.detokenize(tokens).decode() == text


@pytest.fixture(scope="module")
def nano() -> Iterator[llama.Model]:
    from aiosd.nano import model_path

    model = llama.Model(str(model_path()), 0, lambda fraction: None)
    yield model
    model.close()
