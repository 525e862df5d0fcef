#!/usr/bin/env python
"""Does aiosd's own attention cost quality? It is compared with llama.cpp's two, plain and flash, token by token.

A model reads an English text (docs/architecture.md) in batches of some tokens, with each of the three. NLL: the
negative log likelihood of the true next token, in nats, on average. Top-1: how often two of them have the same
likeliest token. KL: the Kullback-Leibler divergence of two distributions. With quantised weights activations are
rounded to 8 bits before each product, so even llama.cpp's own two differ. Ours must be as near to the plain one as
flash attention is, apart from noise.

    $ make models && python benchmarks/quality.py
    model                        tokens      NLL plain   flash    ours   top-1 flash    ours   KL flash     ours
    SmolLM2-135M-Instruct.Q4 Q4_1      256      4.8130  4.8186  4.8118         0.953   0.941    0.00413  0.00408   kept
    …

`--quants Q4_0,Q8_0` first makes files in these formats of each model, in the cache of benchmarks. They are made from a
file that is quantised already. The result is no good model, but it is enough to compare the arithmetic of a format.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import llama_cpp  # noqa: E402  the checkout comes first
import numpy as np  # noqa: E402

from aiosd.llm import llama, modelfile  # noqa: E402
from aiosd.llm.attention import Attention  # noqa: E402
from aiosd.models import quants  # noqa: E402
from benchmarks import harness, models  # noqa: E402

KINDS = ("plain", "flash", "ours")
#: The largest allowed differences. NLL: of ours and plain, in nats, in addition to three times the standard error of
#: the difference. Top-1 (a share) and KL (nats): by how much ours may be farther from plain than flash is.
NLL_BAR, TOP_BAR, KL_BAR = 0.005, 0.02, 0.002


@dataclass
class Tally:
    """Sums over the text, for one attention."""

    nll: list[float] = field(default_factory=list)
    same: int = 0  # times that the likeliest token is that of plain
    kl: float = 0.0  # from plain
    right: int = 0  # times that the likeliest token is the true one


@dataclass
class Reader:
    """One context of a model, which reads the text."""

    context: llama.LlamaContext
    attention: Attention | None
    tally: Tally = field(default_factory=Tally)

    def read(self, tokens: Sequence[int], at: int) -> Any:
        """Log probabilities of the next token after each token, as float64."""
        count = len(tokens)
        batch = llama.BatchBuffer(count)
        batch.size = count
        batch.tokens[:] = tokens
        batch.positions[:] = np.arange(at, at + count)
        batch.wanted[:] = 1
        if self.context.decode(batch) != llama.OK:
            sys.exit("llama.cpp could not decode")
        logits = self.context.logits(count).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def readers(model: llama.Model, ctx: int, options: argparse.Namespace) -> dict[str, Reader]:
    """A context has as many slots as tokens are read at a time, because it returns no more rows of logits."""
    made = {}
    slots = options.batch
    for kind in KINDS:
        own = Attention.load(slots) if kind == "ours" else None
        flash = kind != "plain"
        context = llama.LlamaContext(
            model, slots=slots, ctx=ctx, ubatch=512, threads=options.threads, flash_attention=flash, attention=own
        )
        made[kind] = Reader(context, own)
    return made


def text_tokens(model: llama.Model, count: int) -> list[int]:
    """The beginning of the text, after the model's start token, and one more token to be predicted."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    first = [model.bos] if model.adds_bos else []
    found = [*first, *model.tokenize(text, bos=False, special=False)]
    if len(found) <= count:
        sys.exit(f"the text has only {len(found)} tokens")
    return [int(token) for token in found[: count + 1]]


def compare(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = llama.Model(str(path), 0, lambda fraction: None)
    tokens = text_tokens(model, options.tokens)
    sides = readers(model, -(-(options.tokens + 1) // 256) * 256, options)
    for at in range(0, options.tokens, options.batch):
        piece = tokens[at : min(at + options.batch, options.tokens)]
        truth = tokens[at + 1 : at + 1 + len(piece)]
        found = {kind: side.read(piece, at) for kind, side in sides.items()}
        for kind, side in sides.items():
            _count(side.tally, found[kind], found["plain"], truth)
    own = sides["ours"].attention
    used = own is not None and bool(own.used)
    row = _row(path, options.tokens, {kind: side.tally for kind, side in sides.items()}, used)
    for side in sides.values():
        side.context.close()
    model.close()
    return row


def _count(tally: Tally, found: Any, plain: Any, truth: list[int]) -> None:
    tally.nll += [-float(value) for value in found[np.arange(len(truth)), truth]]
    tally.right += int((found.argmax(axis=1) == truth).sum())
    tally.same += int((found.argmax(axis=1) == plain.argmax(axis=1)).sum())
    tally.kl += float((np.exp(plain) * (plain - found)).sum())


def _row(path: Path, tokens: int, tallies: dict[str, Tally], used: bool) -> dict[str, Any]:
    def mean(name: str) -> dict[str, float]:
        return {kind: getattr(tally, name) / tokens for kind, tally in tallies.items()}

    same, kl, right = mean("same"), mean("kl"), mean("right")
    nll = {kind: float(np.mean(tally.nll)) for kind, tally in tallies.items()}
    off = np.array(tallies["ours"].nll) - np.array(tallies["plain"].nll)
    near = abs(off.mean()) <= 3 * off.std() / np.sqrt(tokens) + NLL_BAR
    near = near and same["ours"] >= same["flash"] - TOP_BAR and kl["ours"] <= kl["flash"] + KL_BAR
    about = {"model": name_of(path), "tokens": tokens, "ours_used": used}
    return about | {"nll": nll, "top1_same": same, "top1_right": right, "kl": kl, "kept": bool(near and used)}


def name_of(path: Path) -> str:
    file = modelfile.read(str(path))
    quant = quants.FILE_TYPES.get(file.meta.get("general.file_type", -1), "") or quants.of_name(path.name)
    return f"{quants.stem_of(path.name)[:24]} {quant}".strip()


HEAD = "model                           tokens   NLL plain   flash    ours   top-1 flash    ours   KL flash     ours"


def line(row: dict[str, Any]) -> str:
    nll, same, kl = row["nll"], row["top1_same"], row["kl"]
    text = f"{row['model']:<32}{row['tokens']:>6}{nll['plain']:>12.4f}{nll['flash']:>8.4f}{nll['ours']:>8.4f}"
    text += f"{same['flash']:>14.3f}{same['ours']:>8.3f}{kl['flash']:>11.5f}{kl['ours']:>9.5f}"
    return f"{text}   {'kept' if row['kept'] else 'MISSED' if row['ours_used'] else 'NOT USED'}"


# ── other quantisations of a model ────────────────────────────────────────────────────────────────────────


def quantised(path: Path, quant: str) -> Path:
    """The model in another quantisation, which is made if it is not in the cache."""
    made = models.cache_dir() / f"{quants.stem_of(path.name)}-as-{quant}.gguf"
    if not made.exists():
        numbers = {name: number for number, name in quants.FILE_TYPES.items()}
        if quant not in numbers:
            sys.exit(f"{quant} is no quantisation; there are {', '.join(numbers)}")
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(".tmp")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = numbers[quant], 1, True
        if llama_cpp.llama_model_quantize(str(path).encode(), str(partial).encode(), ctypes.byref(params)):
            sys.exit(f"{path}: llama.cpp cannot make {quant} of it")
        partial.rename(made)
    return made


def at_hand() -> list[str]:
    return ["nano", *(name for name, model in harness.MODELS.items() if model.path.exists())]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, smollm2, … or a GGUF (default: all that are there)")
    parser.add_argument("--quants", default="", help="formats to make of each model, with commas between them")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the text")
    parser.add_argument("--batch", type=int, default=16, help="tokens at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "quality.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    llama.start()
    print(HEAD, flush=True)
    rows = []
    for name in options.model or at_hand():
        path = harness.model_path(name)
        for file in [path, *(quantised(path, quant) for quant in options.quants.split(",") if quant)]:
            rows.append(compare(file, options))
            print(line(rows[-1]), flush=True)
            harness.write("quality", rows, options.out, tokens=options.tokens, batch=options.batch)


if __name__ == "__main__":
    main()
