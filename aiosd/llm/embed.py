"""Vectors for texts, in a small context of its own, made when first asked for.

The model's own pooling where it names one, else the mean over a text's tokens (a causal model was not trained
for this: the vectors are usable, not good). Unit length, float32.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np

from aiosd.llm import llama
from libaios.wire import Embedded

#: The longest text (tokens); a text is computed in one batch.
MAX_TOKENS = 512


class Embedder:
    def __init__(self, model: llama.Model, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._context: llama.Context | None = None

    def embed(self, texts: list[str]) -> Embedded:
        """OSError EINVAL for an empty text, EMSGSIZE for one that is too long."""
        *_, embedded = self.in_steps(texts)
        assert embedded is not None
        return embedded

    def in_steps(self, texts: list[str]) -> Iterator[Embedded | None]:
        """The same, one text in each step; the last step brings the result."""
        rows, total = [], 0
        limit = min(MAX_TOKENS, self._model.n_ctx_train or MAX_TOKENS)
        for i, text in enumerate(texts):
            tokens = self._model.tokenize(text, bos=True, special=False)
            if not tokens:
                raise OSError(errno.EINVAL, f"texts[{i}]: it is empty")
            if len(tokens) > limit:
                raise OSError(errno.EMSGSIZE, f"texts[{i}]: {len(tokens)} tokens, at most {limit} can be embedded")
            rows.append(self._one(tokens))
            total += len(tokens)
            yield None
        width = self._model.n_embd_out
        data = np.stack(rows) if rows else np.zeros((0, width), np.float32)
        yield Embedded(len(rows), width, data.astype("<f4").tobytes(), total)

    def _one(self, tokens: list[int]) -> llama.Floats:
        context = self._context or self._open()
        batch, n = self._batch, len(tokens)
        batch.size = n
        batch.tokens[:n], batch.positions[:n], batch.sequences[:n], batch.wanted[:n] = tokens, np.arange(n), 0, 1
        context.clear()
        result = context.decode(batch)
        if result != llama.OK:
            raise OSError(errno.EIO, f"llama.cpp could not compute an embedding (result {result})")
        vector = context.embedding(0)
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise OSError(errno.EIO, "the model gives a vector without length for this text")
        return vector / np.float32(length)

    def _open(self) -> llama.Context:
        own = self._model.meta("general.architecture")
        named = self._model.meta(f"{own}.pooling_type")
        self._batch = llama.Batch(MAX_TOKENS)
        self._context = llama.Context(
            self._model,
            slots=1,
            ctx=MAX_TOKENS,
            ubatch=MAX_TOKENS,
            threads=self._threads,
            flash_attention=False,
            embeddings=True,
            pooling=None if named not in (None, "0") else llama.POOLING_MEAN,
        )
        return self._context

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
