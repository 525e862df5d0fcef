"""A tiny BERT for tests, made from a seed: random weights, a vocabulary of letters and a few words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from aiosd.models.bert import Bert

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "tea", ".", *LETTERS, *("##" + c for c in LETTERS)]
CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
}


def make(seed: int = 0) -> Bert:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Any:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    width, inner = 32, 64
    tensors = {
        "token_embd.weight": random(len(WORDS), width),
        "position_embd.weight": random(64, width),
        "token_types.weight": random(2, width),
        "token_embd_norm.weight": 1 + random(width),
        "token_embd_norm.bias": random(width),
    }
    dense = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width)}
    dense |= {"attn_output": (width, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    for layer in range(2):
        for name, shape in dense.items():
            tensors[f"blk.{layer}.{name}.weight"] = random(*shape)
            tensors[f"blk.{layer}.{name}.bias"] = random(shape[0])
        for name in ("attn_output_norm", "layer_output_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + random(width)
            tensors[f"blk.{layer}.{name}.bias"] = random(width)
    return Bert("tiny", dict(CONFIG), list(WORDS), tensors)


def write_original(bert: Bert, folder: Path) -> Path:
    """Write the model in the form in which such models are published."""
    from aiosd.models.bert import _EMBEDDINGS, _LAYER

    theirs = {ours: name for name, ours in _EMBEDDINGS.items()}
    for layer in range(bert.layers):
        theirs |= {f"blk.{layer}.{ours}": f"encoder.layer.{layer}.{name}" for name, ours in _LAYER.items()}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in bert.tensors.items():
        stem, _, part = name.rpartition(".")
        head[f"{theirs[stem]}.{part}"] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + tensor.nbytes]
        }  # fmt: skip
        data += tensor.tobytes()
    encoded = json.dumps(head).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    (folder / "config.json").write_text(json.dumps(bert.config))
    (folder / "vocab.txt").write_text("\n".join(bert.words) + "\n")
    return folder
