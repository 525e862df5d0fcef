"""GGUF files of any size with random weights, and where they are kept between runs.

A model of random weights takes as long as a real one of its shape, and its text is meaningless. It serves to measure,
and for tests that compare token by token. All comes from a seed, so a file can be deleted and made again.

    python benchmarks/models.py small     # makes it if it does not exist, and prints the path
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEFINED = ["<tool_call>", "</tool_call>"]


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    rest = (b for b in range(256) if b not in table)
    table.update({b: chr(256 + i) for i, b in enumerate(rest)})
    return table


def write_llama(
    path: Path,
    *,
    seed: int = 0,
    d: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ff: int = 128,
    vocab: int = 0,
    ctx: int = 4096,
    template: str | None = None,
    control: list[str] | None = None,
    f16: bool = False,
    q4_0: bool = False,
    rope_base: float = 10_000.0,
    scale: float = 1.0,
    add_bos: bool = False,
    pooling: int | None = None,
) -> Path:
    """A Llama of random weights with a byte-level vocabulary: control tokens, tool-call tags, the 256 bytes, a few
    pairs, and made-up words up to `vocab` tokens. `scale` sharpens the logits. `q4_0`: weights of four bits
    in this format, made as random bits, because a large model's weights as floats would not fit into memory."""
    rng = np.random.default_rng(seed)
    names = byte_to_char()
    control = CONTROL if control is None else control
    tokens = [*control, *DEFINED, *(names[b] for b in range(256))]
    types = [gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.USER_DEFINED] * len(DEFINED)
    types += [gguf.TokenType.NORMAL] * 256
    merges: list[str] = []
    words = ["he", "th", "in", "er", "an", "re", "on", "at", "en", "nd"]
    for word in words:
        merges.append(f"{word[0]} {word[1]}")
        tokens.append(word)
        types.append(gguf.TokenType.NORMAL)
    for i in range(vocab - len(tokens)):
        tokens.append(f"{names[ord(' ')]}w{i:05d}")
        types.append(gguf.TokenType.NORMAL)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(ctx)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // heads)
    writer.add_rope_freq_base(rope_base)
    writer.add_vocab_size(len(tokens))
    if q4_0:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(control.index("<|im_end|>") if "<|im_end|>" in control else 0)
    writer.add_add_bos_token(add_bos)
    if pooling is not None:
        writer.add_uint32("llama.pooling_type", pooling)
    if template is not None:
        writer.add_chat_template(template)

    kind = np.float16 if f16 else np.float32

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        if q4_0:
            return q4_0_blocks(rng, rows, columns, gain / np.sqrt(columns))
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(kind)

    def add(name: str, weights: Any) -> None:
        raw = gguf.GGMLQuantizationType.Q4_0 if weights.dtype == np.uint8 else None
        writer.add_tensor(name, weights, raw_dtype=raw)

    kv = d * kv_heads // heads
    embedding = matrix(len(tokens), d, np.sqrt(d))
    add("token_embd.weight", embedding)
    add("output_norm.weight", np.ones(d, np.float32))
    output = matrix(len(tokens), d, 3.0 * scale)
    add("output.weight", output)
    for i in range(layers):
        add(f"blk.{i}.attn_norm.weight", np.ones(d, np.float32))
        add(f"blk.{i}.attn_q.weight", matrix(d, d))
        add(f"blk.{i}.attn_k.weight", matrix(kv, d))
        add(f"blk.{i}.attn_v.weight", matrix(kv, d))
        add(f"blk.{i}.attn_output.weight", matrix(d, d))
        add(f"blk.{i}.ffn_norm.weight", np.ones(d, np.float32))
        add(f"blk.{i}.ffn_gate.weight", matrix(ff, d))
        add(f"blk.{i}.ffn_up.weight", matrix(ff, d))
        add(f"blk.{i}.ffn_down.weight", matrix(d, ff))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q4_0_blocks(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Any:
    """Random weights in GGUF's format Q4_0: for every 32 weights a scale as f16, and 16 bytes with two numbers of 0 to
    15 each, which stand for -8 to 7 times the scale."""
    blocks = np.frombuffer(rng.bytes(rows * columns // 32 * 18), np.uint8).reshape(-1, 18).copy()
    blocks[:, :2] = np.array([spread / 4.6], np.float16).view(np.uint8)  # 4.6: the standard deviation of 0 to 15
    return blocks.reshape(rows, -1)


#: By name: arguments of `write_llama`. `small` is the model of about 60 M parameters in the figures.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab": 1024, "d": 192, "layers": 4, "heads": 6, "kv_heads": 3, "ff": 512, "f16": True},
    "small": {"vocab": 32_000, "d": 512, "layers": 8, "heads": 8, "kv_heads": 4, "ff": 1536, "f16": True, "ctx": 8192},
    # A large vocabulary and few layers: work per token of the vocabulary takes most of the time.
    "words49": {"vocab": 49_152, "d": 512, "layers": 6, "heads": 8, "kv_heads": 4, "ff": 1536, "f16": True},
    "words152": {"vocab": 151_936, "d": 512, "layers": 6, "heads": 8, "kv_heads": 4, "ff": 1536, "f16": True},
    "llama-8b-q4_0": {  # the shape of Llama 3.1 8B
        "vocab": 128_256, "d": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ff": 14_336, "q4_0": True,
        "ctx": 131_072, "rope_base": 500_000.0,
    },
}  # fmt: skip


def cache_dir() -> Path:
    """Where models are kept: $AIOS_BENCH_CACHE, or else the user's cache folder."""
    base = os.environ.get("AIOS_BENCH_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aios-bench"


def path_of(name: str, seed: int = 0) -> Path:
    """The file of a model in SHAPES, which is made if it does not exist."""
    path = cache_dir() / f"{name}-{seed}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        write_llama(partial, seed=seed, **SHAPES[name])
        partial.rename(path)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or ["tiny", "small"]:
        print(path_of(name))
