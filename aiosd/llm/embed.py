"""Vectors for texts, and scores for pairs of texts, in a separate small context, which is created when first needed.

The model's own pooling is used if its file names one, else the mean over a text's tokens (a causal model was not
trained for this: the vectors are usable, not good). Unit length, float32.

Several texts are computed at once, each as one sequence; llama.cpp pools only tokens of one batch, so a text is never
split. The last bits of a vector depend on the other texts in the batch.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np

from aiosd.llm import llama
from libaios.wire import Embedded, Ranked

#: Limits of one step, in tokens and in texts: generations wait during a step.
BATCH, TEXTS = 512, 32

#: The longest text (tokens): it is computed in one step, and generations wait meanwhile.
MOST_TOKENS = 2048


#: Pays for a number of tokens, or raises OSError; None: they are free.
Pay = Callable[[int], None] | None


class EmbeddingEngine:
    def __init__(self, model: llama.Model, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._context: llama.LlamaContext | None = None
        self._limit = min(MOST_TOKENS, model.n_ctx_train or MOST_TOKENS)
        own = model.meta("general.architecture")
        self._pooling = model.meta(f"{own}.pooling_type") or "0"
        self._ranks = self._pooling == str(llama.POOLING_RANK)
        self.computed = 0  # tokens, of all calls

    def embed(self, texts: list[str]) -> Embedded:
        """OSError EINVAL for an empty text, EMSGSIZE for one that is too long."""
        *_, embedded = self.in_steps(texts)
        assert embedded is not None
        return embedded

    def in_steps(
        self, texts: list[str], known: list[list[int]] | None = None, pay: Pay = None
    ) -> Iterator[Embedded | None]:
        """The same in steps, one batch each: yields None after each step, the result after the last. `known`: the
        tokens of all texts, if they have been made already. `pay` is called with their number before they are computed,
        and may raise OSError."""
        if self._ranks:
            raise OSError(errno.EINVAL, "model: this one scores pairs of texts; it makes no vectors")
        rows: list[llama.Floats] = []
        tokens = known if known is not None else (self._model.tokenize(text, bos=True, special=False) for text in texts)
        total = yield from self._computed(tokens, "texts", rows, pay)
        width = self._model.n_embd_out
        data = np.stack([_unit(row) for row in rows]) if rows else np.zeros((0, width), np.float32)
        yield Embedded(len(rows), width, data.astype("<f4").tobytes(), total)

    def ranked_in_steps(self, pairs: Iterable[list[int]], pay: Pay = None) -> Iterator[Ranked | None]:
        """Scores of pairs of a query and a document (see `pairs.py`), in steps as above."""
        if not self._ranks:
            raise OSError(errno.EINVAL, "model: this one makes no scores; rerank needs a pooling type of rank")
        rows: list[llama.Floats] = []
        total = yield from self._computed(pairs, "documents", rows, pay)
        scores = [float(row[0]) for row in rows]
        if not np.isfinite(scores).all():
            raise OSError(errno.EIO, "the model gives a score that is no number")
        yield Ranked(scores, total)

    def _computed(
        self, texts: Iterable[list[int]], what: str, rows: list[llama.Floats], pay: Pay
    ) -> Generator[None, None, int]:
        """Append to `rows` the pooled result of each text, one batch between two yields. Returns the number of
        tokens."""
        if pay is not None:
            texts = list(texts)
            pay(sum(map(len, texts)))
        batch: list[list[int]] = []
        total = 0
        for i, tokens in enumerate(texts):
            self._check(f"{what}[{i}]", tokens)
            total += len(tokens)
            if batch and (len(batch) == TEXTS or sum(map(len, batch)) + len(tokens) > BATCH):
                rows += self._pooled(batch)
                batch = []
                yield None
            batch.append(tokens)
        if batch:
            rows += self._pooled(batch)
            yield None
        return total

    def _check(self, what: str, tokens: list[int]) -> None:
        if not tokens:
            raise OSError(errno.EINVAL, f"{what}: it is empty")
        if len(tokens) > self._limit:
            raise OSError(errno.EMSGSIZE, f"{what}: {len(tokens)} tokens, at most {self._limit} can be embedded")

    def _pooled(self, texts: list[list[int]]) -> list[llama.Floats]:
        lengths = [len(tokens) for tokens in texts]
        self.computed += sum(lengths)
        context = self._opened(sum(lengths))
        batch = llama.BatchBuffer(sum(lengths))
        batch.size = sum(lengths)
        batch.tokens[:] = np.concatenate(texts)
        batch.positions[:] = np.concatenate([np.arange(length) for length in lengths])
        batch.sequences[:] = np.repeat(np.arange(len(texts)), lengths)
        batch.wanted[:] = 1
        context.clear()
        result = context.decode(batch)
        if result != llama.OK:
            raise OSError(errno.EIO, f"llama.cpp could not compute an embedding (result {result})")
        return [context.embedding(sequence) for sequence in range(len(texts))]

    def _opened(self, tokens: int) -> llama.LlamaContext:
        """A context whose batch takes `tokens` tokens. It grows only when a long text needs it, as its buffers have a
        number for each token and each word of the vocabulary."""
        if self._context is None or self._context.ubatch < tokens:
            self.close()
            self._context = self._open(BATCH if tokens <= BATCH else self._limit)
        return self._context

    def _open(self, tokens: int) -> llama.LlamaContext:
        return llama.LlamaContext(
            self._model,
            slots=TEXTS,
            ctx=tokens,
            ubatch=tokens,
            threads=self._threads,
            flash_attention=False,
            embeddings=True,
            pooling=None if self._pooling != "0" else llama.POOLING_MEAN,
        )

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None


def _unit(vector: llama.Floats) -> llama.Floats:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise OSError(errno.EIO, "the model gives a vector without length for this text")
    return vector / np.float32(length)
