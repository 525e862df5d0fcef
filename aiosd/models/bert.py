"""BERT models that embed sentences, in the form in which they are published (safetensors, configuration, vocabulary):
read here, written as a GGUF for llama.cpp, or computed for each piece of the vocabulary by itself, to make a table of
static vectors.

Only the common features of such models are supported; another kind of model is refused with a sentence.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aiosd.errors import UsageError
from aiosd.models import ggufwriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_KINDS: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_CLS, _SEP = "[CLS]", "[SEP]"
AT_ONCE = 1024  # pieces that are computed together
FREQUENT = 1e-3  # a piece with this share of all texts has half the weight

_EMBEDDINGS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


@dataclass(frozen=True)
class Bert:
    """One model. `tensors`: by llama.cpp's names."""

    name: str
    config: dict[str, Any]
    words: list[str]
    tensors: dict[str, Floats]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def epsilon(self) -> float:
        return float(self.config.get("layer_norm_eps", 1e-12))


def read(folder: Path, name: str) -> Bert:
    """Read a model from a folder with model.safetensors, config.json, and vocab.txt or tokenizer.json. Raises
    UsageError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        words = _words(folder)
        raw = _safetensors((folder / "model.safetensors").read_bytes())
    except (OSError, ValueError, LookupError, TypeError, struct.error) as err:
        raise UsageError(f"{folder}: holds no model that can be read: {err}") from err
    if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{folder}: {config.get('model_type')!r} is no BERT, the only kind that is read here")
    wanted = dict(_EMBEDDINGS)
    for layer in range(int(config["num_hidden_layers"])):
        wanted |= {f"encoder.layer.{layer}.{theirs}": f"blk.{layer}.{ours}" for theirs, ours in _LAYER.items()}
    tensors = {}
    for theirs, ours in wanted.items():
        for part in ("weight", "bias"):
            found = raw.get(f"{theirs}.{part}", raw.get(f"bert.{theirs}.{part}"))
            if found is not None:
                tensors[f"{ours}.{part}"] = found
            elif part == "weight":
                raise UsageError(f"{folder}: has no tensor {theirs}.{part}")
    if len(words) != len(tensors["token_embd.weight"]):
        raise UsageError(f"{folder}: {len(words)} words for {len(tensors['token_embd.weight'])} vectors")
    return Bert(name, config, words, tensors)


def _words(folder: Path) -> list[str]:
    plain = folder / "vocab.txt"
    if plain.exists():
        return plain.read_text(encoding="utf-8").split("\n")[: _lines(plain)]
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _lines(path: Path) -> int:
    return path.read_bytes().rstrip(b"\n").count(b"\n") + 1


def _safetensors(content: bytes) -> dict[str, Floats]:
    size = struct.unpack_from("<Q", content)[0]
    head = json.loads(content[8 : 8 + size])
    tensors = {}
    for name, about in head.items():
        if name != "__metadata__" and about["dtype"] in _KINDS:
            begin, end = about["data_offsets"]
            data = np.frombuffer(content[8 + size + begin : 8 + size + end], _KINDS[about["dtype"]])
            tensors[name] = data.reshape(about["shape"]).astype(np.float32)
    return tensors


# ── for llama.cpp ─────────────────────────────────────────────────────────────────────────────────────────


def write_gguf(bert: Bert, path: Path) -> None:
    """Write the model as a GGUF, with matrices in 16 bits."""
    config = bert.config
    special = {"bos_token_id": _CLS, "cls_token_id": _CLS, "seperator_token_id": _SEP}  # spelled so in the format
    special |= {"unknown_token_id": "[UNK]", "padding_token_id": "[PAD]", "mask_token_id": "[MASK]"}
    metadata: dict[str, Any] = {
        "general.architecture": "bert",
        "general.name": bert.name,
        "general.file_type": 1,
        "bert.context_length": int(config["max_position_embeddings"]),
        "bert.embedding_length": int(config["hidden_size"]),
        "bert.feed_forward_length": int(config["intermediate_size"]),
        "bert.block_count": bert.layers,
        "bert.attention.head_count": bert.heads,
        "bert.attention.layer_norm_epsilon": bert.epsilon,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,  # the mean
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [_as_llama_cpp_has_it(word) for word in bert.words],
        "tokenizer.ggml.token_type": [3 if _is_special(word) else 1 for word in bert.words],
        "tokenizer.ggml.token_type_count": 2,
    }
    numbers = {word: number for number, word in enumerate(bert.words)}
    metadata |= {f"tokenizer.ggml.{key}": numbers[word] for key, word in special.items() if word in numbers}
    wide = {"position_embd.weight", "token_types.weight"}
    ggufwriter.write(
        path,
        metadata,
        {
            name: tensor.astype(np.float16) if tensor.ndim == 2 and name not in wide else tensor
            for name, tensor in bert.tensors.items()
        },
    )


def _is_special(word: str) -> bool:
    return word.startswith("[") and word.endswith("]") and len(word) > 2


def _as_llama_cpp_has_it(word: str) -> str:
    """The name of a piece for llama.cpp, which marks the beginnings of words instead of their continuations."""
    return word if _is_special(word) else word[2:] if word.startswith("##") else "\u2581" + word


# ── vectors of pieces ─────────────────────────────────────────────────────────────────────────────────────


def distil(
    bert: Bert, width: int, report: Callable[[float], None] = lambda fraction: None
) -> tuple[list[str], Floats, NDArray[np.int8]]:
    """Words, weights and rows of a table of `width` dimensions (see `aiosd.store.static`). `report` is called with the
    fraction that is done."""
    chosen = [number for number, word in enumerate(bert.words) if not _is_special(word)]
    parts = []
    for begin in range(0, len(chosen), AT_ONCE):
        parts.append(embed(bert, np.array(chosen[begin : begin + AT_ONCE])))
        report((begin + len(parts[-1])) / len(chosen))
    vectors = np.concatenate(parts)
    rows = _narrow(vectors, width)
    scales = np.abs(rows).max(axis=1) / np.float32(127) + np.float32(1e-12)
    rounded = np.round(rows / scales[:, None]).astype(np.int8)
    return [bert.words[number] for number in chosen], (scales * _weights(len(chosen))).astype(np.float32), rounded


def _narrow(vectors: Floats, width: int) -> Floats:
    """The vectors in the directions in which they differ most (principal components)."""
    centred = vectors - vectors.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ directions[:, ::-1][:, :width], np.float32)


def _weights(count: int) -> Floats:
    """The weights of pieces. They are sorted by frequency, so by Zipf's law the n-th has a share of about 1/n."""
    ranks = np.arange(count) + 2.7
    shares = 1 / ranks / (1 / ranks).sum()
    return np.asarray(FREQUENT / (FREQUENT + shares), np.float32)


def embed(bert: Bert, numbers: NDArray[Any]) -> Floats:
    """The vector of each of these pieces alone: the mean over the model's last layer."""
    weights = bert.tensors
    cls, sep = bert.words.index(_CLS), bert.words.index(_SEP)
    ids = np.stack([np.full(len(numbers), cls), numbers, np.full(len(numbers), sep)], axis=1)
    x = weights["token_embd.weight"][ids] + weights["position_embd.weight"][:3] + weights["token_types.weight"][0]
    x = _norm(bert, x, "token_embd_norm")
    for layer in range(bert.layers):
        x = _layer(bert, x, f"blk.{layer}.")
    return np.asarray(x.mean(axis=1), np.float32)


def _layer(bert: Bert, x: Floats, at: str) -> Floats:
    count, length, width = x.shape
    queries, keys, values = (
        _dense(bert, x, f"{at}attn_{part}").reshape(count, length, bert.heads, -1).transpose(0, 2, 1, 3)
        for part in ("q", "k", "v")
    )
    scores = queries @ keys.transpose(0, 1, 3, 2) / np.float32((width // bert.heads) ** 0.5)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    attended = (shares @ values).transpose(0, 2, 1, 3).reshape(count, length, width)
    x = _norm(bert, x + _dense(bert, attended, f"{at}attn_output"), f"{at}attn_output_norm")
    inner = _gelu(_dense(bert, x, f"{at}ffn_up"))
    return _norm(bert, x + _dense(bert, inner, f"{at}ffn_down"), f"{at}layer_output_norm")


def _dense(bert: Bert, x: Floats, name: str) -> Floats:
    flat = x.reshape(-1, x.shape[-1]) @ bert.tensors[f"{name}.weight"].T + bert.tensors[f"{name}.bias"]
    return np.asarray(flat.reshape(*x.shape[:-1], -1), np.float32)


def _norm(bert: Bert, x: Floats, name: str) -> Floats:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(bert.epsilon))
    return np.asarray(scaled * bert.tensors[f"{name}.weight"] + bert.tensors[f"{name}.bias"], np.float32)


def _gelu(x: Floats) -> Floats:
    """The GELU function with tanh, which is within 0.001 of the exact one."""
    return np.asarray(
        0.5 * x * (1 + np.tanh(np.float32(0.7978846) * (x + np.float32(0.044715) * x * x * x))), np.float32
    )
