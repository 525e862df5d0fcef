"""GGUF files of any size with random weights, and where they are kept between runs.

A model of random weights computes as a real one of its shape does and says nothing: for measuring, and for tests
that compare token by token. Everything comes from a seed, so a file can be thrown away and made again.

    python benchmarks/models.py small     # makes it if need be and prints the path
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
    """GPT-2's printable stand-in for every byte."""
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
    scale: float = 1.0,
    add_bos: bool = False,
    pooling: int | None = None,
) -> Path:
    """A Llama of random weights with a byte-level vocabulary: control tokens, tool-call tags, the 256 bytes, a few
    pairs, and made-up words up to `vocab` tokens. `scale` sharpens the logits."""
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
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
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
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(kind)

    kv = d * kv_heads // heads
    embedding = matrix(len(tokens), d, np.sqrt(d))
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    output = matrix(len(tokens), d, 3.0 * scale)
    writer.add_tensor("output.weight", output)
    for i in range(layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(d, np.float32))
        writer.add_tensor(f"blk.{i}.attn_q.weight", matrix(d, d))
        writer.add_tensor(f"blk.{i}.attn_k.weight", matrix(kv, d))
        writer.add_tensor(f"blk.{i}.attn_v.weight", matrix(kv, d))
        writer.add_tensor(f"blk.{i}.attn_output.weight", matrix(d, d))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(d, np.float32))
        writer.add_tensor(f"blk.{i}.ffn_gate.weight", matrix(ff, d))
        writer.add_tensor(f"blk.{i}.ffn_up.weight", matrix(ff, d))
        writer.add_tensor(f"blk.{i}.ffn_down.weight", matrix(d, ff))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: By name: arguments of `write_llama`. `small` is the model of about 60 M parameters that the figures speak of.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab": 1024, "d": 192, "layers": 4, "heads": 6, "kv_heads": 3, "ff": 512, "f16": True},
    "small": {"vocab": 32_000, "d": 512, "layers": 8, "heads": 8, "kv_heads": 4, "ff": 1536, "f16": True, "ctx": 8192},
}


def cache_dir() -> Path:
    """Outside the checkout: $AIOS_BENCH_CACHE, else the user's cache folder."""
    base = os.environ.get("AIOS_BENCH_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aios-bench"


def path_of(name: str, seed: int = 0) -> Path:
    """The file of a model in SHAPES, made now if it does not exist."""
    path = cache_dir() / f"{name}-{seed}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        write_llama(partial, seed=seed, **SHAPES[name])
        partial.rename(path)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or SHAPES:
        print(path_of(name))
